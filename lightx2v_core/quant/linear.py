"""Linears whose weights stay codes in memory: 8 bits here, with one scale per row or per tensor.

By default the product is computed in the dtype of the input from dequantised weights, which runs on
every device and saves memory, not time. `multiply` puts an 8-bit matmul of ops/matmul.py instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.layers import cast
from ..ops.matmul import Multiply, Row
from ..ops.rows import Rows, tokens_of


class DequantisedLinear(nn.Module):
    """What every linear of codes has: sizes, bias, a slot for LoRA branches, `dequantise`."""

    branches: tuple[Callable[[Tensor], Tensor], ...] = ()
    codes_name: str  # of the dtype or the packed format, for messages and for choosing a matmul

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight MK, multiplied in float32 and rounded once."""
        raise NotImplementedError

    def product(self, x: Tensor | Rows, bias: Tensor | None) -> Tensor:
        return F.linear(tokens_of(x), self.dequantise(x.dtype), bias)

    def forward(self, x: Tensor | Rows) -> Tensor:
        y = self.product(x, None if self.bias is None else cast(self.bias, x))
        for branch in self.branches:
            y = y + branch(tokens_of(x))
        return y


class QuantisedLinear(DequantisedLinear):
    """Drop-in for a linear: weight = codes * scale, codes MK, scale M1, one number, or None (1)."""

    weight: Tensor
    weight_scale: Tensor | None
    multiply: Multiply | None = None
    rows_dtype: torch.dtype | None = None  # of the rows that `multiply` takes ready made

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        scale_shape: tuple[int, ...] | None,
        bias: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.codes_name = str(dtype).removeprefix("torch.")
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=dtype))
        scale = None if scale_shape is None else torch.empty(scale_shape, dtype=torch.float32)
        self.register_buffer("weight_scale", scale)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        if self.weight_scale is None:
            return self.weight.to(dtype)
        return (self.weight.float() * self._scale(self.weight_scale)).to(dtype)

    @staticmethod
    def _scale(stored: Tensor) -> Tensor:
        """[M] or [M, 1] is per row: M1; any form of a single number is per tensor: 11."""
        return stored.reshape(-1, 1)

    def use(self, row: Row) -> None:
        """Multiply by `row` from now on."""
        self.multiply, self.rows_dtype = row.multiply, row.rows_dtype

    def product(self, x: Tensor | Rows, bias: Tensor | None) -> Tensor:
        if self.multiply is None:
            return super().product(x, bias)
        stored = self.weight_scale
        scale = torch.ones((1, 1), device=x.device) if stored is None else self._scale(stored)
        flat = x.reshape(-1, self.in_features) if isinstance(x, Tensor) else x
        y_LM = self.multiply(flat, self.weight, scale, bias)
        return y_LM.unflatten(0, x.shape[:-1])


def holds_codes(model: nn.Module) -> bool:
    """Whether any linear is quantised, by its file or while it was loaded."""
    return any(isinstance(module, DequantisedLinear) for module in model.modules())
