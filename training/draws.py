"""What chance decides about clips: their words, and all that their numbers are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .outlines import TEXTURES
from .places import TRIES
from .worlds import COLORS, DIRECTIONS, PATTERNS, SIZES, SPEEDS, TONES, World

FIRST_TRIES = 8  # of places for a pair, in the first release


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """What can be said about clips, before anything has a place. Indices, as in `Scenes`."""

    count_B: Tensor
    order_B: Tensor
    shape_BO: Tensor
    color_BO: Tensor
    texture_BO: Tensor
    direction_BO: Tensor
    speed_BO: Tensor
    size_BO: Tensor
    tone_B: Tensor
    pattern_B: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Chances:
    """All that numbers are made of, drawn from 0 to 1. N tries of places; without `crossing`
    no pair can cross."""

    radius_BO: Tensor
    speed_BO: Tensor
    apart_NBO2: Tensor
    crossing: tuple[Tensor, Tensor, Tensor] | None  # of `place_crossing`
    tint_BO3: Tensor
    turn_BO: Tensor
    grain_BO2: Tensor
    value_B: Tensor
    contrast_B: Tensor
    phase_B2: Tensor


def draw(count: int, rng: Generator, world: World) -> tuple[Words, Chances]:
    if world.is_first:
        return _draw_as_first(count, rng, world)
    return _draw_words(count, rng, world), draw_chances(count, rng)


def _draw_as_first(count: int, rng: Generator, world: World) -> tuple[Words, Chances]:
    """Words and numbers in turns, and nothing more: the order that published figures rest on."""

    def pick(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape or (count,), generator=rng)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng)

    is_pair = uniform(count) < world.pair_share
    color = pick(len(COLORS))
    other = (color + 1 + pick(len(COLORS) - 1)) % len(COLORS)
    is_diagonal = uniform(count, 2) < world.diagonal_share
    direction_BO = pick(4, count, 2) + 4 * is_diagonal
    speed_BO, size_BO = pick(len(SPEEDS), count, 2), pick(len(SIZES), count, 2)
    radius_BO, pace_BO = uniform(count, 2), uniform(count, 2)
    apart = torch.stack([uniform(count, 2, 2) for _ in range(FIRST_TRIES)])
    tint_BO3, tone_B = uniform(count, 2, 3), pick(len(TONES))
    shape_BO = pick(world.shapes, count, 2)
    has_any = uniform(count) < world.pattern_share
    any_pattern, common = pick(len(PATTERNS)), pick(world.common_patterns)
    words = Words(
        count_B=1 + is_pair.long(),
        order_B=torch.zeros_like(color),
        shape_BO=shape_BO,
        color_BO=torch.stack((color, other), dim=1),
        texture_BO=torch.zeros_like(shape_BO),
        direction_BO=direction_BO,
        speed_BO=speed_BO,
        size_BO=torch.where(is_pair[:, None], size_BO.clamp_max(1), size_BO),
        tone_B=tone_B,
        pattern_B=torch.where(has_any, any_pattern, common),
    )
    turn_BO, value_B = uniform(count, 2), uniform(count)
    contrast_B, phase_B2 = uniform(count), uniform(count, 2)
    numbers = (tint_BO3, turn_BO, torch.zeros(count, 2, 2), value_B, contrast_B, phase_B2)
    return words, Chances(radius_BO, pace_BO, apart, None, *numbers)


def _draw_words(count: int, rng: Generator, world: World) -> Words:
    def pick(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape or (count,), generator=rng)

    def chance(share: float, *shape: int) -> Tensor:
        return torch.rand(shape or (count,), generator=rng) < share

    is_pair = chance(world.pair_share)
    is_crossing = is_pair & chance(world.crossing_share)
    color = pick(len(COLORS))
    other = (color + 1 + pick(len(COLORS) - 1)) % len(COLORS)
    speed_BO, size_BO = pick(len(SPEEDS), count, 2), pick(len(SIZES), count, 2)
    # Two need room; two that pass must be away from each other at both ends of the clip.
    size_BO = torch.where(is_pair[:, None], size_BO.clamp_max(1), size_BO)
    speed_BO = torch.where(is_crossing[:, None], speed_BO.clamp_min(1), speed_BO)
    direction_BO = pick(4, count, 2) + 4 * chance(world.diagonal_share, count, 2)
    against = torch.multinomial(_against()[direction_BO[:, 0]], 1, generator=rng)[:, 0]
    direction_BO[:, 1] = torch.where(is_crossing, against, direction_BO[:, 1])
    is_textured = chance(world.texture_share, count, 2) & (size_BO > 0)
    texture_BO = (1 + pick(len(TEXTURES) - 1, count, 2)) * is_textured
    any_pattern, common = pick(len(PATTERNS)), pick(world.common_patterns)
    return Words(
        count_B=1 + is_pair.long(),
        order_B=(1 + pick(2)) * is_crossing,
        shape_BO=pick(world.shapes, count, 2),
        color_BO=torch.stack((color, other), dim=1),
        texture_BO=texture_BO,
        direction_BO=direction_BO,
        speed_BO=speed_BO,
        size_BO=size_BO,
        tone_B=pick(len(TONES)),
        pattern_B=torch.where(chance(world.pattern_share), any_pattern, common),
    )


def _against() -> Tensor:
    """How often each direction (column) is that of the second object when the first has the row's
    and they pass: towards it, or across."""
    ways = torch.tensor(list(DIRECTIONS.values()))
    return (0.1 - ways @ ways.T).clamp_min(0)


def draw_chances(count: int, rng: Generator) -> Chances:
    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng)

    return Chances(
        radius_BO=uniform(count, 2),
        speed_BO=uniform(count, 2),
        apart_NBO2=uniform(TRIES, count, 2, 2),
        crossing=(uniform(TRIES, count), uniform(TRIES, count, 2), uniform(TRIES, count, 2)),
        tint_BO3=uniform(count, 2, 3),
        turn_BO=uniform(count, 2),
        grain_BO2=uniform(count, 2, 2),
        value_B=uniform(count),
        contrast_B=uniform(count),
        phase_B2=uniform(count, 2),
    )
