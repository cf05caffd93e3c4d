"""Activations as 8-bit rows: quantised once, multiplied by every linear that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
LEAST = 1e-8  # of a token's largest value, so that padding has a scale
CHUNK = 2**25  # elements of a float32 or int32 intermediate: 128 MB


class Form(NamedTuple):
    """How the linears that read an activation want it."""

    dtype: torch.dtype  # of tokens, and of what is multiplied out of rows
    codes: torch.dtype | None = None  # of rows; None: tokens alone, a plain tensor
    tokens: bool = True  # also as they are, beside the rows


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Tokens in 8 bits, a scale for each. Linears take it where they take a tensor."""

    codes_LK: Tensor
    scale_L1: Tensor  # float32
    shape: torch.Size  # of the tokens, ...K
    dtype: torch.dtype  # of the tokens, and of what is multiplied out of these
    tokens: Tensor | None = None  # where a LoRA branch or a linear of another kind reads them

    @property
    def device(self) -> torch.device:
        return self.codes_LK.device

    @property
    def is_cuda(self) -> bool:
        return self.codes_LK.is_cuda


def tokens_of(x: Tensor | Rows) -> Tensor:
    """The activation itself. Rows hold it for the linears that `form_for` was asked about."""
    if isinstance(x, Tensor):
        return x
    assert x.tokens is not None, "rows without tokens reached a linear that multiplies tokens"
    return x.tokens


def form_for(linears: Sequence[nn.Module], dtype: torch.dtype) -> Form:
    """What serves all of `linears` at once: rows where one multiplies them, tokens where needed.

    Linears tell by `rows_dtype` and `branches`; those that have neither, of another library, get
    tensors. With gradients there are no rows made ahead.
    """
    wanted = [getattr(linear, "rows_dtype", None) for linear in linears]
    codes = next((codes for codes in wanted if codes is not None), None)
    knows_rows = all(hasattr(linear, "branches") for linear in linears)
    if codes is None or not knows_rows or torch.is_grad_enabled():
        return Form(dtype)
    has_branches = any(getattr(linear, "branches", ()) for linear in linears)
    return Form(dtype, codes, has_branches or any(other != codes for other in wanted))


def quantise_rows(x_LK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes LK in `dtype`, scale L1 float32): each row over its largest value, nearest code.

    The division is done in float32, a few rows at a time. Nothing is clamped: the largest value
    over its scale rounds to the largest code.
    """
    largest = torch.linalg.vector_norm(x_LK, float("inf"), dim=1, keepdim=True).float()
    scale = largest.clamp_min(LEAST) / LIMITS[dtype]
    codes = torch.empty_like(x_LK, dtype=dtype, memory_format=torch.contiguous_format)
    rows = max(CHUNK // x_LK.shape[1], 1)
    parts = zip(codes.split(rows), x_LK.split(rows), scale.split(rows), strict=True)
    for part, x, divisor in parts:
        divided = x / divisor  # float32, since the divisor is
        part.copy_(divided if dtype.is_floating_point else divided.round_())
    return codes, scale
