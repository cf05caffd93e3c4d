"""Linears of block-scaled formats, packed as in their files: NVFP4 and MXFP8.

A weight is code * block scale (* one scale for the tensor). Block scales lie in the order that
cuBLAS wants, tiles of 128 rows by 4 blocks.
Order: https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout
Formats: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import DequantisedLinear

NVFP4_BLOCK, MXFP8_BLOCK = 16, 32
TILE_ROWS, TILE_BLOCKS = 128, 4
CHUNK = 2**24  # values decoded at a time: 64 MB in float32
# e2m1: sign, two bits of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def scale_shape(rows: int, columns: int, block: int) -> tuple[int, int]:
    """Shape of the block scales of a weight MK, filled up to whole tiles."""
    blocks = -(-columns // block)
    return (-(-rows // TILE_ROWS) * TILE_ROWS, -(-blocks // TILE_BLOCKS) * TILE_BLOCKS)


def in_rows(tiled: Tensor, rows: int, blocks: int) -> Tensor:
    """Block scales in plain order, rows x blocks, from tiles of 32 x 4 x 4."""
    tiles = tiled.reshape(-1, tiled.shape[1] // TILE_BLOCKS, 32, 4, TILE_BLOCKS)
    # tile row, tile column, row % 32, row // 32, block -> tile row, row // 32, row % 32, ...
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(tiled.shape)
    return plain[:rows, :blocks]


def multiply_blocks(
    codes: Tensor, decode: Callable[[Tensor], Tensor], scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Values times block scales (rows x blocks, float32), rounded once, some rows at a time."""
    blocks, parts = scale.shape[1], []
    step = max(CHUNK // (codes.shape[1] * 2), 1)
    for part, factor in zip(codes.split(step), scale.split(step), strict=True):
        values = decode(part).reshape(part.shape[0], blocks, -1)
        parts.append((values * factor[..., None]).flatten(1).to(dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@cache
def _pairs(device: torch.device, low_nibble_first: bool) -> Tensor:
    """256 x 2 float32: the two values that a byte holds."""
    values = torch.tensor(E2M1 + tuple(-value for value in E2M1), device=device)
    byte = torch.arange(256, device=device)
    low, high = values[byte & 15], values[byte >> 4]
    return torch.stack((low, high) if low_nibble_first else (high, low), dim=1)


@cache
def _e4m3(device: torch.device) -> Tensor:
    """256 x 1 float32: the value of each byte."""
    every = torch.arange(256, dtype=torch.uint8)
    return every.view(torch.float8_e4m3fn).float()[:, None].to(device)


class Nvfp4Linear(DequantisedLinear):
    """e2m1 codes, two a byte; e4m3 scales of 16 values each; one float32 scale for the tensor.

    LightX2V packs the even column into the low nibble, ComfyUI into the high one.
    """

    codes_name = "nvfp4"
    weight: Tensor  # M x K/2 uint8
    weight_scale: Tensor  # tiled, bits of float8_e4m3fn as uint8: not every device has that dtype
    weight_scale_2: Tensor  # one number, float32

    def __init__(
        self, in_features: int, out_features: int, low_nibble_first: bool, bias: bool = True
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.low_nibble_first = low_nibble_first
        tiled = scale_shape(out_features, in_features, NVFP4_BLOCK)
        packed = torch.empty(out_features, in_features // 2, dtype=torch.uint8)
        self.register_buffer("weight", packed)
        self.register_buffer("weight_scale", torch.empty(tiled, dtype=torch.uint8))
        self.register_buffer("weight_scale_2", torch.empty((), dtype=torch.float32))

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        rows, blocks = self.out_features, self.in_features // NVFP4_BLOCK
        device = self.weight.device
        scale = in_rows(self.weight_scale, rows, blocks).int()
        scale = F.embedding(scale, _e4m3(device)).squeeze(2) * self.weight_scale_2
        pairs = _pairs(device, self.low_nibble_first)
        return multiply_blocks(
            self.weight, lambda codes: F.embedding(codes.int(), pairs), scale, dtype
        )


class Mxfp8Linear(DequantisedLinear):
    """e4m3 codes; scales of 32 values each that are powers of two, stored as their exponents."""

    codes_name = "mxfp8"
    weight: Tensor  # MK float8_e4m3fn
    weight_scale: Tensor  # tiled, exponents + 127 as uint8

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        codes = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn)
        self.register_buffer("weight", codes)
        tiled = scale_shape(out_features, in_features, MXFP8_BLOCK)
        self.register_buffer("weight_scale", torch.empty(tiled, dtype=torch.uint8))

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        rows, blocks = self.out_features, self.in_features // MXFP8_BLOCK
        exponents = in_rows(self.weight_scale, rows, blocks)
        # Bits of a float32 with mantissa 1; exponent 0, which only blocks of zeros have, is 0.
        scale = (exponents.int() << 23).view(torch.float32)
        return multiply_blocks(self.weight, Tensor.float, scale, dtype)
