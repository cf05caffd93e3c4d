"""Values that travel between layers. Frozen; no weights, no devices, no I/O.

Axes: B batch, C channels, T latent frames, F pixel frames, H W rows and columns, L video tokens,
S text or image tokens, E model dim, N heads, D head dim, K in_features, M out_features,
R LoRA rank.

*Frames* are pixels in time, *latent frames* are not. *Sigma* is noise in [0, 1]; *timestep* is
1000 * sigma and exists only inside ``wan/``. *Velocity* is the model output, *denoised* the clean
estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from .errors import RequestError

SPATIAL_STEP = 16  # pixels: eight by the VAE, two by the patch
MAX_SIDE = 8192
MAX_FRAMES = 2001


@dataclass(frozen=True, slots=True)
class VideoSize:
    """Pixel size of one clip, for the VAE that halves space three times and time twice."""

    width: int
    height: int
    frames: int

    def check(self) -> None:
        """Raise RequestError unless the transformer and the VAE can both hold this size."""
        snapped = self.snapped()
        if (self.width, self.height) != (snapped.width, snapped.height):
            raise RequestError(
                f"{self.width}x{self.height} is not divisible by {SPATIAL_STEP}; "
                f"use {snapped.width}x{snapped.height}"
            )
        if self.frames != snapped.frames:
            raise RequestError(f"{self.frames} frames is not 4*n + 1; use {snapped.frames}")

    def snapped(self) -> VideoSize:
        """The nearest size that passes `check`, sides and frames rounded to the closest."""

        def side(pixels: int) -> int:
            nearest = (pixels + SPATIAL_STEP // 2) // SPATIAL_STEP * SPATIAL_STEP
            return min(max(nearest, SPATIAL_STEP), MAX_SIDE)

        frames = (max(self.frames, 1) + 1) // 4 * 4 + 1
        return VideoSize(side(self.width), side(self.height), min(frames, MAX_FRAMES))

    def latent_shape(self, channels: int = 16) -> tuple[int, int, int, int, int]:
        """B C T H W of the latent that decodes to this clip."""
        return (1, channels, (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8)


@dataclass(frozen=True, slots=True)
class SamplerPlan:
    """Everything a sampling run follows, decided before it starts."""

    sigmas: tuple[float, ...]  # one more than steps; the last is 0
    solver: str = "euler"
    # per step: 0 high noise, 1 low noise, 2 the model that is not distilled; empty: one model
    experts: tuple[int, ...] = ()
    cfg: float = 1.0  # the largest of all steps
    rule: str = ""  # where schedule and split come from, in words
    cfgs: tuple[float, ...] = ()  # per step, where they differ
    warnings: tuple[str, ...] = ()  # what lies outside of what the model was trained for

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise RequestError("a plan needs at least one step; give two sigmas or more")
        if any(to >= sigma for sigma, to in pairwise(self.sigmas)) or self.sigmas[-1] < 0:
            raise RequestError(f"sigmas must fall towards 0; found {list(self.sigmas)}")
        if self.experts and len(self.experts) != self.steps:
            raise RequestError(f"{len(self.experts)} experts given for {self.steps} steps")
        if self.cfgs and len(self.cfgs) != self.steps:
            raise RequestError(f"{len(self.cfgs)} CFG values given for {self.steps} steps")

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def expert_at(self, step: int) -> int:
        return self.experts[step] if self.experts else 0

    def cfg_at(self, step: int) -> float:
        return self.cfgs[step] if self.cfgs else self.cfg

    def stages(self) -> list[tuple[int, range]]:
        """Runs of consecutive steps by one expert: (expert, steps)."""
        runs: list[tuple[int, range]] = []
        for step in range(self.steps):
            expert = self.expert_at(step)
            if runs and runs[-1][0] == expert:
                runs[-1] = (expert, range(runs[-1][1].start, step + 1))
            else:
                runs.append((expert, range(step, step + 1)))
        return runs


@dataclass(frozen=True, slots=True, eq=False)
class StepEvent:
    """What a progress callback learns after each step."""

    step: int  # from 1
    num_steps: int
    sigma: float
    denoised_BCTHW: Tensor
    x_BCTHW: Tensor
