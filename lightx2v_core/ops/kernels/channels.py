"""The pass of channels.py as one Triton kernel. Imported only where it is to run."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..channels import LEAST_SQUARES, Between

ELEMENTS = 4096  # of one program
SMALLEST = tl.constexpr(LEAST_SQUARES)


@triton.jit
def _between(
    sums_ptr,
    bias_ptr,
    residual_ptr,
    total_ptr,
    gain_ptr,
    activated_ptr,
    pixels,
    height,
    width,
    root,
    C: tl.constexpr,
    FILLED: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PHASES: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TOTAL: tl.constexpr,
    ACTIVATED: tl.constexpr,
    SILU: tl.constexpr,
) -> None:
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    mask = (pixel < pixels)[:, None] & (channel < C)[None, :]
    at = pixel[:, None] * C + channel[None, :]
    if PHASES:
        row = pixel // width
        x, y = pixel % width, row % height
        a, b = y % 2, x % 2
        cell = (row // height) * (height // 2 + 1) + y // 2 + a
        cell = cell * (width // 2 + 1) + x // 2 + b
        source = (cell * 4 + 2 * a + b)[:, None] * C + channel[None, :]
    else:
        source = at
    value = tl.load(sums_ptr + source, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
        value += bias[None, :]
    if RESIDUAL:
        value += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if TOTAL:
        tl.store(total_ptr + at, value.to(total_ptr.dtype.element_ty), mask=mask)
    if ACTIVATED:
        squares = tl.maximum(tl.sum(value * value, axis=1), SMALLEST)
        gain = tl.load(gain_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
        value = value * (tl.rsqrt(squares) * root)[:, None] * gain[None, :]
        if SILU:
            value = value / (1.0 + tl.exp(-value))
        # Past C all that was loaded is zero, and so is what came of it.
        at = pixel[:, None] * FILLED + channel[None, :]
        mask = (pixel < pixels)[:, None] & (channel < FILLED)[None, :]
        tl.store(activated_ptr + at, value.to(activated_ptr.dtype.element_ty), mask=mask)


def fused(sums: Tensor, between: Between, phases: bool = False) -> None:
    """As `channels.plain`, in one pass over memory."""
    bias, residual, total, gain, activated, silu = between
    target = total if total is not None else activated
    assert target is not None, "a pass has a result"
    *_, height, width, _ = target.shape
    pixels = target.numel() // target.shape[-1]
    channels = sums.shape[-1] // (4 if phases else 1)
    filled = channels if activated is None else activated.shape[-1]
    given = [t for t in (sums, bias, residual, total, gain, activated) if t is not None]
    assert all(t.is_contiguous() for t in given), "the kernel addresses pixels one after another"
    block = triton.next_power_of_2(channels)
    assert channels <= filled <= block, f"{filled} channels cannot be filled from {channels}"
    rows = max(ELEMENTS // block, 1)
    kernel: Any = _between
    with torch.cuda.device_of(sums):
        kernel[(triton.cdiv(pixels, rows),)](
            *(sums if t is None else t for t in (sums, bias, residual, total, gain, activated)),
            pixels,
            height,
            width,
            channels**0.5,
            channels,
            filled,
            rows,
            block,
            phases,
            bias is not None,
            residual is not None,
            total is not None,
            activated is not None,
            silu,
            num_warps=4,
        )
