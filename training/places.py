"""Where objects start, so that their whole paths lie inside the picture.

Axes besides those of the core: O objects, N tries.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 128.0  # side of the world
TRAVEL_FRAMES = 17  # a clip of any length covers the distance of this many frames
EDGE = 2.0  # units between an object and the edge of the picture
GAP = 4.0  # units between two objects that stay apart
TRIES = 16
MEETING = (7.5, 8.5)  # frames, when two objects that pass are nearest
MISS = 0.25  # of the smaller radius, by which their centres may miss each other
FREE_FRAMES = 2  # at both ends of a clip, in which passing objects do not touch


def place_apart(step_BO2: Tensor, radius_BO: Tensor, chance_NBO2: Tensor) -> tuple[Tensor, Tensor]:
    """Starts of two paths that never touch: (start_BO2, whether some try had them)."""
    start = place_within(step_BO2, radius_BO, chance_NBO2)  # N B O 2
    gap = _distances(start, step_BO2).amin(dim=-1)
    return _first(start, gap > radius_BO.sum(dim=1) + GAP)


def place_within(step_BO2: Tensor, radius_BO: Tensor, chance: Tensor) -> Tensor:
    """Starts of paths inside the picture, as `chance`, ... B O 2 from 0 to 1, has it."""
    low, high = _room(step_BO2, radius_BO)
    return torch.where(low < high, low + (high - low) * chance, (low + high) / 2)


def place_crossing(
    step_BO2: Tensor, radius_BO: Tensor, chances: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Starts of two paths that meet in the middle of the clip: (start_BO2, whether they can).

    `chances` are when they meet, N B, by how much they miss, N B 2, and where they meet, N B 2.
    """
    when, by, where = chances[0][..., None, None], chances[1][:, :, None], chances[2][:, :, None]
    low, high = _room(step_BO2, radius_BO)
    time = MEETING[0] + (MEETING[1] - MEETING[0]) * when
    miss = MISS * radius_BO.amin(dim=1)[:, None, None] * (2 * by - 1)
    way = step_BO2 * time + torch.cat((torch.zeros_like(miss), -miss), dim=2)  # N B O 2
    # The meeting point that suits both starts.
    low, high = (low + way).amax(dim=2, keepdim=True), (high + way).amin(dim=2, keepdim=True)
    start = low + (high - low) * where - way
    distance = _distances(start, step_BO2)
    ends = torch.cat((distance[..., :FREE_FRAMES], distance[..., -FREE_FRAMES:]), dim=-1)
    is_free = ends.amin(dim=-1) > radius_BO.sum(dim=1) + 1.0
    return _first(start, is_free & (low <= high).all(dim=-1)[..., 0])


def _room(step_BO2: Tensor, radius_BO: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest start from which the whole path stays inside the picture."""
    path = step_BO2 * (TRAVEL_FRAMES - 1)
    margin = radius_BO[..., None] + EDGE
    return margin - path.clamp_max(0), UNIT - margin - path.clamp_min(0)


def _distances(start_NBO2: Tensor, step_BO2: Tensor) -> Tensor:
    """Between the two centres in every frame, N B F."""
    times = torch.arange(TRAVEL_FRAMES).view(-1, 1)
    gap = (start_NBO2[:, :, 0] - start_NBO2[:, :, 1])[:, :, None]
    drift = (step_BO2[:, 0] - step_BO2[:, 1])[:, None] * times
    return (gap + drift).norm(dim=-1)


def _first(start_NBO2: Tensor, is_good_NB: Tensor) -> tuple[Tensor, Tensor]:
    best_B = is_good_NB.float().argmax(dim=0)
    rows = torch.arange(start_NBO2.shape[1])
    return start_NBO2[best_B, rows], is_good_NB[best_B, rows]
