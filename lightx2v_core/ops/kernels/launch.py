# A kernel is launched as kernel[grid](...).
# pyright: reportIndexIssue=false
"""Launches of the 8-bit attention kernels. Imported only where Triton is there."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import attention_triton
from .prepare import BLOCK
from .prepass import HEAD_DIM, Coded

COPY_ENGINE = (9, 0)  # compute capability from which tiles are copied by descriptors


class GluonKernel:
    """The Hopper kernel with the tiles of ones that its row sums are products with."""

    def __init__(self, code_exp: bool = True) -> None:
        """`code_exp`: the float8 code of P from the exponent itself; else by the exp2 unit."""
        self._code_exp = code_exp
        self._ones: dict[tuple[torch.device, int], Tensor] = {}

    def __call__(self, q: Coded, k: Coded, v: Coded | Tensor, o_BLND: Tensor) -> None:
        from . import attention_gluon

        assert isinstance(v, tuple), "values are codes here"
        B, L, N, D = o_BLND.shape
        attention_gluon.attend[(triton.cdiv(L, attention_gluon.QUERIES), B * N)](
            _descriptor(q.codes.flatten(0, 2), [attention_gluon.ROWS, D]),
            _descriptor(k.codes.flatten(0, 2), [BLOCK, D]),
            _descriptor(v.codes.flatten(0, 2), [D, BLOCK]),
            _descriptor(self._ones_for(L, o_BLND.device), [8, BLOCK]),
            q.scale,
            k.scale,
            v.scale,
            o_BLND,
            L,
            q.codes.shape[2],
            N,
            *o_BLND.stride()[:3],
            KEYS=BLOCK,
            D=D,
            RING=attention_gluon.STAGES,
            CODE_EXP=self._code_exp,
            num_warps=4,
        )

    def _ones_for(self, tokens: int, device: torch.device) -> Tensor:
        """16 x BLOCK float8: eight rows for the last block, zero past the last token; eight more.

        At most BLOCK of 2 KB on each device.
        """
        real = (tokens - 1) % BLOCK + 1
        if (device, real) not in self._ones:
            a, b, c, d = torch.meshgrid(
                *(torch.arange(n) for n in (BLOCK // 16, 4, 2, 2)), indexing="ij"
            )
            # As kernels/prepare.py numbers tokens: 16a + 8c + 2b + d lies at 16a + 4b + 2c + d.
            last = (16 * a + 8 * c + 2 * b + d).flatten() < real
            ones = torch.stack([last] * 8 + [torch.ones_like(last)] * 8).float()
            with torch.inference_mode(False):
                self._ones[device, real] = ones.to(torch.float8_e4m3fn).to(device)
        return self._ones[device, real]


def _descriptor(codes: Tensor, block: list[int]) -> object:
    """How the copy engine reads blocks of a matrix of codes."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    kind = gl.int8 if codes.dtype == torch.int8 else gl.float8e4nv
    layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    return TensorDescriptor.from_tensor(codes, block, layout)


def triton_kernel(q: Coded, k: Coded, v: Coded | Tensor, o_BLND: Tensor) -> None:
    """The kernel for any card, with tiles that fit the shared memory of `o`'s."""
    B, L, N, _ = o_BLND.shape
    wide = isinstance(v, Tensor)
    capability = torch.cuda.get_device_capability(o_BLND.device)
    copies = capability >= COPY_ENGINE
    rows, keys, stages, warps = tiles(capability, wide)
    values, exponent = (v, k.scale) if isinstance(v, Tensor) else v
    attention_triton.attend[(triton.cdiv(L, rows), B * N)](
        q.codes,
        _copied(k.codes, [keys, HEAD_DIM]) if copies else k.codes,
        _copied(values, [HEAD_DIM, keys]) if copies and not wide else values,
        q.scale,
        k.scale,
        exponent,
        o_BLND,
        L,
        q.codes.shape[2],
        N,
        *values.stride()[:3],
        *o_BLND.stride()[:3],
        COPIES=copies,
        WIDE_V=wide,
        ROWS=rows,
        KEYS=keys,
        BLOCK=BLOCK,
        D=HEAD_DIM,
        STAGES=stages,
        num_warps=warps,
        num_stages=stages,
    )


def _copied(codes: Tensor, block: list[int]) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(codes.flatten(0, 2), block)


def tiles(capability: tuple[int, int], wide: bool) -> tuple[int, int, int, int]:
    """(queries, keys, stages, warps) of a program; on 9.0 the best of those measured.

    Shared memory holds `stages` of K and V: 100 KB on consumer cards, 163 KB and more on others.
    """
    if capability[0] == 9:
        return (128, 64, 2, 4) if wide else (64, 128, 2, 4)
    return (64, 64, 2, 4)
