"""A world of coloured shapes that glide over a neutral background, rendered in batches.

Everything a caption or the judge may ask about is a tensor of `Scenes`. Lengths are in units of a
128-pixel square whatever the size of the picture. Axes besides those of the core: O objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor

UNIT = 128.0  # side of the world
TRAVEL_FRAMES = 17  # a clip of any length covers the distance of this many frames

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart")
COLORS = {
    "red": (0.92, 0.13, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.14, 0.72, 0.24),
    "cyan": (0.10, 0.80, 0.86),
    "blue": (0.15, 0.32, 0.95),
    "purple": (0.55, 0.18, 0.84),
    "pink": (1.00, 0.42, 0.74),
}
# Screen coordinates: y grows downwards. The first four are the cardinal ones.
DIRECTIONS = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up right": (math.sqrt(0.5), -math.sqrt(0.5)),
    "up left": (-math.sqrt(0.5), -math.sqrt(0.5)),
    "down right": (math.sqrt(0.5), math.sqrt(0.5)),
    "down left": (-math.sqrt(0.5), math.sqrt(0.5)),
}
SPEEDS = {"slow": (1.2, 1.8), "steady": (2.1, 2.8), "fast": (3.3, 4.2)}  # units per frame
SIZES = {"small": (10.5, 12.5), "medium": (14.0, 17.0), "large": (19.0, 23.0)}  # radius
TONES = {"dark": (0.03, 0.18), "grey": (0.38, 0.50), "light": (0.78, 0.93)}
PATTERNS = ("plain", "gradient", "striped", "checkered")
PAIR_SHARE = 0.0  # of clips with two objects
PATTERN_SHARE = 0.0  # of clips with a striped or checkered background
DIAGONAL_SHARE = 0.2
COMMON_SHAPES = 4  # the first of SHAPES; the world of the shipped models knows no others
COMMON_PATTERNS = 2  # likewise of PATTERNS
PAIR_TRIES = 8


@dataclass(frozen=True, slots=True, eq=False)
class Scenes:
    """A batch of clips, as attributes. Row i of every tensor belongs to clip i."""

    count_B: Tensor  # 1 or 2 objects
    shape_BO: Tensor
    color_BO: Tensor
    direction_BO: Tensor
    speed_BO: Tensor
    size_BO: Tensor
    tone_B: Tensor
    pattern_B: Tensor
    start_BO2: Tensor  # centre in the first frame, x and y
    step_BO2: Tensor  # units per frame
    radius_BO: Tensor
    turn_BO: Tensor  # radians
    rgb_BO3: Tensor
    value_B: Tensor  # brightness of the background
    contrast_B: Tensor
    phase_B2: Tensor

    def __len__(self) -> int:
        return self.count_B.shape[0]

    def to(self, device: torch.device | str) -> Scenes:
        return self._map(lambda tensor: tensor.to(device))

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return self._map(lambda tensor: tensor[index])

    def _map(self, function: Callable[[Tensor], Tensor]) -> Scenes:
        return Scenes(**{field.name: function(getattr(self, field.name)) for field in fields(self)})


def sample_scenes(count: int, rng: Generator, pair_share: float = PAIR_SHARE) -> Scenes:
    """Random clips, drawn on the CPU so that a seed means the same everywhere."""

    def pick(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape or (count,), generator=rng)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng)

    def within(table: dict[str, tuple[float, float]], index: Tensor) -> Tensor:
        low, high = torch.tensor(list(table.values())).unbind(1)
        return low[index] + (high - low)[index] * uniform(*index.shape)

    is_pair = uniform(count) < pair_share
    color = pick(len(COLORS), count)
    other = (color + 1 + pick(len(COLORS) - 1, count)) % len(COLORS)
    color_BO = torch.stack((color, other), dim=1)
    is_diagonal = uniform(count, 2) < DIAGONAL_SHARE
    direction_BO = pick(4, count, 2) + 4 * is_diagonal
    speed_BO, size_BO = pick(len(SPEEDS), count, 2), pick(len(SIZES), count, 2)
    size_BO = torch.where(is_pair[:, None], size_BO.clamp_max(1), size_BO)
    radius_BO = within(SIZES, size_BO)
    step_BO2 = torch.tensor(list(DIRECTIONS.values()))[direction_BO]
    step_BO2 = step_BO2 * within(SPEEDS, speed_BO)[..., None]
    starts = [_start(step_BO2, radius_BO, uniform(count, 2, 2)) for _ in range(PAIR_TRIES)]
    start_BO2, is_clear = _first_clear(starts, step_BO2, radius_BO)
    tint_BO3 = 0.03 * (2 * uniform(count, 2, 3) - 1)
    tone_B = pick(len(TONES))
    return Scenes(
        count_B=torch.where(is_pair & is_clear, 2, 1),
        shape_BO=pick(COMMON_SHAPES, count, 2),
        color_BO=color_BO,
        direction_BO=direction_BO,
        speed_BO=speed_BO,
        size_BO=size_BO,
        tone_B=tone_B,
        pattern_B=torch.where(
            uniform(count) < PATTERN_SHARE, pick(len(PATTERNS)), pick(COMMON_PATTERNS)
        ),
        start_BO2=start_BO2,
        step_BO2=step_BO2,
        radius_BO=radius_BO,
        turn_BO=0.2 * (2 * uniform(count, 2) - 1),
        rgb_BO3=(torch.tensor(list(COLORS.values()))[color_BO] + tint_BO3).clamp(0, 1),
        value_B=within(TONES, tone_B),
        contrast_B=0.08 + 0.10 * uniform(count),
        phase_B2=uniform(count, 2),
    )


def make_scene(
    color: str, shape: str, direction: str, tone: str = "dark", pattern: str = "plain"
) -> Scenes:
    """One clip of a medium object at steady pace whose path is centred."""
    step = 2.4 * torch.tensor(DIRECTIONS[direction])
    middle = torch.tensor((UNIT / 2, UNIT / 2)) - step * (TRAVEL_FRAMES - 1) / 2
    radius, value = torch.tensor(16.0), torch.tensor(0.12 if tone == "dark" else 0.85)
    fixed: dict[str, Tensor] = {
        "count_B": torch.tensor(1),
        "shape_BO": torch.tensor(SHAPES.index(shape)),
        "color_BO": torch.tensor(list(COLORS).index(color)),
        "direction_BO": torch.tensor(list(DIRECTIONS).index(direction)),
        "speed_BO": torch.tensor(list(SPEEDS).index("steady")),
        "size_BO": torch.tensor(list(SIZES).index("medium")),
        "tone_B": torch.tensor(list(TONES).index(tone)),
        "pattern_B": torch.tensor(PATTERNS.index(pattern)),
        "start_BO2": middle,
        "step_BO2": step,
        "radius_BO": radius,
        "turn_BO": torch.tensor(0.0),
        "rgb_BO3": torch.tensor(COLORS[color]),
        "value_B": value,
        "contrast_B": torch.tensor(0.12),
        "phase_B2": torch.zeros(2),
    }
    drawn = sample_scenes(1, Generator().manual_seed(0))
    return Scenes(
        **{name: value.expand_as(getattr(drawn, name)).clone() for name, value in fixed.items()}
    )


def _start(step_BO2: Tensor, radius_BO: Tensor, uniform_BO2: Tensor) -> Tensor:
    """A centre from which the whole path stays inside the picture."""
    path = step_BO2 * (TRAVEL_FRAMES - 1)
    margin = radius_BO[..., None] + 2.0
    low, high = margin - path.clamp_max(0), UNIT - margin - path.clamp_min(0)
    return torch.where(low < high, low + (high - low) * uniform_BO2, (low + high) / 2)


def _first_clear(
    starts: list[Tensor], step_BO2: Tensor, radius_BO: Tensor
) -> tuple[Tensor, Tensor]:
    """Of several pairs of paths the first that never touch: (start, whether there is one)."""
    times = torch.arange(TRAVEL_FRAMES).view(-1, 1)
    needed_B = radius_BO.sum(dim=1) + 4.0
    stacked = torch.stack(starts)  # tries B O 2
    gap = (stacked[:, :, 0] - stacked[:, :, 1])[:, :, None]  # tries B 1 2
    drift = (step_BO2[:, 0] - step_BO2[:, 1])[:, None] * times
    is_clear = (gap + drift).norm(dim=-1).amin(dim=-1) > needed_B  # tries B
    best_B = is_clear.float().argmax(dim=0)
    rows = torch.arange(stacked.shape[1])
    return stacked[best_B, rows], is_clear[best_B, rows]


def render(
    scenes: Scenes, height: int, width: int, frames: int, pace: float | None = None
) -> Tensor:
    """Pixels BCFHW in [-1, 1] float32 on the device of `scenes`, edges anti-aliased.

    `pace` is world frames per picture frame; None lets the clip hold the whole path.
    """
    device = scenes.count_B.device
    pixel = UNIT / height
    y = (torch.arange(height, device=device) + 0.5) * pixel
    x = (torch.arange(width, device=device) + 0.5) * pixel
    canvas = _background(scenes, x, y)  # B 1 1 H W
    canvas = canvas[:, :, None].expand(-1, 3, frames, -1, -1)
    pace = (TRAVEL_FRAMES - 1) / (frames - 1) if pace is None else pace
    times = torch.arange(frames, device=device) * pace
    most = int(scenes.count_B.max())
    for index in reversed(range(most)):
        center = scenes.start_BO2[:, index, None] + scenes.step_BO2[:, index, None] * times[:, None]
        dx = x - center[:, :, 0, None, None]  # B F 1 W
        dy = y[:, None] - center[:, :, 1, None, None]  # B F H 1
        turn, radius = (t[:, index, None, None, None] for t in (scenes.turn_BO, scenes.radius_BO))
        u = dx * turn.cos() + dy * turn.sin()
        v = dy * turn.cos() - dx * turn.sin()
        distance = shape_distance(u / radius, v / radius, scenes.shape_BO[:, index]) * radius
        alpha = (0.5 - distance / pixel).clamp(0, 1)
        alpha = alpha * (scenes.count_B > index).view(-1, 1, 1, 1)
        # A little light from above.
        light = 1.0 - 0.10 * (v / radius).clamp(-1, 1)
        color = scenes.rgb_BO3[:, index, :, None, None, None] * light[:, None]
        canvas = canvas + alpha[:, None] * (color.clamp(0, 1) - canvas)
    return (canvas * 2 - 1).contiguous()


def _background(scenes: Scenes, x: Tensor, y: Tensor) -> Tensor:
    """Neutral grey, B 1 H W: its hue never mixes into the objects."""
    phase_x, phase_y = (scenes.phase_B2[:, axis].view(-1, 1, 1) for axis in (0, 1))
    contrast, value = scenes.contrast_B.view(-1, 1, 1), scenes.value_B.view(-1, 1, 1)
    is_light = (scenes.tone_B == list(TONES).index("light")).view(-1, 1, 1)
    sign = 1.0 - 2.0 * is_light  # patterns darken a light background and lighten the others
    u, v = x[None, None, :], y[None, :, None]
    slope = (phase_x - 0.5) * 4 * math.pi
    ramp = 0.5 + 0.35 * (slope.cos() * (u / UNIT - 0.5) + slope.sin() * (v / UNIT - 0.5)) * 2
    lean = torch.where(phase_y > 0.5, 1.0, -1.0)
    stripes = _soft_square((u + lean * v) / 24.0 + phase_x)
    checks = 0.5 + 0.5 * _signed(u / 32.0 + phase_x) * _signed(v / 32.0 + phase_y)
    flat, gradient = torch.zeros_like(stripes), (1.8 * ramp).expand_as(stripes)
    patterns = [flat, gradient, stripes, checks]  # in the order of PATTERNS
    picked = torch.stack(patterns, dim=1)[
        torch.arange(len(scenes), device=x.device), scenes.pattern_B
    ]
    return (value + sign * contrast * picked)[:, None].clamp(0, 1)


def _signed(position: Tensor) -> Tensor:
    """A wave of period 1 between -1 and 1 with short soft flanks."""
    return ((position * 2 * math.pi).sin() * 8).clamp(-1, 1)


def _soft_square(position: Tensor) -> Tensor:
    return 0.5 + 0.5 * _signed(position)


def shape_distance(u: Tensor, v: Tensor, shape_B: Tensor) -> Tensor:
    """Signed distance to the outline, negative inside, for coordinates in radii; B first."""
    result = None
    for index, name in enumerate(SHAPES):
        distance = OUTLINES[name](u, v)
        chosen = (shape_B == index).view(-1, *(1,) * (distance.ndim - 1))
        result = distance if result is None else torch.where(chosen, distance, result)
    assert result is not None, "there is at least one shape"
    return result


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
