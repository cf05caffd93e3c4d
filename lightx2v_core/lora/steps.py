"""LoRA strengths: one number, or one for each step; and what changes between steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import RequestError
from .branches import Branch, Level

Strengths = float | Sequence[float]

_SLOT = "lora_steps"  # in the model's __dict__: neither module nor parameter


def read_strengths(text: str) -> float | tuple[float, ...]:
    """ "0.8", or "1, 1, 0.6, 0" with one number for each step. Raises RequestError."""
    try:
        numbers = tuple(float(part) for part in text.replace(";", ",").split(","))
    except ValueError as error:
        raise RequestError(
            f"LoRA strengths {text!r} are not numbers with commas between them; "
            "use one number, or one for each step, such as 1,1,0.6,0"
        ) from error
    if not all(map(math.isfinite, numbers)):
        raise RequestError(f"LoRA strengths {text!r} are not all finite; use numbers such as 1,0.6")
    return numbers[0] if len(numbers) == 1 else numbers


def describe_strengths(strengths: Strengths) -> str:
    """1, or: by step 1, 1, 0.6, 0."""
    if isinstance(strengths, (int, float)):
        return f"{strengths:g}"
    return "by step " + ", ".join(f"{strength:g}" for strength in strengths)


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """A tensor that holds `base` plus its LoRA differences. The tensor is ours, never a file's."""

    owner: nn.Module
    leaf: str
    base: Tensor
    terms: tuple[Branch, ...]

    @torch.no_grad()
    def total(self, device: torch.device | str | None = None) -> Tensor:
        """Added in float32 on `device`, rounded once to the dtype of `base`."""
        total = self.base.detach().to(device or self.base.device).float()
        for term in self.terms:
            if gain := term.gain_now:
                added = term.difference().to(total.device).reshape(total.shape)
                total = total + gain * added
        return total.to(self.base.dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the total of this step into the tensor, wherever it is."""
        held = getattr(self.owner, self.leaf)
        held.data.copy_(self.total(held.device))


@dataclass(frozen=True, slots=True, eq=False)
class StepLoras:
    """What follows the steps of a run. Empty for LoRAs of one strength."""

    levels: tuple[Level, ...] = ()
    sums: tuple[Sum, ...] = ()

    def check(self, steps: int) -> None:
        for level in self.levels:
            level.check(steps)

    def follow(self, step: int, steps: int) -> None:
        """Call before each forward of a run; `step` counts from 0 over both experts."""
        for level in self.levels:
            level.follow(step, steps)
        for changing in self.sums:
            changing.refresh()


def keep_steps(model: nn.Module, branches: Iterable[Branch] = (), sums: Iterable[Sum] = ()) -> None:
    """Remember on `model` which of these change between steps; nothing for an empty call."""
    changing = [s for s in sums if any(term.level is not None for term in s.terms)]
    terms = [*branches, *(term for s in changing for term in s.terms)]
    levels = {id(term.level): term.level for term in terms if term.level is not None}
    model.__dict__[_SLOT] = StepLoras(tuple(levels.values()), tuple(changing))


def steps_of(model: nn.Module) -> StepLoras:
    return model.__dict__.get(_SLOT, StepLoras())
