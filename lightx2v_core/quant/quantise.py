"""Weights into 8-bit codes and scales, by the formulas of the files that others publish."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**22  # values divided at a time: 16 MB in float32
LEAST = 1e-5  # of a row's largest value, so that rows of zeros have a scale


@dataclass(frozen=True, slots=True)
class WrittenScheme:
    """How a scheme is stored: dtype and limit of the codes, name and shape of their scale."""

    dtype: torch.dtype
    limit: float
    scale_leaf: str
    by_row: bool
    marker: bool = False  # ComfyUI's older form announces itself by a tensor of its own

    def scale_shape(self, rows: int) -> tuple[int, ...]:
        return (rows, 1) if self.by_row else ()

    def quantise(self, weight_MK: Tensor) -> tuple[Tensor, Tensor]:
        """(codes MK, scale M1 or a single number, float32), rounded to the nearest code.

        Some rows at a time, so that next to the codes only little memory is needed.
        """
        codes = torch.empty_like(weight_MK, dtype=self.dtype, memory_format=torch.contiguous_format)
        step = max(CHUNK // weight_MK.shape[1], 1)
        parts = [part.abs().amax(dim=1, keepdim=True) for part in weight_MK.split(step)]
        largest = torch.cat(parts) if self.by_row else torch.cat(parts).amax()
        scale = largest.float().clamp_min(LEAST) / self.limit
        scales = scale.split(step) if self.by_row else [scale] * len(parts)
        for part, target, divisor in zip(
            weight_MK.split(step), codes.split(step), scales, strict=True
        ):
            divided = (part.float() / divisor).clamp_(-self.limit, self.limit)
            target.copy_(divided if self.dtype.is_floating_point else divided.round_())
        return codes, scale


# LightX2V: a scale for each row. ComfyUI: one for each tensor.
WRITTEN = {
    "fp8": WrittenScheme(torch.float8_e4m3fn, 448.0, "weight_scale", by_row=True),
    "fp8-tensor": WrittenScheme(
        torch.float8_e4m3fn, 448.0, "scale_weight", by_row=False, marker=True
    ),
    "int8": WrittenScheme(torch.int8, 127.0, "weight_scale", by_row=True),
}

# What can be asked of a loader; for each the scheme that a file of it would show.
ON_LOAD = {"fp8": "fp8-row", "int8": "int8-row"}
KEEP = "keep"
LOAD_CHOICES = (KEEP, *ON_LOAD)
