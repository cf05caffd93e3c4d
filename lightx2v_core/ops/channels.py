"""What stands between two convolutions, in one pass over channels-last activations.

A convolution here gives its sums without bias. One pass adds the bias and what else is to be added,
normalises over the channels and applies SiLU, straight into the input of the next convolution.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import describe_card
from .trial import failure
from .triton_support import triton_blocked_by

log = logging.getLogger(__name__)

LEAST_SQUARES = 1e-24  # a pixel of zeros stays one
OWN_ERROR = 0.005  # of the trial: one rounding of float16 is 0.0005 at most


class Between(NamedTuple):
    """What becomes of a convolution's sums, y = sums + bias + residual.

    `total` takes y and may be the memory of the sums or of the residual; `activated` takes y
    normalised, times `gain` C, and through SiLU where `silu`. Either may be missing. Rows of all
    are pixels: total and residual NHWC, activated the same and contiguous in each clip. Where
    activated has more channels, up to the next power of two, zeros fill the others.
    """

    bias: Tensor | None = None
    residual: Tensor | None = None
    total: Tensor | None = None
    gain: Tensor | None = None
    activated: Tensor | None = None
    silu: bool = True


class Pass(Protocol):
    """`sums` are NHWC; `phases` are four pictures in the channels, see `interleaved`."""

    def __call__(self, sums: Tensor, between: Between, phases: bool = False) -> None: ...


def plain(sums: Tensor, between: Between, phases: bool = False) -> None:
    """In PyTorch: always there, and what the kernel is tested against."""
    y = interleaved(sums) if phases else sums
    if between.bias is not None:
        y = y + between.bias
    if between.residual is not None:
        y = y + between.residual
    if between.activated is not None and between.gain is not None:
        squares = y.float().square().sum(dim=-1, keepdim=True).clamp_min(LEAST_SQUARES)
        scaled = y.float() * squares.rsqrt() * math.sqrt(y.shape[-1]) * between.gain.float()
        channels = scaled.shape[-1]
        between.activated[..., :channels] = F.silu(scaled) if between.silu else scaled
        between.activated[..., channels:] = 0.0
    if between.total is not None:
        between.total.copy_(y)


def interleaved(sums_NHWK: Tensor) -> Tensor:
    """N (H + 1) (W + 1) (4 C) to N 2H 2W C.

    Pixel (2 i + a, 2 j + b) is channel group 2 a + b of cell (i + a, j + b).
    """
    N, H, W, K = sums_NHWK.shape
    y = sums_NHWK.new_empty(N, H - 1, 2, W - 1, 2, K // 4)
    for a in (0, 1):
        for b in (0, 1):
            group = sums_NHWK[:, a : H - 1 + a, b : W - 1 + b].unflatten(-1, (4, -1))
            y[:, :, a, :, b] = group[..., 2 * a + b, :]
    return y.flatten(3, 4).flatten(1, 2)


@functools.lru_cache(maxsize=16)
def select_pass(device: torch.device) -> Pass:
    """The Triton kernel where it runs and gives what it should, else PyTorch's row."""
    reason = triton_blocked_by(describe_card(device)) or _trial(device)
    log.info("passes between convolutions: %s", f"PyTorch ({reason})" if reason else "Triton")
    if reason:
        return plain
    from .kernels.channels import fused

    return fused


def _trial(device: torch.device) -> str | None:
    """What is wrong with the kernel here, from a few pixels; None when it equals `plain`."""
    x = torch.linspace(-3.0, 3.0, 64 * 48, device=device).view(1, 8, 8, 48).half()
    gain = torch.linspace(0.5, 1.5, 48, device=device).half()

    def results(row: Pass) -> Tensor:
        total, activated = torch.empty_like(x), x.new_empty(*x.shape[:-1], 64)
        row(x, Between(gain, x, total, gain, activated))
        return torch.cat([total, activated], dim=-1)

    def work() -> Tensor:
        from .kernels.channels import fused

        return results(fused)

    return failure(work, results(plain), OWN_ERROR)
