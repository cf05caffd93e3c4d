"""What our 8-bit attention computes, in plain PyTorch: the codes of its operands as numbers."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def attention_of_codes(q: Tensor, k: Tensor, v: Tensor, wide_values: bool = False) -> Tensor:
    """BNLD float64: exact attention between the values that the codes of q, k and v stand for."""
    s = query_values(q) @ key_values(k).transpose(-1, -2) / q.shape[-1] ** 0.5
    return s.softmax(-1) @ (v.double() if wide_values else value_values(v))


def query_values(q_BNLD: Tensor) -> Tensor:
    """int8 with a scale for each token."""
    scale = q_BNLD.double().abs().amax(-1, keepdim=True).clamp_min(1e-8) / 127
    return (q_BNLD.double() / scale).round() * scale


def key_values(k_BNLD: Tensor) -> Tensor:
    """int8 of what differs from the mean, with a scale for each BLOCK of tokens."""
    k = k_BNLD.double()
    return torch.cat([_coded_block(part) for part in (k - k.mean(2, True)).split(BLOCK, 2)], 2)


def _coded_block(k_BNTD: Tensor) -> Tensor:
    scale = k_BNTD.abs().amax((-1, -2), keepdim=True).clamp_min(1e-8) / 127
    return (k_BNTD / scale).round() * scale


def value_values(v_BNLD: Tensor) -> Tensor:
    """float8 over a power of two for each BLOCK of tokens."""
    parts = []
    for part in v_BNLD.float().split(BLOCK, 2):
        largest = part.abs().amax((-1, -2), keepdim=True).clamp_min(2.0**-32)
        scale = torch.exp2(torch.ceil(torch.log2(largest / 448)))
        parts.append((part / scale).to(torch.float8_e4m3fn).double() * scale)
    return torch.cat(parts, 2)


def normal(batch: int, tokens: int, heads: int, seed: int, device: str) -> tuple[Tensor, ...]:
    """q, k, v BNLD bfloat16 as a model gives them: views of BLND."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, tokens, heads, 128)
    return tuple(
        torch.randn(shape, generator=generator, device=device).bfloat16().transpose(1, 2)
        for _ in range(3)
    )
