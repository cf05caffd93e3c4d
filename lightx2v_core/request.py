"""What one generation is asked and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .conditioning import Fit, fit_image
from .datatypes import SamplerPlan, VideoSize
from .presets import Overrides

OnProgress = Callable[[str, int, int], None]  # stage, done, total


def silent(stage: str, done: int, total: int) -> None:
    """Default progress callback."""


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """What to make. `image` and `last_image` are C H W in [-1, 1], of any size, which `fit` brings
    to that of the video; F C H W are several first and last frames. `size_fit` crop or pad takes
    any size and hands over exactly that; None refuses what the model cannot make. `strict` makes
    an error of a warning."""

    prompt: str
    negative_prompt: str = ""
    image: Tensor | None = None
    last_image: Tensor | None = None
    size: VideoSize | None = None
    seed: int = 0
    overrides: Overrides = Overrides()
    fit: Fit = fit_image
    size_fit: str | None = None
    motion: float = 1.0
    strict: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """Frames F H W C uint8, the plan they were made by, and seconds for each stage."""

    frames: Tensor
    plan: SamplerPlan
    size: VideoSize
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    memory: tuple[str, ...] = ()  # for each placing of an expert, where its weights were
