"""Block types of GGUF files into numbers: those whose levels lie on a line or in a short table.

Every function takes blocks NB (n blocks of B bytes, uint8) and gives float32 of n rows, in the
order of operations of gguf.quants, so that results are equal bit for bit. Layouts and formulas:
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h and ggml-quants.c
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

# 4-bit levels: of IQ4 (ggml's kvalues_iq4nl) and of E2M1 floats, doubled.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def fields(blocks: Tensor, *widths: int) -> list[Tensor]:
    """The columns of each block, in bytes; the last field takes what is left."""
    return list(torch.split(blocks, [*widths, blocks.shape[1] - sum(widths)], dim=1))


def as_dtype(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of each row read as `dtype`. Copied: a field need not be aligned."""
    return columns.clone(memory_format=torch.contiguous_format).view(dtype)


def half(columns: Tensor) -> Tensor:
    return as_dtype(columns, torch.float16).float()


def unpack(packed: Tensor, bits: int, group: int) -> Tensor:
    """Fields of `bits` bits, lowest first, N(bytes * 8 / bits).

    Bytes lie in groups of `group`: the lowest fields of a whole group come before its next ones.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(1, 1, -1, 1)
    grouped = packed.reshape(len(packed), -1, 1, group)
    return ((grouped >> shifts) & (2**bits - 1)).reshape(len(packed), -1)


@cache
def levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A small table on `device`, usable in training whatever mode it was first asked for in."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """Rows (or numbers) of `table` at `index`, of any integer dtype."""
    picked = table.index_select(0, index.reshape(-1).int())
    return picked.reshape(*index.shape, *table.shape[1:])


def q8_0(blocks: Tensor) -> Tensor:
    d, q = fields(blocks, 2)
    return q.view(torch.int8).float() * half(d)


def q4_0(blocks: Tensor) -> Tensor:
    d, q = fields(blocks, 2)
    return half(d) * (unpack(q, 4, 16).float() - 8)


def q4_1(blocks: Tensor) -> Tensor:
    d, m, q = fields(blocks, 2, 2)
    return half(d) * unpack(q, 4, 16).float() + half(m)


def q5_0(blocks: Tensor) -> Tensor:
    d, high, low = fields(blocks, 2, 4)
    q = unpack(low, 4, 16) | (unpack(high, 1, 1) << 4)
    return half(d) * (q.float() - 16)


def q5_1(blocks: Tensor) -> Tensor:
    d, m, high, low = fields(blocks, 2, 2, 4)
    q = unpack(low, 4, 16) | (unpack(high, 1, 1) << 4)
    return half(d) * q.float() + half(m)


def q2_k(blocks: Tensor) -> Tensor:
    scales, packed, d, dmin = fields(blocks, 16, 64, 2)
    scale = (half(d) * (scales & 15).float()).unsqueeze(-1)
    least = (half(dmin) * (scales >> 4).float()).unsqueeze(-1)
    q = unpack(packed, 2, 32).float().view(-1, 16, 16)
    return (scale * q - least).flatten(1)


def q3_k(blocks: Tensor) -> Tensor:
    mask, packed, scales, d = fields(blocks, 32, 64, 12)
    low, high = fields(scales, 8)
    scale = (unpack(low, 4, 8) | (unpack(high, 2, 4) << 4)).float() - 32
    scale = (half(d) * scale).unsqueeze(-1)
    # A bit of the mask that is not set takes 4 away.
    q = unpack(packed, 2, 32).float() - 4 * (1 - unpack(mask, 1, 32).float())
    return (scale * q.view(-1, 16, 16)).flatten(1)


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(scales N81, minima N81, what follows) of Q4_K and Q5_K: eight 6-bit pairs in 12 bytes."""
    d, dmin, scale, least, rest, q = fields(blocks, 2, 2, 4, 4, 4)
    scales = torch.cat((scale & 63, (rest & 15) | ((scale >> 2) & 48)), dim=1)
    minima = torch.cat((least & 63, (rest >> 4) | ((least >> 2) & 48)), dim=1)
    scaled = (half(d) * scales.float()).unsqueeze(-1)
    return scaled, (half(dmin) * minima.float()).unsqueeze(-1), q


