"""LoRA branches beside any linear, quantised or not. Base weights and names stay untouched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, preview
from ..ops.layers import cast


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """gain * up(down(x)), down RK, up MR. Without `up`, `down` is a full weight difference MK."""

    down_RK: Tensor
    up_MR: Tensor | None
    gain: float

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x, cast(self.down_RK, x))
        return self.gain * (y if self.up_MR is None else F.linear(y, cast(self.up_MR, x)))

    def to(self, device: torch.device | str) -> Branch:
        up = None if self.up_MR is None else self.up_MR.to(device)
        return Branch(self.down_RK.to(device), up, self.gain)

    @property
    def nbytes(self) -> int:
        return self.down_RK.nbytes + (0 if self.up_MR is None else self.up_MR.nbytes)


def set_lora(model: nn.Module, branches: Mapping[str, tuple[Branch, ...]]) -> None:
    """Replace the whole set at once; an empty mapping removes it. All or nothing.

    `branches` maps module names to what is added there; a branch of gain 0 is left out, so that
    strength 0 is bit-identical to no LoRA.
    """
    linears: dict[str, Any] = {
        name: module for name, module in model.named_modules() if hasattr(module, "branches")
    }
    if unknown := branches.keys() - linears.keys():
        raise CheckpointError(
            f"{len(unknown)} of {len(branches)} LoRA layers do not exist in this model "
            f"({preview(unknown)}); it was trained for another Wan variant"
        )
    for name, linear in linears.items():
        linear.branches = tuple(b for b in branches.get(name, ()) if b.gain != 0.0)


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name; of packed weights the shape that they stand for."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if hasattr(module, "branches"):
            linear: Any = module
            shapes[f"{name}.weight"] = (linear.out_features, linear.in_features)
    return shapes


def branch_bytes(model: nn.Module) -> int:
    """Bytes held by the branches of all linears."""
    return sum(b.nbytes for module in model.modules() for b in getattr(module, "branches", ()))
