"""How near a set of clips is to rendered ones: Fréchet distance and diversity on what a judge sees.

Features are plain image processing of the largest object and its background; no network is asked.
They are standardised by the deviation of rendered clips, so a distance of 1 is one deviation of one
feature.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from .judge import (
    LEAST_AREA,
    LEAST_SHARE,
    Verdict,
    centers,
    overlap,
    see_colors,
    templates,
    views_of,
)
from .places import UNIT
from .worlds import PLAIN, World

# Each feature with the deviation below which no difference would be seen: rendered clips are
# exact in some features, and dividing by next to nothing would let those decide alone.
FEATURES = {
    "start x": 1.0,  # world units
    "start y": 1.0,
    "end x": 1.0,
    "end y": 1.0,
    "size": 0.5,  # root of the area, world units
    "growth": 0.05,  # logarithm of last area / first area
    "path": 1.0,  # from start to end, world units
    "direction x": 0.1,  # unit vector
    "direction y": 0.1,
    "wobble": 0.25,  # world units between a frame's step and the mean step
    "edge width": 0.25,  # pixels
    "contrast": 0.02,  # of brightness 0 to 1, object against background
    "background": 0.02,
    "background spread": 0.02,
    "colourfulness": 0.02,
    "hue x": 0.05,  # unit vector
    "hue y": 0.05,
    "shape overlap": 0.02,  # with the template that fits best, 0 to 1
    "objects": 0.5,
}
# What a caption leaves open. Diversity is measured in these alone: pixels, or all features, would
# count a wrong colour, shape or direction and any blur as variety.
FREE = ("start x", "start y", "size", "path", "background")
EDGE_LOW, EDGE_HIGH = 0.4, 0.9  # cover between which a pixel is on the edge


def clip_scores(verdict: Verdict) -> dict[str, Tensor]:
    """Share right of each attribute in each clip, 0 to 1, and `all`, their mean; B, on the CPU.

    NaN where a clip was not asked about an attribute; two objects count half each.
    """
    scores = {}
    for field in fields(verdict):
        values = getattr(verdict, field.name).float().cpu()
        scores[field.name.split("_")[0]] = values.nanmean(dim=1) if values.ndim > 1 else values
    scores["all"] = torch.stack(list(scores.values())).nanmean(dim=0)
    return scores


def first_frame_psnr(pixels_BCFHW: Tensor, first_BCHW: Tensor) -> Tensor:
    """Decibels between each clip's first frame and the picture it was given; B, on the CPU."""
    error_B = (pixels_BCFHW[:, :, 0].float() - first_BCHW.float()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(4.0 / error_B.clamp_min(1e-8))).cpu()


@torch.no_grad()
def clip_features(pixels_BCFHW: Tensor, world: World = PLAIN) -> Tensor:
    """B x len(FEATURES) float32, on the CPU. Pixels in [-1, 1] of `world`; nothing seen gives
    zeros."""
    rgb = pixels_BCFHW.float().clamp(-1, 1) * 0.5 + 0.5
    area_BK, cover, hue_class = see_colors(rgb, world)
    is_object = hue_class == area_BK.argmax(dim=1).view(-1, 1, 1, 1)
    alpha = cover * is_object
    unit = UNIT / rgb.shape[-1]
    center_BF2, area_BF = centers(alpha)
    least = torch.maximum(
        LEAST_SHARE * area_BK.amax(dim=1, keepdim=True), area_BK.new_tensor(LEAST_AREA)
    )
    columns = [
        *_motion(center_BF2 * unit, area_BF * unit**2),
        _edge_width(alpha),
        *_light(rgb, alpha, hue_class < 0),
        _shape_overlap(alpha, center_BF2, area_BF),
        (area_BK > least).sum(dim=1).float(),
    ]
    return torch.stack(columns, dim=1).cpu()


