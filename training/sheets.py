"""Contact sheets: one labelled row of frames for each clip."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

SHOWN_FRAMES = 6
LABEL = 14


def save_sheet(rows: Mapping[str, Tensor], path: Path) -> None:
    """`rows` are clips CFHW in [-1, 1] under their labels."""
    from PIL import Image, ImageDraw

    strips = [_strip(clip) for clip in rows.values()]
    height, width = strips[0].shape[0] + LABEL, max(strip.shape[1] for strip in strips)
    sheet = Image.new("RGB", (width, height * len(strips)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (label, strip) in enumerate(zip(rows, strips, strict=True)):
        pen.text((2, row * height + 1), label, fill="black")
        sheet.paste(Image.fromarray(strip.numpy()), (0, row * height + LABEL))
    sheet.save(path)


def _strip(clip_CFHW: Tensor) -> Tensor:
    """Some frames side by side, H x (frames W) x 3 uint8."""
    count = clip_CFHW.shape[1]
    frames = torch.linspace(0, count - 1, min(SHOWN_FRAMES, count)).round().long()
    shown = clip_CFHW[:, frames.to(clip_CFHW.device)].float().clamp(-1, 1)
    levels = ((shown + 1) * 127.5).round().to(torch.uint8).cpu()
    return levels.permute(2, 1, 3, 0).flatten(1, 2).contiguous()  # CFHW -> H(FW)C
