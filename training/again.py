"""Other clips of the same captions: how much the world itself varies where words leave it open."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import torch
from torch import Generator, Tensor

from .places import place_within
from .world import Scenes, sample_alike, within
from .worlds import COLORS, DIRECTIONS, PLAIN, SPEEDS, TONES, World


def draw_again(scenes: Scenes, rng: Generator, world: World = PLAIN) -> Scenes:
    """One other clip for each of `scenes`, which are of `world`; on the CPU."""
    scenes = scenes.to("cpu")
    if world.is_first:
        return _draw_as_first(scenes, rng, world)
    drawn = [sample_alike(scenes[row : row + 1], 1, rng, world) for row in range(len(scenes))]
    return reduce(Scenes.join, drawn)


def _draw_as_first(scenes: Scenes, rng: Generator, world: World) -> Scenes:
    """In the order that published figures rest on. Two objects keep their sizes and paths, since
    they must not touch."""
    count = len(scenes)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng)

    radius_BO = within(world.radii, scenes.size_BO, uniform(count, 2))
    pace_BO = within(tuple(SPEEDS.values()), scenes.speed_BO, uniform(count, 2))
    step_BO2 = torch.tensor(list(DIRECTIONS.values()))[scenes.direction_BO] * pace_BO[..., None]
    start_BO2 = place_within(step_BO2, radius_BO, uniform(count, 2, 2))
    is_one = (scenes.count_B == 1)[:, None]
    tint_BO3 = 0.03 * (2 * uniform(count, 2, 3) - 1)
    return replace(
        scenes,
        radius_BO=torch.where(is_one, radius_BO, scenes.radius_BO),
        step_BO2=torch.where(is_one[..., None], step_BO2, scenes.step_BO2),
        start_BO2=torch.where(is_one[..., None], start_BO2, scenes.start_BO2),
        turn_BO=0.2 * (2 * uniform(count, 2) - 1),
        rgb_BO3=(torch.tensor(list(COLORS.values()))[scenes.color_BO] + tint_BO3).clamp(0, 1),
        value_B=within(tuple(TONES.values()), scenes.tone_B, uniform(count)),
        contrast_B=0.08 + 0.10 * uniform(count),
        phase_B2=uniform(count, 2),
    )