def _motion(center_BF2: Tensor, area_BF: Tensor) -> list[Tensor]:
    """`start x` to `wobble`, in world units."""
    some = max(1, center_BF2.shape[1] // 6)
    start, end = center_BF2[:, :some].mean(1), center_BF2[:, -some:].mean(1)
    path = end - start
    length = path.norm(dim=1)
    direction = path / length.clamp_min(1e-3)[:, None]
    steps = center_BF2.diff(dim=1)
    wobble = (steps - steps.mean(dim=1, keepdim=True)).norm(dim=-1).mean(dim=1)
    first, last = area_BF[:, :some].mean(1), area_BF[:, -some:].mean(1)
    growth = ((last + 1.0) / (first + 1.0)).log()
    size = area_BF.mean(dim=1).sqrt()
    return [*start.T, *end.T, size, growth, length, *direction.T, wobble]


def _edge_width(alpha_BFHW: Tensor) -> Tensor:
    """Pixels in which the edge rises: 4a(1-a) over the outline is 2/3 of the width of a ramp, and
    the outline is as long as a's total variation, however blurred it is."""
    a = ((alpha_BFHW - EDGE_LOW) / (EDGE_HIGH - EDGE_LOW)).clamp(0, 1)
    dx = a[..., :-1, 1:] - a[..., :-1, :-1]
    dy = a[..., 1:, :-1] - a[..., :-1, :-1]
    outline = torch.hypot(dx, dy).sum(dim=(1, 2, 3))
    return 1.5 * (4 * a * (1 - a)).sum(dim=(1, 2, 3)) / outline.clamp_min(1.0)


def _light(rgb_BCFHW: Tensor, alpha_BFHW: Tensor, is_background: Tensor) -> list[Tensor]:
    """`contrast` to `hue y`."""
    inside = (alpha_BFHW > EDGE_HIGH).float()
    outside = is_background.float()

    def mean(values: Tensor, weights: Tensor) -> Tensor:
        total = weights.sum(dim=(1, 2, 3)).clamp_min(1.0)
        return (values * weights).sum(dim=(1, 2, 3)) / total

    bright = rgb_BCFHW.mean(dim=1)
    background = mean(bright, outside)
    spread = mean((bright - background.view(-1, 1, 1, 1)).square(), outside).sqrt()
    contrast = (mean(bright, inside) - background).abs()
    chroma = mean(rgb_BCFHW.amax(dim=1) - rgb_BCFHW.amin(dim=1), inside)
    red, green, blue = (mean(channel, inside) for channel in rgb_BCFHW.unbind(1))
    hue = torch.stack((2 * red - green - blue, 3**0.5 * (green - blue)))
    return [contrast, background, spread, chroma, *(hue / hue.norm(dim=0).clamp_min(1e-3))]


def _shape_overlap(alpha_BFHW: Tensor, center_BF2: Tensor, area_BF: Tensor) -> Tensor:
    middle = alpha_BFHW.shape[1] // 2
    views = views_of(alpha_BFHW[:, middle], center_BF2[:, middle], area_BF[:, middle])
    return overlap(views, templates().to(views)).amax(dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Standardised features of rendered clips, and how others become so; N x D, float64."""

    mean_D: Tensor
    deviation_D: Tensor
    real_ND: Tensor

    @classmethod
    def of(cls, real_ND: Tensor) -> Reference:
        """From raw features of rendered clips."""
        raw = real_ND.double()
        floors = torch.tensor(list(FEATURES.values()), dtype=torch.float64)
        mean, deviation = raw.mean(dim=0), torch.maximum(raw.std(dim=0), floors)
        return cls(mean, deviation, (raw - mean) / deviation)

    def standardised(self, features_ND: Tensor) -> Tensor:
        return (features_ND.double() - self.mean_D) / self.deviation_D

    def distance(self, features_ND: Tensor) -> float:
        """Fréchet distance of clips with these raw features to the rendered ones."""
        return frechet_distance(self.standardised(features_ND), self.real_ND)

    def spread(self, features_PSD: Tensor) -> float:
        """Mean distance between clips of one prompt, in what captions leave open.

        P prompts, S clips each, raw features; NaN for a single clip.
        """
        free = [list(FEATURES).index(name) for name in FREE]
        return mean_pair_distance(self.standardised(features_PSD)[..., free])


def frechet_distance(a_ND: Tensor, b_MD: Tensor) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of vectors.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), as in https://arxiv.org/abs/1706.08500. The trace
    of the root is that of the root of S1^(1/2) S2 S1^(1/2), which is symmetric, so that flat or
    nearly dependent directions cannot make it complex.
    """
    a, b = a_ND.double(), b_MD.double()
    if min(len(a), len(b)) < 2:
        return float("nan")
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = symmetric_root(cov_a)
    mixed = root @ cov_b @ root
    overlap = torch.linalg.eigvalsh((mixed + mixed.T) / 2).clamp_min(0).sqrt().sum()
    shift = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return max(float(shift + cov_a.trace() + cov_b.trace() - 2 * overlap), 0.0)


def symmetric_root(matrix_DD: Tensor) -> Tensor:
    """Of a symmetric matrix whose eigenvalues are positive up to rounding."""
    values, vectors = torch.linalg.eigh((matrix_DD + matrix_DD.T) / 2)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def mean_pair_distance(points_PSD: Tensor) -> float:
    """Mean over P sets of the mean distance between two of the S points of a set."""
    pairs = torch.stack([F.pdist(points) for points in points_PSD.double()])
    return float(pairs.mean()) if pairs.numel() else float("nan")
