# A kernel is launched as kernel[grid](...).
# pyright: reportIndexIssue=false
"""Launches of the kernels that come before attention. Imported only where Triton is there.

Shapes: x BLND in half precision with a unit last stride; P is L rounded up to BLOCK.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import prepare
from .prepare import BLOCK, CODES, HALF, NOTHING

HEAD_DIM = 128
LOG2_SCALE = math.log2(math.e) / math.sqrt(HEAD_DIM)  # of softmax, in powers of two

Norm = tuple[Tensor, float]  # weight E, eps
Rotary = tuple[Tensor, Tensor]  # cos, sin: L x D/2 float32


class Coded(NamedTuple):
    """Codes of one operand of attention and what they are multiplied by; see kernels/prepare.py."""

    codes: Tensor
    scale: Tensor


def padded(tokens: int) -> int:
    return triton.cdiv(tokens, BLOCK) * BLOCK


def half_rows(x_BLND: Tensor, norm: Norm, rotary: Rotary | None) -> Tensor:
    """Norm and rotary in one pass: BLND, contiguous, in x's dtype."""
    y_BLND = torch.empty(x_BLND.shape, dtype=x_BLND.dtype, device=x_BLND.device)
    _rows(x_BLND, norm, rotary, out=y_BLND)
    return y_BLND


def code_queries(x_BLND: Tensor, norm: Norm | None = None, rotary: Rotary | None = None) -> Coded:
    """BNPD int8 and BNP float32, which also holds softmax's scale."""
    B, L, N, _ = x_BLND.shape
    codes = torch.empty(B, N, padded(L), HEAD_DIM, dtype=torch.int8, device=x_BLND.device)
    scale = torch.empty(B, N, padded(L), device=x_BLND.device)
    _rows(x_BLND, norm, rotary, out=codes, scale=scale)
    return Coded(codes, scale)


def code_keys(x_BLND: Tensor, norm: Norm | None = None, rotary: Rotary | None = None) -> Coded:
    """BNPD int8 and B N P/BLOCK float32, of the keys less their mean over all tokens.

    Whatever is the same for all keys adds the same to all scores of a query, which softmax does not
    see; without the mean the codes are finer. SageAttention: https://arxiv.org/abs/2410.02367
    """
    B, L, N, D = x_BLND.shape
    chunks = triton.cdiv(L, prepare.SUM_TOKENS)
    sums = torch.empty(B, chunks, N, D, device=x_BLND.device)
    y_BLND = x_BLND
    if norm is not None:
        y_BLND = torch.empty(x_BLND.shape, dtype=x_BLND.dtype, device=x_BLND.device)
    _rows(x_BLND, norm, rotary, out=None if norm is None else y_BLND, sums=sums)
    mean_BND = sums.sum(dim=1).mul_(1 / L)
    codes = torch.empty(B, N, padded(L), D, dtype=torch.int8, device=x_BLND.device)
    scale = torch.empty(B, N, padded(L) // BLOCK, device=x_BLND.device)
    with torch.cuda.device_of(x_BLND):
        prepare.keys[(padded(L) // BLOCK, B * N)](
            y_BLND, mean_BND, codes, scale, L, padded(L), N, *y_BLND.stride()[:3], BLOCK, D
        )
    return Coded(codes, scale)


def code_values(x_BLND: Tensor) -> Coded:
    """BNDP float8, renumbered, and B N P/BLOCK exponents of two."""
    B, L, N, D = x_BLND.shape
    device = x_BLND.device
    codes = torch.empty(B, N, D, padded(L), dtype=torch.float8_e4m3fn, device=device)
    exponent = torch.empty(B, N, padded(L) // BLOCK, device=device)
    with torch.cuda.device_of(x_BLND):
        prepare.values[(padded(L) // BLOCK, B * N)](
            x_BLND, codes, exponent, L, padded(L), N, *x_BLND.stride()[:3], BLOCK, D
        )
    return Coded(codes, exponent)


def _rows(
    x_BLND: Tensor,
    norm: Norm | None,
    rotary: Rotary | None,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """Launch `rows`: half precision into `out`, codes where there is a `scale`, sums."""
    B, L, N, D = x_BLND.shape
    unused = x_BLND  # stands for every tensor that a kernel of these constants does not touch
    weight, eps = (unused, 0.0) if norm is None else norm
    cos, sin = (unused, unused) if rotary is None else (part.contiguous() for part in rotary)
    tokens = prepare.ROW_TOKENS if sums is None else prepare.SUM_TOKENS
    heads = triton.next_power_of_2(N)
    kind = NOTHING if out is None else HALF if scale is None else CODES
    with torch.cuda.device_of(x_BLND):
        prepare.rows[(triton.cdiv(L, tokens), B)](
            x_BLND,
            weight,
            cos,
            sin,
            unused if out is None else out,
            unused if scale is None else scale,
            unused if sums is None else sums,
            L,
            padded(L),
            N,
            *x_BLND.stride()[:3],
            eps,
            LOG2_SCALE,
            NORM=norm is not None,
            TURN=rotary is not None,
            OUT=kind,
            SUM=sums is not None,
            T=tokens,
            HEADS=heads,
            D=D,
            num_warps=max(1, min(8, heads // (8 if sums is None else 16))),
        )
