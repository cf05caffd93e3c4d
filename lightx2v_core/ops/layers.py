"""Plain PyTorch layers that compute in the dtype of their input. They know nothing of Wan."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .rows import Rows, tokens_of


def cast(weight: Tensor, like: Tensor | Rows) -> Tensor:
    """`weight` in the dtype and on the device of `like`; the tensor itself when they agree."""
    return weight.to(device=like.device, dtype=like.dtype)


class Linear(nn.Linear):
    """nn.Linear with a slot for LoRA branches, which add to its output.

    The slot is data, not a submodule: the module tree and its keys stay the same under any LoRA.
    """

    branches: tuple[Callable[[Tensor], Tensor], ...] = ()

    def forward(self, x: Tensor | Rows) -> Tensor:
        x = tokens_of(x)
        bias = None if self.bias is None else cast(self.bias, x)
        y = F.linear(x, cast(self.weight, x), bias)
        for branch in self.branches:
            y = y + branch(x)
        return y


class Conv3d(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else cast(self.bias, x)
        return self._conv_forward(x, cast(self.weight, x), bias)


class LayerNorm(nn.LayerNorm):
    """Statistics and affine in float32, result in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        weight, bias = cast(self.weight, wide), cast(self.bias, wide)
        return F.layer_norm(wide, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """Statistics and weight in float32, result in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return F.rms_norm(wide, self.normalized_shape, cast(self.weight, wide), self.eps).to(
            x.dtype
        )
