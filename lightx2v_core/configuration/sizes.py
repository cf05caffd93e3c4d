"""The size of a video from a configuration and a start image, by LightX2V's rules.

Rules: default_runner.py and wan/wan_runner.py in lightx2v/models/runners of ModelTC/LightX2V at
f8aee98b.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..datatypes import VideoSize
from ..errors import RequestError
from ..presets import Preset
from .read import Configuration

STEP = 16  # pixels: eight by the VAE, two by the patch
RESIZE_MODES = (
    *("adaptive", "keep_ratio_fixed_area", "fixed_min_area", "fixed_max_area"),
    *("fixed_shape", "fixed_min_side"),
)
TIERS = ("480p", "540p", "720p")
# Height over width -> (height, width) by tier.
BUCKETS = {
    0.667: ((480, 832), (544, 960), (720, 1280)),
    1.5: ((832, 480), (960, 544), (1280, 720)),
    1.0: ((480, 480), (576, 576), (960, 960)),
}
Shape = tuple[int, int]  # height, width


@dataclass(frozen=True, slots=True)
class SizeRule:
    """None where the configuration leaves it to the model's preset."""

    height: int | None = None
    width: int | None = None
    frames: int | None = None
    resize_mode: str | None = None
    resolution: str = "480p"
    buckets: tuple[tuple[float, tuple[Shape, ...]], ...] = tuple(BUCKETS.items())
    fixed_area: str = "480p"
    fixed_shape: Shape | None = None

    def video(
        self, preset: Preset, target_shape: Shape | None = None, frames: int | None = None
    ) -> VideoSize:
        """Of a video from words alone; `target_shape` and `frames` are of one request."""
        trained = preset.size
        height, width = target_shape or (self.height or trained.height, self.width or trained.width)
        return VideoSize(width, height, frames or self.frames or trained.frames)

    def from_image(
        self,
        image: Shape,
        preset: Preset,
        target_shape: Shape | None = None,
        frames: int | None = None,
    ) -> VideoSize:
        """Of a video that begins with an image of `image` pixels."""
        asked = self.video(preset, target_shape, frames)
        if target_shape is not None:
            return asked
        ratio = image[0] / image[1]
        if self.resize_mode is None:
            area = asked.height * asked.width
            height, width = math.sqrt(area * ratio), math.sqrt(area / ratio)
        else:
            height, width = self._by_mode(ratio)
        return VideoSize(_down(width), _down(height), asked.frames)

    def _by_mode(self, ratio: float) -> tuple[float, float]:
        area = 720 * 1280 if self.fixed_area == "720p" else 480 * 832
        if self.resize_mode == "keep_ratio_fixed_area":
            return math.sqrt(area * ratio), math.sqrt(area / ratio)
        if self.resize_mode == "fixed_shape" and self.fixed_shape:
            return self.fixed_shape
        if self.resize_mode == "fixed_min_side":
            side = 720 if self.fixed_area == "720p" else 480
            return (side, side / ratio) if ratio < 1 else (side * ratio, side)
        tiers = min(self.buckets, key=lambda bucket: abs(bucket[0] - ratio))[1]
        tier = TIERS.index(self.resolution)
        return tiers[{"fixed_min_area": 0, "fixed_max_area": -1}.get(self.resize_mode or "", tier)]


def _down(pixels: float) -> int:
    # 480 x 832 at its own area is 479.99999999999994 high, which LightX2V takes down to 464.
    return max(int(pixels + 1e-6) // STEP, 1) * STEP


def read_sizes(configuration: Configuration) -> SizeRule:
    """Raises RequestError for a mode, tier or bucket that LightX2V does not have."""
    source, mode = configuration.source, configuration.text("resize_mode") or None
    if mode is not None and mode not in RESIZE_MODES:
        raise RequestError(
            f"{source}: resize_mode {mode} is unknown; use {', '.join(RESIZE_MODES)}"
        )
    resolution = configuration.text("resolution") or "480p"
    if resolution not in TIERS:
        raise RequestError(f"{source}: resolution {resolution} is unknown; use {', '.join(TIERS)}")
    area = configuration.text("fixed_area") or "480p"
    if area not in ("480p", "720p"):
        raise RequestError(f"{source}: fixed_area {area} is unknown; use 480p or 720p")
    shape = configuration.numbers("fixed_shape")
    if (mode == "fixed_shape" or shape) and len(shape) != 2:
        raise RequestError(
            f"{source}: resize_mode fixed_shape needs fixed_shape, height and width; add "
            '"fixed_shape": [480, 832]'
        )
    return SizeRule(
        configuration.count("target_height"),
        configuration.count("target_width"),
        configuration.count("target_video_length"),
        mode,
        resolution,
        _buckets(source, configuration.object("bucket_shape")),
        area,
        (int(shape[0]), int(shape[1])) if shape else None,
    )


def _buckets(
    source: str, given: Mapping[str, object]
) -> tuple[tuple[float, tuple[Shape, ...]], ...]:
    if not given:
        return tuple(BUCKETS.items())
    try:
        buckets = tuple(
            (float(ratio), tuple((int(height), int(width)) for height, width in shapes))  # type: ignore[union-attr]
            for ratio, shapes in given.items()
        )
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"{source}: bucket_shape must hold lists of [height, width] by aspect ratio ({error}); "
            'such as {"1.0": [[480, 480], [576, 576], [960, 960]]}'
        ) from error
    if any(len(shapes) < len(TIERS) for _, shapes in buckets):
        raise RequestError(
            f"{source}: bucket_shape needs {len(TIERS)} sizes for each aspect ratio "
            f"({', '.join(TIERS)})"
        )
    return buckets
