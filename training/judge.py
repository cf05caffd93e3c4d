"""Looks at a clip and says which objects it shows and where they go, by plain image processing.

Backgrounds are neutral, so colourfulness finds the objects and hue tells them apart, whatever the
edges blend with; shapes are compared with rendered templates of equal area. No network is asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .world import COLORS, DIRECTIONS, SHAPES, UNIT, Scenes, shape_distance

COLORFUL = 0.22  # max - min of RGB above which a pixel belongs to an object
LEAST_AREA = 45.0  # world units squared
LEAST_SHARE = 0.15  # of the largest object, below which a colour is a fringe
LEAST_PATH = 5.0  # world units between the ends of a path
PATCH = 40  # side of the normalised view of one object
PATCH_AREA = 0.30  # of the view that the object covers
TEMPLATE_TURNS = (-0.24, -0.12, 0.0, 0.12, 0.24)
FAITHFUL_PSNR = 22.0  # decibels between the given and the made first frame


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """Per clip and object whether an attribute is as asked; NaN where there is no such object."""

    color_BO: Tensor
    shape_BO: Tensor
    direction_BO: Tensor
    count_B: Tensor

    def scores(self) -> dict[str, float]:
        """Percent right of each attribute, and the mean of them."""
        scores = {
            name: 100.0 * float(getattr(self, f"{name}_BO").nanmean())
            for name in ("color", "shape", "direction")
        }
        scores["count"] = 100.0 * float(self.count_B.float().mean())
        scores["all"] = sum(scores.values()) / len(scores)
        return scores


@torch.no_grad()
def judge(pixels_BCFHW: Tensor, scenes: Scenes) -> Verdict:
    """What of `scenes` the clips show. Pixels in [-1, 1], on the device of `scenes`."""
    rgb = pixels_BCFHW.float().clamp(-1, 1) * 0.5 + 0.5
    area_BK, chroma, hue_class = _see_colors(rgb)
    largest_B1 = area_BK.amax(dim=1, keepdim=True)
    is_there_BK = area_BK > torch.maximum(LEAST_SHARE * largest_B1, area_BK.new_tensor(LEAST_AREA))
    seen_B2 = area_BK.topk(2, dim=1).indices
    results: list[list[Tensor]] = []
    for index in range(2):
        color_B = scenes.color_BO[:, index]
        is_right = is_there_BK.gather(1, color_B[:, None])[:, 0]
        is_right &= (seen_B2[:, : index + 1] == color_B[:, None]).any(1) | (scenes.count_B == 2)
        # Where the colour is wrong, form and motion are judged on what is there instead.
        color_B = torch.where(is_right, color_B, seen_B2[:, index])
        alpha_BFHW = chroma * (hue_class == color_B.view(-1, 1, 1, 1))
        center_BF2, area_BF = _centers(alpha_BFHW)
        shape_B = _recognise_shape(alpha_BFHW, center_BF2, area_BF)
        direction_B = _recognise_direction(center_BF2, area_BF)
        asked = (scenes.shape_BO[:, index], scenes.direction_BO[:, index])
        checks = [is_right, shape_B == asked[0], direction_B == asked[1]]
        is_absent = scenes.count_B <= index
        results.append([check.float().masked_fill(is_absent, math.nan) for check in checks])
    color, shape, direction = (torch.stack(pair, dim=1) for pair in zip(*results, strict=True))
    return Verdict(color, shape, direction, is_there_BK.sum(dim=1) == scenes.count_B)


def faithful_share(pixels_BCFHW: Tensor, first_BCHW: Tensor) -> tuple[float, float]:
    """Percent of clips whose first frame is the given picture, and the mean PSNR of it."""
    error_B = (pixels_BCFHW[:, :, 0].float() - first_BCHW.float()).square().mean(dim=(1, 2, 3))
    psnr_B = 10 * torch.log10(4.0 / error_B.clamp_min(1e-8))
    return 100.0 * float((psnr_B > FAITHFUL_PSNR).float().mean()), float(psnr_B.mean())


def psnr(pixels: Tensor, reference: Tensor) -> float:
    """Decibels over all clips together, for values in [-1, 1]."""
    return float(10 * torch.log10(4.0 / (pixels.float() - reference.float()).square().mean()))


def _see_colors(rgb_BCFHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
    cover = (chroma / (0.92 * strength)).clamp(0, 1) * (hue_class >= 0)
    return torch.stack(areas, dim=1), cover, hue_class


def _centers(alpha_BFHW: Tensor) -> tuple[Tensor, Tensor]:
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


def _recognise_shape(alpha_BFHW: Tensor, center_BF2: Tensor, area_BF: Tensor) -> Tensor:
    """Index into SHAPES of the template that overlaps best, over some frames of the clip."""
    frames = torch.linspace(0, alpha_BFHW.shape[1] - 1, 5).round().long().to(alpha_BFHW.device)
    alpha, center, area = alpha_BFHW[:, frames], center_BF2[:, frames], area_BF[:, frames]
    views = _views(alpha.flatten(0, 1), center.flatten(0, 1), area.flatten(0, 1))
    overlap = _overlap(views, templates().to(views))  # (BF) x (shapes turns)
    per_frame = overlap.unflatten(1, (len(SHAPES), -1)).amax(-1).unflatten(0, (-1, len(frames)))
    return per_frame.mean(dim=1).argmax(dim=1)


def _views(alpha_NHW: Tensor, center_N2: Tensor, area_N: Tensor) -> Tensor:
    """Each object centred and scaled to cover PATCH_AREA of a PATCH-sided square; N x PATCH^2."""
    size = torch.tensor(alpha_NHW.shape[:0:-1], device=alpha_NHW.device)  # width, height
    side = (area_N.clamp_min(4.0) / PATCH_AREA).sqrt()  # of the view, in pixels
    line = (torch.arange(PATCH, device=size.device) + 0.5) / PATCH - 0.5
    offset = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    grid = center_N2.view(-1, 1, 1, 2) + side.view(-1, 1, 1, 1) * offset
    grid = 2 * grid / size - 1
    return F.grid_sample(alpha_NHW[:, None], grid, align_corners=False).flatten(1)


def _overlap(views_NP: Tensor, templates_MP: Tensor) -> Tensor:
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
    center, area = _centers(alpha[:, None])
    return _views(alpha, center[:, 0], area[:, 0])
