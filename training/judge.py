"""Looks at a clip and says which objects it shows and where they go, by plain image processing.

Backgrounds are neutral, so colourfulness finds the objects and hue tells them apart, whatever the
edges blend with; shapes are compared with rendered templates of equal area, textures are told by
where brightness changes. Of two that meet, the one that loses area is behind. No network is asked.
What a world does not have, textures or pairs that meet, is not allowed for when its clips are seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .outlines import SHAPES, TEXTURES, shape_distance
from .places import UNIT
from .world import Scenes
from .worlds import COLORS, DIRECTIONS, ORDERS, PLAIN, World

COLORFUL = 0.22  # max - min of RGB above which a pixel belongs to an object
LEAST_AREA = 45.0  # world units squared
LEAST_SHARE = 0.15  # of the largest object, below which a colour is a fringe
LEAST_PATH = 5.0  # world units between the ends of a path
PATCH = 40  # side of the normalised view of one object
PATCH_AREA = 0.30  # of the view that the object covers
TEMPLATE_TURNS = (-0.24, -0.12, 0.0, 0.12, 0.24)
LAG = 5  # pixels of that view over which brightness is compared
TEXTURED = 0.012  # mean squared change of brightness from which an object has a texture
STRIPED = 0.4  # of the change along the object, below which its change across makes stripes
HIDDEN_SHARE = 0.08  # by which the one behind loses more of its area than the one in front
WHOLE_SHARE = 0.85  # of its usual area from which an object is seen whole
FAITHFUL_PSNR = 22.0  # decibels between the given and the made first frame


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """Per clip and object whether an attribute is as asked; NaN where nothing was asked: of an
    object that is not there, of a plain one's texture, of the order of two that do not meet."""

    color_BO: Tensor
    shape_BO: Tensor
    direction_BO: Tensor
    texture_BO: Tensor
    count_B: Tensor
    order_B: Tensor

    def scores(self) -> dict[str, float]:
        """Percent right of each attribute that was asked, and the mean of them."""
        scores = {}
        for field in fields(self):
            mean = float(getattr(self, field.name).nanmean())
            if not math.isnan(mean):
                scores[field.name.split("_")[0]] = 100.0 * mean
        scores["all"] = sum(scores.values()) / len(scores)
        return scores


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """One object of each clip: its cover of pixels, and centre and area in every frame."""

    cover_BFHW: Tensor
    center_BF2: Tensor
    area_BF: Tensor


