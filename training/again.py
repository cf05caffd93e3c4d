"""Other clips of the same captions: how much the world itself varies where words leave it open."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Generator, Tensor

from .world import COLORS, DIRECTIONS, SIZES, SPEEDS, TONES, TRAVEL_FRAMES, UNIT, Scenes

MARGIN = 2.0  # units between an object and the edge of the picture


def draw_again(scenes: Scenes, rng: Generator) -> Scenes:
    """On the CPU. Two objects keep their sizes and paths, since they must not touch."""
    scenes = scenes.to("cpu")
    count = len(scenes)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng)

    def within(table: dict[str, tuple[float, float]], index: Tensor) -> Tensor:
        low, high = torch.tensor(list(table.values())).unbind(1)
        return low[index] + (high - low)[index] * uniform(*index.shape)

    radius_BO = within(SIZES, scenes.size_BO)
    speed_BO1 = within(SPEEDS, scenes.speed_BO)[..., None]
    step_BO2 = torch.tensor(list(DIRECTIONS.values()))[scenes.direction_BO] * speed_BO1
    path, margin = step_BO2 * (TRAVEL_FRAMES - 1), radius_BO[..., None] + MARGIN
    low, high = margin - path.clamp_max(0), UNIT - margin - path.clamp_min(0)
    start_BO2 = torch.where(low < high, low + (high - low) * uniform(*low.shape), (low + high) / 2)
    is_one = (scenes.count_B == 1)[:, None]
    tint_BO3 = 0.03 * (2 * uniform(count, 2, 3) - 1)
    return replace(
        scenes,
        radius_BO=torch.where(is_one, radius_BO, scenes.radius_BO),
        step_BO2=torch.where(is_one[..., None], step_BO2, scenes.step_BO2),
        start_BO2=torch.where(is_one[..., None], start_BO2, scenes.start_BO2),
        turn_BO=0.2 * (2 * uniform(count, 2) - 1),
        rgb_BO3=(torch.tensor(list(COLORS.values()))[scenes.color_BO] + tint_BO3).clamp(0, 1),
        value_B=within(TONES, scenes.tone_B),
        contrast_B=0.08 + 0.10 * uniform(count),
        phase_B2=uniform(count, 2),
    )
