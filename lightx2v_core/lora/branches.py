"""LoRA branches beside any linear, quantised or not. Base weights and names stay untouched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, RequestError, preview
from ..ops.layers import cast


class Level:
    """The strength of one LoRA where it changes from step to step; all its branches share it."""

    __slots__ = ("lora", "strengths", "value")

    def __init__(self, lora: str, strengths: Sequence[float]) -> None:
        self.lora, self.strengths = lora, tuple(strengths)
        self.value = self.strengths[0]

    def check(self, steps: int) -> None:
        """Raises RequestError unless there is one strength for each of `steps`."""
        if len(self.strengths) != steps:
            raise RequestError(
                f"{self.lora} has {len(self.strengths)} strengths and the run has {steps} steps; "
                "give one for each step (of both experts together), or a single one for all"
            )

    def follow(self, step: int, steps: int) -> None:
        """Take the strength of `step`, counted from 0."""
        self.check(steps)
        self.value = self.strengths[step]


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """gain * up(down(x)), down RK, up MR. Without `up`, `down` is the difference itself, of a
    linear's weight MK or of any other tensor. A `level` multiplies the gain and may change.
    """

    down_RK: Tensor
    up_MR: Tensor | None
    gain: float
    level: Level | None = None

    def __call__(self, x: Tensor) -> Tensor:
        gain = self.gain_now
        if gain == 0.0:
            return x.new_full((), -0.0)  # y + -0.0 is y, bit for bit, also where y is -0.0
        y = F.linear(x, cast(self.down_RK, x))
        return gain * (y if self.up_MR is None else F.linear(y, cast(self.up_MR, x)))

    @property
    def gain_now(self) -> float:
        return self.gain if self.level is None else self.gain * self.level.value

    @property
    def is_idle(self) -> bool:
        """Whether it adds nothing, at any step."""
        return self.gain == 0.0 or (self.level is not None and not any(self.level.strengths))

    def difference(self) -> Tensor:
        """What is added at gain 1, in float32."""
        down = self.down_RK.float()
        return down if self.up_MR is None else self.up_MR.float() @ down

    def to(self, device: torch.device | str) -> Branch:
        up = None if self.up_MR is None else self.up_MR.to(device)
        return replace(self, down_RK=self.down_RK.to(device), up_MR=up)

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
        linear.branches = tuple(b for b in branches.get(name, ()) if not b.is_idle)


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name; of packed weights the shape that they stand for."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            linear: Any = module
            shapes[f"{name}.weight"] = (linear.out_features, linear.in_features)
    return shapes


def branch_bytes(model: nn.Module) -> int:
    """Bytes held by the branches of all linears."""
    return sum(b.nbytes for module in model.modules() for b in getattr(module, "branches", ()))
