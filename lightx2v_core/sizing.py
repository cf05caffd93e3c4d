"""Any size and length that is asked for, from the sizes a model can make.

The model makes the nearest size it can, without scaling, so that the aspect is kept; what is handed
over has exactly the size asked for: cropped around the middle, or padded with black.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .datatypes import MAX_FRAMES, MAX_SIDE, SPATIAL_STEP, VideoSize
from .errors import RequestError

FITS = ("crop", "pad")


@dataclass(frozen=True, slots=True)
class Fitted:
    """`made` by the model, `asked` by a person."""

    asked: VideoSize
    made: VideoSize

    def describe(self) -> str:
        """A sentence where the two differ, else nothing."""
        if self.made == self.asked:
            return ""
        asked, made = self.asked, self.made
        told = (
            f"{asked.width}x{asked.height}, {asked.frames} frames does not fit Wan (sides "
            f"divisible by {SPATIAL_STEP}, 4*n + 1 frames): {made.width}x{made.height}, "
            f"{made.frames} frames are made, then "
        )
        larger = made.width > asked.width or made.height > asked.height
        smaller = made.width < asked.width or made.height < asked.height
        ways = [
            *(["cropped"] if larger else []),
            *(["padded with black"] if smaller else []),
            *([f"the last {made.frames - asked.frames} dropped"] * (made.frames > asked.frames)),
        ]
        return told + " and ".join(ways)

    def trim(self, frames_FHWC: Tensor) -> Tensor:
        """Frames of `made` to frames of `asked`; black where the model made less."""
        height, width = self.asked.height, self.asked.width
        x = frames_FHWC[: self.asked.frames]
        rows, columns = x.shape[1:3]
        if rows > height or columns > width:
            top, left = max(rows - height, 0) // 2, max(columns - width, 0) // 2
            x = x[:, top : top + height, left : left + width]
        rows, columns = height - x.shape[1], width - x.shape[2]
        if rows or columns:
            left, top = columns // 2, rows // 2
            x = F.pad(x, (0, 0, left, columns - left, top, rows - top))
        return x.contiguous()


def fit_size(asked: VideoSize, fit: str = "crop") -> Fitted:
    """`crop`: sides rounded up, then cropped. `pad`: rounded down, then padded with black; a side
    below 16 is cropped in either case. Frames are rounded up and the last ones dropped.

    Raises RequestError for a size nobody can make.
    """
    if fit not in FITS:
        raise RequestError(f"fit {fit!r} is unknown; use {' or '.join(FITS)}")
    for name, value, most in (
        ("width", asked.width, MAX_SIDE),
        ("height", asked.height, MAX_SIDE),
        ("frames", asked.frames, MAX_FRAMES),
    ):
        if not 1 <= value <= most:
            raise RequestError(f"{name} {value} is not between 1 and {most}")

    def side(pixels: int) -> int:
        up = fit == "crop" or pixels < SPATIAL_STEP
        return (pixels + (SPATIAL_STEP - 1) * up) // SPATIAL_STEP * SPATIAL_STEP

    frames = (asked.frames + 2) // 4 * 4 + 1
    return Fitted(asked, VideoSize(side(asked.width), side(asked.height), frames))