@torch.no_grad()
def judge(pixels_BCFHW: Tensor, scenes: Scenes, world: World = PLAIN, chunk: int = 64) -> Verdict:
    """What of `scenes`, which are of `world`, clips show. Pixels in [-1, 1], on their device.

    `chunk` clips at a time: each needs some memory.
    """
    parts = [
        _judge_some(pixels_BCFHW[start : start + chunk], scenes[start : start + chunk], world)
        for start in range(0, len(scenes), chunk)
    ]
    names = [field.name for field in fields(Verdict)]
    return Verdict(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _judge_some(pixels_BCFHW: Tensor, scenes: Scenes, world: World) -> Verdict:
    rgb = pixels_BCFHW.float().clamp(-1, 1) * 0.5 + 0.5
    area_BK, cover, hue_class = see_colors(rgb, world)
    largest_B1 = area_BK.amax(dim=1, keepdim=True)
    is_there_BK = area_BK > torch.maximum(LEAST_SHARE * largest_B1, area_BK.new_tensor(LEAST_AREA))
    seen_B2 = area_BK.topk(2, dim=1).indices
    results: list[list[Tensor]] = []
    areas = []
    for index in range(2):
        color_B = scenes.color_BO[:, index]
        is_right = is_there_BK.gather(1, color_B[:, None])[:, 0]
        is_right &= (seen_B2[:, : index + 1] == color_B[:, None]).any(1) | (scenes.count_B == 2)
        # Where the colour is wrong, form and motion are judged on what is there instead.
        color_B = torch.where(is_right, color_B, seen_B2[:, index])
        alpha_BFHW = cover * (hue_class == color_B.view(-1, 1, 1, 1))
        center_BF2, area_BF = centers(alpha_BFHW)
        areas.append(area_BF)
        track = Track(alpha_BFHW, center_BF2, area_BF)
        shape_B, texture_B = _recognise_form(track, rgb.amax(dim=1), world)
        direction_B = _recognise_direction(center_BF2, area_BF)
        texture = texture_B == scenes.texture_BO[:, index]
        checks = [
            is_right,
            shape_B == scenes.shape_BO[:, index],
            direction_B == scenes.direction_BO[:, index],
            _where_asked(texture, scenes.texture_BO[:, index] > 0),
        ]
        is_present = scenes.count_B > index
        results.append([_where_asked(check, is_present) for check in checks])
    per_object = [torch.stack(pair, dim=1) for pair in zip(*results, strict=True)]
    order = _recognise_order(areas[0], areas[1]) == scenes.order_B
    count = is_there_BK.sum(dim=1) == scenes.count_B
    return Verdict(*per_object, count.float(), _where_asked(order, scenes.order_B > 0))


def _where_asked(check_B: Tensor, is_asked_B: Tensor) -> Tensor:
    return check_B.float().masked_fill(~is_asked_B, math.nan)


def faithful_share(pixels_BCFHW: Tensor, first_BCHW: Tensor) -> tuple[float, float]:
    """Percent of clips whose first frame is the given picture, and the mean PSNR of it."""
    error_B = (pixels_BCFHW[:, :, 0].float() - first_BCHW.float()).square().mean(dim=(1, 2, 3))
    psnr_B = 10 * torch.log10(4.0 / error_B.clamp_min(1e-8))
    return 100.0 * float((psnr_B > FAITHFUL_PSNR).float().mean()), float(psnr_B.mean())


def psnr(pixels: Tensor, reference: Tensor) -> float:
    """Decibels over all clips together, for values in [-1, 1]."""
    return float(10 * torch.log10(4.0 / (pixels.float() - reference.float()).square().mean()))


def see_colors(rgb_BCFHW: Tensor, world: World = PLAIN) -> tuple[Tensor, Tensor, Tensor]:
    """(mean area per colour in world units, cover of each pixel, nearest colour of each pixel)."""
    high, low = rgb_BCFHW.amax(dim=1), rgb_BCFHW.amin(dim=1)
    chroma = high - low
    # Hue as an angle in the plane across the grey axis.
    r, g, b = rgb_BCFHW.unbind(1)
    hue = torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)
    palette = torch.tensor(list(COLORS.values()), device=chroma.device)
    pr, pg, pb = palette.unbind(1)
    palette_hue = torch.atan2(math.sqrt(3) * (pg - pb), 2 * pr - pg - pb)
    apart = torch.stack([1 - (hue - angle).cos() for angle in palette_hue])
    hue_class = apart.argmin(dim=0).masked_fill(chroma < COLORFUL, -1)
    pixel = (UNIT / rgb_BCFHW.shape[-1]) ** 2
    areas = [
        (hue_class == k).flatten(2).sum(-1).float().mean(1) * pixel for k in range(len(COLORS))
    ]
    strength = (palette.amax(1) - palette.amin(1))[hue_class.clamp_min(0)]
    if world.texture_share > 0:
        # The dark parts of a texture, half as colourful, still cover wholly.
        cover = (chroma / strength - 0.15) / 0.35
    else:
        cover = chroma / (0.92 * strength)
    return torch.stack(areas, dim=1), cover.clamp(0, 1) * (hue_class >= 0), hue_class


def centers(alpha_BFHW: Tensor) -> tuple[Tensor, Tensor]:
    """Centre of mass (x, y) in pixels, and area in pixels, of each frame."""
    height, width = alpha_BFHW.shape[-2:]
    area = alpha_BFHW.sum(dim=(2, 3))
    x = torch.arange(width, device=area.device) + 0.5
    y = torch.arange(height, device=area.device) + 0.5
    mass = area.clamp_min(1e-6)
    center_x = (alpha_BFHW.sum(dim=2) * x).sum(-1) / mass
    center_y = (alpha_BFHW.sum(dim=3) * y).sum(-1) / mass
    return torch.stack((center_x, center_y), dim=-1), area


