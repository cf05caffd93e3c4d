"""Paired bootstrap: what the draw of prompts leaves uncertain in a difference between two samplers.

Percentile intervals, Efron 1979, https://doi.org/10.1214/aos/1176344552.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 90_001


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the bounds of its interval at LEVEL."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        return Interval(factor * self.value, factor * self.low, factor * self.high)

    def told(self, sign: str = "", digits: int = 1) -> str:
        """Such as "77.2 [75.4, 79.0]"; with the sign "+" for differences."""
        spec = f"{sign}.{digits}f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def mean_interval(values_PS: Tensor) -> Interval:
    """Of the mean over P prompts of S seeds each. Prompts are resampled, with all their seeds."""
    per_prompt_P = values_PS.double().mean(dim=1).cpu()
    count = len(per_prompt_P)
    rng = Generator().manual_seed(SEED)
    means = torch.cat(
        [
            per_prompt_P[torch.randint(count, (RESAMPLES // 10, count), generator=rng)].mean(dim=1)
            for _ in range(10)
        ]
    )
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(means, torch.tensor((tail, 1 - tail), dtype=torch.float64)).tolist()
    return Interval(float(per_prompt_P.mean()), low, high)


def paired_interval(values_PS: Tensor, others_PS: Tensor) -> Interval:
    """Of the mean difference between two samplers on the same prompts and noise."""
    if values_PS.shape != others_PS.shape:
        shapes = f"{tuple(values_PS.shape)} and {tuple(others_PS.shape)}"
        raise ValueError(f"rows of {shapes} prompts and seeds cannot be paired")
    return mean_interval(values_PS - others_PS)
