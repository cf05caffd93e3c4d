"""The IQ types of GGUF files into numbers: signs, scales, and vectors of a grid by their index.

Grids are taken from the package gguf when they are first needed. As in ggml_blocks: NB uint8 blocks
in, float32 of n rows out, in the order of operations of gguf.quants.
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .ggml_blocks import as_dtype, fields, half, lookup, unpack
from .gguf_package import gguf_package

IQ1_SHIFT = 0.125  # by which the ternary grid of IQ1 is moved up or down


@cache
def grid(name: str, device: torch.device) -> Tensor:
    """The vectors of IQ type `name`, float32. Raises CapabilityError without the package gguf."""
    quants = getattr(gguf_package(f"a file with weights in {name}").quants, name)
    quants.init_grid()
    with torch.inference_mode(False):
        return torch.tensor(quants.grid.reshape(quants.grid_shape), device=device)


@cache
def _sign_table(device: torch.device) -> Tensor:
    """Eight signs for each 7-bit index; the eighth makes the number of minus signs even."""
    with torch.inference_mode(False):
        index = torch.arange(128, dtype=torch.uint8, device=device).unsqueeze(1)
        seven = unpack(index, 1, 1)[:, :7]
        return _signs(torch.cat((seven, seven.sum(dim=1, keepdim=True) % 2), dim=1))


def _signs(bits: Tensor) -> Tensor:
    return 1.0 - 2.0 * bits.float()


def _shifted(numbers: Tensor, *shifts: int) -> Tensor:
    """`numbers` int32 shifted right by each of `shifts`, on a new last axis."""
    by = torch.tensor(shifts, dtype=torch.int32, device=numbers.device)
    return numbers.unsqueeze(-1) >> by


def _words(columns: Tensor) -> Tensor:
    """Unsigned 16-bit numbers as int32."""
    return as_dtype(columns, torch.int16).int() & 0xFFFF


def iq2_xxs(blocks: Tensor) -> Tensor:
    d, packed = fields(blocks, 2)
    pairs = as_dtype(packed, torch.int32).view(-1, 8, 2)
    index, rest = pairs[..., 0], pairs[..., 1]
    scale = half(d) * (0.5 + ((rest >> 28) & 15).float()) * 0.25
    signs = lookup(_sign_table(blocks.device), _shifted(rest, 0, 7, 14, 21) & 127)
    vectors = lookup(grid("IQ2_XXS", blocks.device), _shifted(index, 0, 8, 16, 24) & 255)
    return (scale.view(-1, 8, 1, 1) * vectors * signs).flatten(1)


def iq2_xs(blocks: Tensor) -> Tensor:
    d, packed, scales = fields(blocks, 2, 64)
    words = _words(packed)
    scale = half(d) * (0.5 + unpack(scales, 4, 1).float()) * 0.25
    signs = lookup(_sign_table(blocks.device), words >> 9).view(-1, 16, 2, 8)
    vectors = lookup(grid("IQ2_XS", blocks.device), words & 511).view(-1, 16, 2, 8)
    return (scale.view(-1, 16, 1, 1) * vectors * signs).flatten(1)


def iq2_s(blocks: Tensor) -> Tensor:
    d, low, signs, high, scales = fields(blocks, 2, 32, 32, 8)
    scale = half(d) * (0.5 + unpack(scales, 4, 1).float()) * 0.25
    index = low.int() | (unpack(high, 2, 1).int() << 8)
    vectors = lookup(grid("IQ2_S", blocks.device), index).view(-1, 16, 2, 8)
    signed = _signs(unpack(signs, 1, 1)).view(-1, 16, 2, 8)
    return (scale.view(-1, 16, 1, 1) * vectors * signed).flatten(1)


def iq3_xxs(blocks: Tensor) -> Tensor:
    d, index, packed = fields(blocks, 2, 64)
    rest = as_dtype(packed, torch.int32)
    scale = half(d) * (0.5 + ((rest >> 28) & 15).float()) * 0.5
    signs = lookup(_sign_table(blocks.device), _shifted(rest, 0, 7, 14, 21) & 127)
    vectors = lookup(grid("IQ3_XXS", blocks.device), index).view(-1, 8, 4, 8)
    return (scale.view(-1, 8, 1, 1) * vectors * signs).flatten(1)


def iq3_s(blocks: Tensor) -> Tensor:
    d, low, high, signs, scales = fields(blocks, 2, 64, 8, 32)
    scale = half(d) * (1 + 2 * unpack(scales, 4, 1)).float()
    index = low.int() | (unpack(high, 1, 1).int() << 8)
    vectors = lookup(grid("IQ3_S", blocks.device), index).view(-1, 8, 4, 8)
    signed = _signs(unpack(signs, 1, 1)).view(-1, 8, 4, 8)
    return (scale.view(-1, 8, 1, 1) * vectors * signed).flatten(1)


def iq1_s(blocks: Tensor) -> Tensor:
    d, low, packed = fields(blocks, 2, 32)
    words = _words(packed)
    scale = half(d) * (2 * ((words >> 12) & 7) + 1).float()
    moved = IQ1_SHIFT * _signs(words >> 15)
    index = low.int() | ((_shifted(words, 0, 3, 6, 9) & 7).flatten(1) << 8)
    vectors = lookup(grid("IQ1_S", blocks.device), index).view(-1, 8, 4, 8)
    return (scale.view(-1, 8, 1, 1) * (vectors + moved.view(-1, 8, 1, 1))).flatten(1)


def iq1_m(blocks: Tensor) -> Tensor:
    low, packed, last = fields(blocks, 32, 16)
    words = _words(last)
    # The highest four bits of each of the four words are the float16 scale, lowest first.
    top = words >> 12
    bits = top[:, 0] | (top[:, 1] << 4) | (top[:, 2] << 8) | (top[:, 3] << 12)
    d = bits.to(torch.int16).view(torch.float16).float().unsqueeze(1)
    scale = d * (2 * (_shifted(words, 0, 3, 6, 9) & 7).flatten(1) + 1).float()
    high = unpack(packed, 4, 1).int()
    moved = IQ1_SHIFT * _signs(high >> 3)
    vectors = lookup(grid("IQ1_M", blocks.device), low.int() | ((high & 7) << 8))
    shifted = vectors.view(-1, 8, 2, 2, 8) + moved.view(-1, 8, 2, 2, 1)
    return (scale.view(-1, 8, 2, 1, 1) * shifted).flatten(1)
