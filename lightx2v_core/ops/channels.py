"""What stands between two convolutions, in one pass over channels-last activations.

A convolution here gives its sums without bias. One pass adds the bias and what else is to be added,
normalises over the channels and applies SiLU, straight into the input of the next convolution.
"""

from __future__ import annotations

import functools
import logging
import math
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import Card, describe_card

log = logging.getLogger(__name__)

LEAST_SQUARES = 1e-24  # a pixel of zeros stays one


class Between(NamedTuple):
    """What becomes of a convolution's sums, y = sums + bias + residual.

    `total` takes y and may be the memory of the sums or of the residual; `activated` takes y
    normalised, times `gain` C, and through SiLU where `silu`. Either may be missing. Rows of all
    are pixels: total and residual NHWC, activated the same and contiguous in each clip.
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
        between.activated.copy_(F.silu(scaled) if between.silu else scaled)
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


def blocked_by(card: Card) -> str | None:
    """Why the Triton kernel cannot run there; None when it can."""
    if card.kind != "cuda":
        return f"it was tried on NVIDIA cards only and this is {card.kind}"
    if card.capability < (8, 0):
        return f"it needs compute capability 8.0 and this is {'.'.join(map(str, card.capability))}"
    return None if find_spec("triton") else "the triton package is not installed"


@functools.lru_cache(maxsize=16)
def select_pass(device: torch.device) -> Pass:
    """The Triton kernel where it runs and gives what it should, else PyTorch's row."""
    reason = blocked_by(describe_card(device)) or _failure(device)
    log.info("passes between convolutions: %s", f"PyTorch ({reason})" if reason else "Triton")
    if reason:
        return plain
    from .kernels.channels import fused

    return fused


def _failure(device: torch.device) -> str | None:
    """Triton compiles at first use, which needs a working C compiler; None when all is well."""
    try:
        from .kernels.channels import COMPILE_ERRORS, fused
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    x = torch.linspace(-3.0, 3.0, 64 * 48, device=device).view(1, 8, 8, 48).half()
    gain, results = torch.linspace(0.5, 1.5, 48, device=device).half(), []
    for row in (plain, fused):
        total, activated = torch.empty_like(x), torch.empty_like(x)
        try:
            row(x, Between(gain, x, total, gain, activated))
        except COMPILE_ERRORS as error:
            return f"triton does not work here: {' '.join(str(error).split())[:200]}"
        results.append(torch.stack([total, activated]).float())
    if (results[0] - results[1]).abs().max() > 0.02:
        return "the kernel gave wrong numbers on this card"
    return None
