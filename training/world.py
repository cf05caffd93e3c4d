"""A world of coloured shapes that glide over a neutral background, rendered in batches.

Everything a caption or the judge may ask about is a tensor of `Scenes`; how often each thing occurs
is a `World`, `PLAIN` where none is named. Lengths are in units of a 128-pixel square whatever the
size of the picture. Axes besides those of the core: O objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Generator, Tensor

from .draws import Chances, Words, draw, draw_chances
from .outlines import SHAPES, TEXTURES, shape_distance, signed_wave, soft_square, texture_shade
from .places import TRAVEL_FRAMES, UNIT, place_apart, place_crossing
from .worlds import (
    COLORS,
    DIRECTIONS,
    HELD_OUT_CYCLE,
    ORDERS,
    PATTERNS,
    PLAIN,
    SIZES,
    SPEEDS,
    TONES,
    Split,
    World,
)


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


def held_out(scenes: Scenes | Words) -> Tensor:
    """B bool: an object of the clip has a colour, shape and direction no training clip joins.

    A fixed rule: each colour and shape miss at most one direction, so that all three and their
    pairs are common in training and only the combination is new.
    """
    sum_BO = scenes.color_BO + 7 * scenes.shape_BO + 3 * scenes.direction_BO
    is_new_BO = sum_BO % HELD_OUT_CYCLE == 0
    return is_new_BO[:, 0] | (is_new_BO[:, 1] & (scenes.count_B == 2))


def sample_scenes(
    count: int, rng: Generator, world: World = PLAIN, split: Split = "train"
) -> Scenes:
    """Random clips, drawn on the CPU so that a seed means the same everywhere.

    `split` chooses by `held_out`; in a world that holds nothing out "train" is all there is.
    """
    if split == "held-out" and not world.holds_out:
        raise ValueError(f"the {world.name} world holds no combination out of training")
    if split == "all" or not world.holds_out:
        return place(*draw(count, rng, world), world)
    scenes = None
    while scenes is None or len(scenes) < count:
        drawn = place(*draw(max(count, 16), rng, world), world)
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
        drawn = place(words, draw_chances(count, rng), world)
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


def within(ranges: Sequence[tuple[float, float]], index: Tensor, chance: Tensor) -> Tensor:
    """Numbers of the ranges that `index` names, `chance` 0 to 1 of the way through them."""
    low, high = torch.tensor(list(ranges)).unbind(1)
    return low[index] + (high - low)[index] * chance


def place(words: Words, chances: Chances, world: World) -> Scenes:
    """Give everything its numbers. A pair that finds no room loses its second object."""
    radius_BO = within(world.radii, words.size_BO, chances.radius_BO)
    pace_BO = within(tuple(SPEEDS.values()), words.speed_BO, chances.speed_BO)
    step_BO2 = torch.tensor(list(DIRECTIONS.values()))[words.direction_BO] * pace_BO[..., None]
    start_BO2, has_room = place_apart(step_BO2, radius_BO, chances.apart_NBO2)
    if chances.crossing is not None:
        crossing_BO2, can_cross = place_crossing(step_BO2, radius_BO, chances.crossing)
        is_crossing = words.order_B > 0
        has_room = torch.where(is_crossing, can_cross, has_room)
        crosses = (is_crossing & can_cross)[:, None, None]
        start_BO2 = torch.where(crosses, crossing_BO2, start_BO2)
    is_pair = (words.count_B == 2) & has_room
    rgb_BO3 = torch.tensor(list(COLORS.values()))[words.color_BO]
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
        start_BO2=start_BO2,
        step_BO2=step_BO2,
        radius_BO=radius_BO,
        turn_BO=0.2 * (2 * chances.turn_BO - 1),
        grain_BO2=chances.grain_BO2,
        rgb_BO3=(rgb_BO3 + 0.03 * (2 * chances.tint_BO3 - 1)).clamp(0, 1),
        value_B=within(tuple(TONES.values()), words.tone_B, chances.value_B),
        contrast_B=0.08 + 0.10 * chances.contrast_B,
        phase_B2=chances.phase_B2,
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
        canvas = _draw_object(canvas, ranked, layer, (x, y, pixel), times)
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
    canvas: Tensor, ranked: Scenes, layer: int, grid: tuple[Tensor, Tensor, float], times: Tensor
) -> Tensor:
    x, y, pixel = grid
    center = ranked.start_BO2[:, layer, None] + ranked.step_BO2[:, layer, None] * times[:, None]
    dx = x - center[:, :, 0, None, None]  # B F 1 W
    dy = y[:, None] - center[:, :, 1, None, None]  # B F H 1
    turn, radius = (t[:, layer, None, None, None] for t in (ranked.turn_BO, ranked.radius_BO))
    u = (dx * turn.cos() + dy * turn.sin()) / radius
    v = (dy * turn.cos() - dx * turn.sin()) / radius
    distance = shape_distance(u, v, ranked.shape_BO[:, layer]) * radius
    alpha = (0.5 - distance / pixel).clamp(0, 1)
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