def _recognise_direction(center_BF2: Tensor, area_BF: Tensor) -> Tensor:
    """Index into DIRECTIONS, -1 where nothing moves or the object is gone at one end."""
    third = max(1, center_BF2.shape[1] // 6)
    path = center_BF2[:, -third:].mean(1) - center_BF2[:, :third].mean(1)
    ways = torch.tensor(list(DIRECTIONS.values()), device=path.device)
    best = (path @ ways.T).argmax(dim=1)
    is_gone = torch.minimum(area_BF[:, 0], area_BF[:, -1]) < 8
    return best.masked_fill((path.norm(dim=1) < LEAST_PATH) | is_gone, -1)


def _recognise_order(first_BF: Tensor, second_BF: Tensor) -> Tensor:
    """Index into ORDERS of the first, from the areas of both."""
    lost = [
        1 - area.amin(1) / area.median(dim=1).values.clamp_min(1) for area in (first_BF, second_BF)
    ]
    more = lost[0] - lost[1]
    order = torch.where(more > 0, ORDERS.index("behind"), ORDERS.index("in front"))
    return order.masked_fill(more.abs() < HIDDEN_SHARE, ORDERS.index("apart"))


def _recognise_form(track: Track, value_BFHW: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """(index into SHAPES of the template that overlaps best, index into TEXTURES), over some
    frames of the clip; where objects may hide each other, over those that show it whole."""
    count = track.cover_BFHW.shape[1]
    frames = torch.linspace(0, count - 1, 5).round().long().to(value_BFHW.device)
    cover, center = track.cover_BFHW[:, frames].flatten(0, 1), track.center_BF2[:, frames]
    area_BF = track.area_BF[:, frames]
    usual_B1 = track.area_BF.median(dim=1, keepdim=True).values
    weight_BF = (area_BF >= WHOLE_SHARE * usual_B1).float() + 1e-6
    weight_BF = weight_BF / weight_BF.sum(dim=1, keepdim=True)

    def over_frames(values: Tensor) -> Tensor:
        values = values.unflatten(0, (-1, len(frames)))
        if world.crossing_share == 0:
            return values.mean(dim=1)
        return (values * weight_BF.view(*weight_BF.shape, *(1,) * (values.ndim - 2))).sum(dim=1)

    center, area = center.flatten(0, 1), area_BF.flatten(0, 1)
    views = views_of(cover, center, area)
    fit = overlap(views, templates().to(views))  # (BF) x (shapes turns)
    shape_B = over_frames(fit.unflatten(1, (len(SHAPES), -1)).amax(-1)).argmax(dim=1)
    if world.texture_share == 0:
        return shape_B, torch.full_like(shape_B, TEXTURES.index("plain"))
    value = views_of(value_BFHW[:, frames].flatten(0, 1), center, area)
    across, along = (over_frames(change) for change in _changes(value, views))
    texture_B = torch.where(
        across < STRIPED * along, TEXTURES.index("striped"), TEXTURES.index("checkered")
    )
    return shape_B, texture_B.masked_fill(across + along < TEXTURED, TEXTURES.index("plain"))


def _changes(value_NP: Tensor, cover_NP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared change of brightness inside each view, to the right and downwards."""
    value, is_inside = (x.unflatten(1, (PATCH, PATCH)) for x in (value_NP, cover_NP > 0.97))
    results = []
    for axis in (2, 1):
        size = PATCH - LAG
        change = value.narrow(axis, LAG, size) - value.narrow(axis, 0, size)
        counts = is_inside.narrow(axis, LAG, size) & is_inside.narrow(axis, 0, size)
        total = (change.square() * counts).flatten(1).sum(1)
        results.append(total / counts.flatten(1).sum(1).clamp_min(1))
    return results[0], results[1]


def views_of(alpha_NHW: Tensor, center_N2: Tensor, area_N: Tensor) -> Tensor:
    """Each object centred and scaled to cover PATCH_AREA of a PATCH-sided square; N x PATCH^2."""
    size = torch.tensor(alpha_NHW.shape[:0:-1], device=alpha_NHW.device)  # width, height
    side = (area_N.clamp_min(4.0) / PATCH_AREA).sqrt()  # of the view, in pixels
    line = (torch.arange(PATCH, device=size.device) + 0.5) / PATCH - 0.5
    offset = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    grid = center_N2.view(-1, 1, 1, 2) + side.view(-1, 1, 1, 1) * offset
    grid = 2 * grid / size - 1
    return F.grid_sample(alpha_NHW[:, None], grid, align_corners=False).flatten(1)


def overlap(views_NP: Tensor, templates_MP: Tensor) -> Tensor:
    """Soft intersection over union, N x M."""
    common = torch.stack([torch.minimum(views_NP, one).sum(1) for one in templates_MP], dim=1)
    return common / (views_NP.sum(1, keepdim=True) + templates_MP.sum(1) - common).clamp_min(1e-6)


@cache
def templates() -> Tensor:
    """The normalised view of every shape in every turn, shapes first; (shapes turns) x PATCH^2."""
    shape = torch.arange(len(SHAPES)).repeat_interleave(len(TEMPLATE_TURNS))
    turn = torch.tensor(TEMPLATE_TURNS).repeat(len(SHAPES)).view(-1, 1, 1)
    line = torch.arange(96) + 0.5 - 48
    u, v = line[None, None, :] / 26, line[None, :, None] / 26
    u, v = u * turn.cos() + v * turn.sin(), v * turn.cos() - u * turn.sin()
    alpha = (0.5 - shape_distance(u, v, shape) * 26).clamp(0, 1)
    center, area = centers(alpha[:, None])
    return views_of(alpha, center[:, 0], area[:, 0])
