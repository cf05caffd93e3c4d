"""Outlines of the shapes and the waves of textures, as functions of coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart")
TEXTURES = ("plain", "striped", "checkered")
STRIPE_PERIOD = 0.75  # radii
CHECK_PERIOD = 1.1  # radii
SHADE = 0.55  # of the colour, in the dark parts of a texture: the hue stays


def shape_distance(u: Tensor, v: Tensor, shape_B: Tensor) -> Tensor:
    """Signed distance to the outline, negative inside, for coordinates in radii; B first."""
    result = None
    for index in shape_B.unique().tolist():
        distance = OUTLINES[SHAPES[index]](u, v)
        chosen = (shape_B == index).view(-1, *(1,) * (distance.ndim - 1))
        result = distance if result is None else torch.where(chosen, distance, result)
    assert result is not None, "there is at least one shape"
    return result


def texture_shade(u: Tensor, v: Tensor, texture_B: Tensor, phase_B2: Tensor) -> Tensor:
    """What the colour is multiplied with, for coordinates in radii; B first."""
    stripes, checks = (
        (texture_B == TEXTURES.index(name)).view(-1, *(1,) * (u.ndim - 1))
        for name in ("striped", "checkered")
    )
    if not bool((texture_B > 0).any()):
        return torch.ones_like(u)
    across, along = (phase_B2[:, axis].view(-1, *(1,) * (u.ndim - 1)) for axis in (0, 1))
    bands = soft_square(v / STRIPE_PERIOD + along)
    fields = 0.5 + 0.5 * signed_wave(u / CHECK_PERIOD + across) * signed_wave(
        v / CHECK_PERIOD + along
    )
    dark = torch.where(stripes, bands, fields) * (stripes | checks)
    return 1.0 - (1.0 - SHADE) * dark


def signed_wave(position: Tensor) -> Tensor:
    """A wave of period 1 between -1 and 1 with short soft flanks."""
    return ((position * 2 * math.pi).sin() * 8).clamp(-1, 1)


def soft_square(position: Tensor) -> Tensor:
    """The same wave between 0 and 1."""
    return 0.5 + 0.5 * signed_wave(position)


def _circle(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 0.92


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) - 0.80


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    slope = math.sqrt(3) / 2
    return torch.maximum(v - 0.6, slope * u.abs() - 0.5 * v - 0.55)


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u, v) - 0.74).abs() - 0.24


def _cross(u: Tensor, v: Tensor) -> Tensor:
    a, b = u.abs(), v.abs()
    wide, tall = torch.maximum(a - 0.96, b - 0.32), torch.maximum(a - 0.32, b - 0.96)
    return torch.minimum(wide, tall)


def _star(u: Tensor, v: Tensor) -> Tensor:
    """Five points: folded into one tenth of a turn, then the distance to one edge."""
    angle = torch.atan2(u, -v)
    sector = 2 * math.pi / 5
    folded = torch.remainder(angle + sector / 2, sector) - sector / 2
    length = torch.hypot(u, v)
    a, b = length * folded.abs().sin(), length * folded.cos()
    tip, inner = (0.0, 1.05), (0.46 * math.sin(sector / 2), 0.46 * math.cos(sector / 2))
    edge = (inner[0] - tip[0], inner[1] - tip[1])
    norm = math.hypot(*edge)
    return ((a - tip[0]) * -edge[1] + (b - tip[1]) * edge[0]) / norm


def _heart(u: Tensor, v: Tensor) -> Tensor:
    """A square on its corner with half a disc on each of its upper sides."""
    a, b = u.abs(), 0.08 - v
    lobe = torch.hypot(a - 0.396, b - 0.396) - 0.56
    square = (a + b.abs()) * math.sqrt(0.5) - 0.56
    return torch.minimum(lobe, square)


OUTLINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
}