def q4_k(blocks: Tensor) -> Tensor:
    scale, least, packed = _k_scales(blocks)
    q = unpack(packed, 4, 32).float().view(-1, 8, 32)
    return (scale * q - least).flatten(1)


def q5_k(blocks: Tensor) -> Tensor:
    scale, least, packed = _k_scales(blocks)
    high, low = fields(packed, 32)
    q = (unpack(low, 4, 32) | (unpack(high, 1, 32) << 4)).float().view(-1, 8, 32)
    return (scale * q - least).flatten(1)


def q6_k(blocks: Tensor) -> Tensor:
    low, high, scales, d = fields(blocks, 128, 64, 16)
    scale = (half(d) * scales.view(torch.int8).float()).unsqueeze(-1)
    q = (unpack(low, 4, 64) | (unpack(high, 2, 32) << 4)).float() - 32
    return (scale * q.view(-1, 16, 16)).flatten(1)


def _ternary(packed: Tensor, digits: int, group: int) -> Tensor:
    """Base-3 digits 0 to 2; a byte holds five as a fraction of 243 in 256."""
    powers = torch.tensor([3**n for n in range(digits)], dtype=torch.uint8, device=packed.device)
    # uint8 products wrap: what is left is the fraction behind the wanted digit.
    shifted = packed.reshape(len(packed), -1, 1, group) * powers.view(1, 1, -1, 1)
    return (shifted.reshape(len(packed), -1).int() * 3) >> 8


def tq1_0(blocks: Tensor) -> Tensor:
    first, second, last, d = fields(blocks, 32, 16, 4)
    parts = (_ternary(first, 5, 32), _ternary(second, 5, 16), _ternary(last, 4, 4))
    return half(d) * (torch.cat(parts, dim=1).float() - 1)


def tq2_0(blocks: Tensor) -> Tensor:
    packed, d = fields(blocks, 64)
    return half(d) * (unpack(packed, 2, 32).float() - 1)


def iq4_nl(blocks: Tensor) -> Tensor:
    d, packed = fields(blocks, 2)
    return half(d) * lookup(levels(IQ4_LEVELS, blocks.device), unpack(packed, 4, 16))


def iq4_xs(blocks: Tensor) -> Tensor:
    d, high, low, packed = fields(blocks, 2, 2, 4)
    scale = (unpack(low, 4, 1) | (unpack(high, 2, 1) << 4)).float() - 32
    q = lookup(levels(IQ4_LEVELS, blocks.device), unpack(packed, 4, 16))
    return ((half(d) * scale).unsqueeze(-1) * q.view(-1, 8, 32)).flatten(1)


# The scale bytes of MXFP4 (a power of two) and NVFP4 (unsigned E4M3), halved as levels are doubled.
E8M0 = tuple(math.ldexp(1.0, code - 128) for code in range(256))
UE4M3 = tuple(
    0.0
    if code in (0, 0x7F)
    else math.ldexp(code & 7, -10)
    if not (code >> 3) & 15
    else math.ldexp(8 + (code & 7), ((code >> 3) & 15) - 11)
    for code in range(256)
)


def mxfp4(blocks: Tensor) -> Tensor:
    scale, packed = fields(blocks, 1)
    values = lookup(levels(E2M1_LEVELS, blocks.device), unpack(packed, 4, 16))
    return lookup(levels(E8M0, blocks.device), scale) * values


def nvfp4(blocks: Tensor) -> Tensor:
    scale, packed = fields(blocks, 4)
    values = lookup(levels(E2M1_LEVELS, blocks.device), unpack(packed, 4, 8)).view(-1, 4, 16)
    return (lookup(levels(UE4M3, blocks.device), scale).unsqueeze(-1) * values).flatten(1)
