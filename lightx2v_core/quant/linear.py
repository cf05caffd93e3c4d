"""Linears whose weights stay 8-bit codes in memory: fp8 and int8, one scale per row or per tensor.

The product is computed in the dtype of the input from dequantised weights, so it runs on every
device; only memory is saved, not time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.layers import cast


class QuantisedLinear(nn.Module):
    """Drop-in for a linear: weight = codes * scale, codes MK, scale M1, one number, or None (1)."""

    branches: tuple[Callable[[Tensor], Tensor], ...] = ()
    weight: Tensor
    weight_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        scale_shape: tuple[int, ...] | None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=dtype))
        scale = None if scale_shape is None else torch.empty(scale_shape, dtype=torch.float32)
        self.register_buffer("weight_scale", scale)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight MK, multiplied in float32 and rounded once."""
        if self.weight_scale is None:
            return self.weight.to(dtype)
        scale = self.weight_scale
        # [M] or [M, 1] is per row; any form of a single number is per tensor.
        scale = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(1, 1)
        return (self.weight.float() * scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else cast(self.bias, x)
        y = F.linear(x, self.dequantise(x.dtype), bias)
        for branch in self.branches:
            y = y + branch(x)
        return y
