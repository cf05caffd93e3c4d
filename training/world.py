"""A world of coloured shapes that glide over a neutral background, rendered in batches.

Everything a caption or the judge may ask about is a tensor of `Scenes`; how often each thing occurs
is a `World`. Lengths are in units of a 128-pixel square whatever the size of the picture. Axes
besides those of the core: O objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Generator, Tensor

from .outlines import SHAPES, TEXTURES, shape_distance, signed_wave, soft_square, texture_shade
from .places import TRAVEL_FRAMES, UNIT, place_apart, place_crossing

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
SIZES = ("small", "medium", "large")  # their radii are the world's
TONES = {"dark": (0.03, 0.18), "grey": (0.38, 0.50), "light": (0.78, 0.93)}
PATTERNS = ("plain", "gradient", "striped", "checkered")
# How the first of two objects passes the second.
ORDERS = ("apart", "in front", "behind")
HELD_OUT_CYCLE = 10  # one combination in so many is kept from training
Split = Literal["train", "held-out", "all"]


@dataclass(frozen=True, slots=True)
class World:
    """What there is, and how often. Shares are of clips unless said otherwise."""

    name: str
    shapes: int = len(SHAPES)  # the first of SHAPES
    radii: tuple[tuple[float, float], ...] = ((12.0, 13.5), (15.0, 17.5), (19.5, 23.0))
    pair_share: float = 0.4  # with two objects; a few find no room and stay single
    crossing_share: float = 0.5  # of these, one passing in front of the other
    texture_share: float = 0.3  # of medium and large objects, striped or checkered
    diagonal_share: float = 0.35  # of objects
    common_patterns: int = 2  # the first of PATTERNS
    pattern_share: float = 0.4  # with any of PATTERNS
    slip_share: float = 0.0  # of captions' colours, shapes and directions that are told wrong
    holds_out: bool = True  # whether some combinations are kept from training


WIDE = World("wide")
# What the first released family was trained on.
PLAIN = World(
    "plain",
    shapes=4,
    radii=((10.5, 12.5), (14.0, 17.0), (19.0, 23.0)),
    pair_share=0.0,
    crossing_share=0.0,
    texture_share=0.0,
    diagonal_share=0.2,
    pattern_share=0.0,
    slip_share=0.0,
    holds_out=False,
)
WORLDS = {world.name: world for world in (WIDE, PLAIN)}


@dataclass(frozen=True, slots=True, eq=False)
class Scenes:
    """A batch of clips, as attributes. Row i of every tensor belongs to clip i."""

    count_B: Tensor  # 1 or 2 objects
    order_B: Tensor  # index into ORDERS
    shape_BO: Tensor
    color_BO: Tensor
    texture_BO: Tensor
    direction_BO: Tensor
    speed_BO: Tensor
    size_BO: Tensor
    tone_B: Tensor
    pattern_B: Tensor
    start_BO2: Tensor  # centre in the first frame, x and y
    step_BO2: Tensor  # units per frame
    radius_BO: Tensor
    turn_BO: Tensor  # radians
    grain_BO2: Tensor  # phase of the texture
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

    def join(self, other: Scenes) -> Scenes:
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Scenes(**{name: torch.cat((mine, its)) for name, mine, its in pairs})

    def _map(self, function: Callable[[Tensor], Tensor]) -> Scenes:
        return Scenes(**{field.name: function(getattr(self, field.name)) for field in fields(self)})


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


def held_out(scenes: Scenes | Words) -> Tensor:
    """B bool: an object of the clip has a colour, shape and direction no training clip joins.

    A fixed rule: each colour and shape miss at most one direction, so that all three and their
    pairs are common in training and only the combination is new.
    """
    sum_BO = scenes.color_BO + 7 * scenes.shape_BO + 3 * scenes.direction_BO
    is_new_BO = sum_BO % HELD_OUT_CYCLE == 0
    return is_new_BO[:, 0] | (is_new_BO[:, 1] & (scenes.count_B == 2))


def sample_scenes(
    count: int, rng: Generator, world: World = WIDE, split: Split = "train"
) -> Scenes:
    """Random clips, drawn on the CPU so that a seed means the same everywhere.

    `split` chooses by `held_out`; in a world that holds nothing out "train" is all there is.
    """
    if split == "held-out" and not world.holds_out:
        raise ValueError(f"the {world.name} world holds no combination out of training")
    if split == "all" or not world.holds_out:
        return place(_draw_words(count, rng, world), rng, world)
    scenes = None
    while scenes is None or len(scenes) < count:
        drawn = place(_draw_words(max(count, 16), rng, world), rng, world)
        drawn = drawn[held_out(drawn) == (split == "held-out")]
        scenes = drawn if scenes is None else scenes.join(drawn)
    return scenes[:count]


def sample_alike(scenes: Scenes, count: int, rng: Generator, world: World) -> Scenes:
    """Clips whose caption may be that of `scenes`, one clip: everything sayable is the same, but
    for the share of colours, shapes and directions that captions tell wrong."""
    found = None
    while found is None or len(found) < count:
        words = Words(
            **{f.name: getattr(scenes, f.name).repeat_interleave(count, 0) for f in fields(Words)}
        )
        if world.slip_share > 0:
            words = _slipped(words, rng, world)
        drawn = place(words, rng, world)
        is_same = (drawn.count_B == words.count_B) & (drawn.order_B == words.order_B)
        drawn = drawn[is_same]
        found = drawn if found is None else found.join(drawn)
    return found[:count]


def _slipped(words: Words, rng: Generator, world: World) -> Words:
    limits = {"color_BO": len(COLORS), "shape_BO": world.shapes, "direction_BO": len(DIRECTIONS)}
    slipped = {}
    for name, limit in limits.items():
        said = getattr(words, name)
        is_wrong = torch.rand(said.shape, generator=rng) < world.slip_share
        slipped[name] = torch.where(is_wrong, torch.randint(limit, said.shape, generator=rng), said)
    return replace(words, **slipped)


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


def place(words: Words, rng: Generator, world: World) -> Scenes:
    """Give everything its numbers. A pair that finds no room loses its second object."""
    count = len(words.count_B)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng)

    def within(ranges: list[tuple[float, float]], index: Tensor) -> Tensor:
        low, high = torch.tensor(ranges).unbind(1)
        return low[index] + (high - low)[index] * uniform(*index.shape)

    radius_BO = within(list(world.radii), words.size_BO)
    step_BO2 = torch.tensor(list(DIRECTIONS.values()))[words.direction_BO]
    step_BO2 = step_BO2 * within(list(SPEEDS.values()), words.speed_BO)[..., None]
    apart_BO2, has_room = place_apart(step_BO2, radius_BO, rng)
    crossing_BO2, can_cross = place_crossing(step_BO2, radius_BO, rng)
    is_crossing = words.order_B > 0
    is_pair = (words.count_B == 2) & torch.where(is_crossing, can_cross, has_room)
    tint_BO3 = 0.03 * (2 * uniform(count, 2, 3) - 1)
    return Scenes(
        count_B=1 + is_pair.long(),
        order_B=words.order_B * is_pair,
        shape_BO=words.shape_BO,
        color_BO=words.color_BO,
        texture_BO=words.texture_BO,
        direction_BO=words.direction_BO,
        speed_BO=words.speed_BO,
        size_BO=words.size_BO,
        tone_B=words.tone_B,
        pattern_B=words.pattern_B,
        start_BO2=torch.where((is_crossing & can_cross)[:, None, None], crossing_BO2, apart_BO2),
        step_BO2=step_BO2,
        radius_BO=radius_BO,
        turn_BO=0.2 * (2 * uniform(count, 2) - 1),
        grain_BO2=uniform(count, 2, 2),
        rgb_BO3=(torch.tensor(list(COLORS.values()))[words.color_BO] + tint_BO3).clamp(0, 1),
        value_B=within(list(TONES.values()), words.tone_B),
        contrast_B=0.08 + 0.10 * uniform(count),
        phase_B2=uniform(count, 2),
    )


def make_scene(
    color: str,
    shape: str,
    direction: str,
    tone: str = "dark",
    pattern: str = "plain",
    texture: str = "plain",
) -> Scenes:
    """One clip of a medium object at steady pace whose path is centred."""
    step = 2.4 * torch.tensor(DIRECTIONS[direction])
    middle = torch.tensor((UNIT / 2, UNIT / 2)) - step * (TRAVEL_FRAMES - 1) / 2
    fixed: dict[str, Tensor] = {
        "count_B": torch.tensor(1),
        "order_B": torch.tensor(0),
        "shape_BO": torch.tensor(SHAPES.index(shape)),
        "color_BO": torch.tensor(list(COLORS).index(color)),
        "texture_BO": torch.tensor(TEXTURES.index(texture)),
        "direction_BO": torch.tensor(list(DIRECTIONS).index(direction)),
        "speed_BO": torch.tensor(list(SPEEDS).index("steady")),
        "size_BO": torch.tensor(SIZES.index("medium")),
        "tone_B": torch.tensor(list(TONES).index(tone)),
        "pattern_B": torch.tensor(PATTERNS.index(pattern)),
        "start_BO2": middle,
        "step_BO2": step,
        "radius_BO": torch.tensor(16.0),
        "turn_BO": torch.tensor(0.0),
        "grain_BO2": torch.zeros(2),
        "rgb_BO3": torch.tensor(COLORS[color]),
        "value_B": torch.tensor(0.12 if tone == "dark" else 0.85),
        "contrast_B": torch.tensor(0.12),
        "phase_B2": torch.zeros(2),
    }
    drawn = sample_scenes(1, Generator().manual_seed(0))
    return Scenes(
        **{name: value.expand_as(getattr(drawn, name)).clone() for name, value in fixed.items()}
    )


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
    ranked = _back_first(scenes)
    for layer in range(2 - int(scenes.count_B.max()), 2):
        canvas = _draw_object(canvas, ranked, layer, (x, y), times)
    return (canvas * 2 - 1).contiguous()


def _back_first(scenes: Scenes) -> Scenes:
    """The same clips with their objects in the order of drawing; the only one comes last."""
    is_first_behind = scenes.order_B == ORDERS.index("behind")
    swapped = {}
    for field in fields(scenes):
        tensor = getattr(scenes, field.name)
        if "_BO" in field.name:
            keeps = is_first_behind.view(-1, *(1,) * (tensor.ndim - 1))
            swapped[field.name] = torch.where(keeps, tensor, tensor.flip(1))
    return replace(scenes, **swapped)


def _draw_object(
    canvas: Tensor, ranked: Scenes, layer: int, axes: tuple[Tensor, Tensor], times: Tensor
) -> Tensor:
    x, y = axes
    center = ranked.start_BO2[:, layer, None] + ranked.step_BO2[:, layer, None] * times[:, None]
    dx = x - center[:, :, 0, None, None]  # B F 1 W
    dy = y[:, None] - center[:, :, 1, None, None]  # B F H 1
    turn, radius = (t[:, layer, None, None, None] for t in (ranked.turn_BO, ranked.radius_BO))
    u = (dx * turn.cos() + dy * turn.sin()) / radius
    v = (dy * turn.cos() - dx * turn.sin()) / radius
    distance = shape_distance(u, v, ranked.shape_BO[:, layer]) * radius
    alpha = (0.5 - distance / (y[1] - y[0])).clamp(0, 1)
    is_there = (ranked.count_B == 2) | (layer == 1)
    alpha = alpha * is_there.view(-1, 1, 1, 1)
    # A little light from above.
    light = 1.0 - 0.10 * v.clamp(-1, 1)
    color = ranked.rgb_BO3[:, layer, :, None, None, None] * light[:, None]
    shade = texture_shade(u, v, ranked.texture_BO[:, layer], ranked.grain_BO2[:, layer])
    return canvas + alpha[:, None] * (color.clamp(0, 1) * shade[:, None] - canvas)


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
    stripes = soft_square((u + lean * v) / 24.0 + phase_x)
    checks = 0.5 + 0.5 * signed_wave(u / 32.0 + phase_x) * signed_wave(v / 32.0 + phase_y)
    flat, gradient = torch.zeros_like(stripes), (1.8 * ramp).expand_as(stripes)
    patterns = [flat, gradient, stripes, checks]  # in the order of PATTERNS
    picked = torch.stack(patterns, dim=1)[
        torch.arange(len(scenes), device=x.device), scenes.pattern_B
    ]
    return (value + sign * contrast * picked)[:, None].clamp(0, 1)
