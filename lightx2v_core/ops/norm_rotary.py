"""RMS norm over the full dim, then rotary, of queries and keys: plain, or one pass in Triton."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor, nn

from ..device import describe_card
from .layers import RMSNorm
from .triton_support import is_plain_call, triton_blocked_by

log = logging.getLogger(__name__)

Rotary = tuple[Tensor, Tensor]  # cos, sin: L x D/2 float32
HEAD_DIM = 128
HALVES = (torch.bfloat16, torch.float16)
OWN_ERROR = 0.01  # of the trial: one rounding of bfloat16 is 0.004 at most


def norm_rotate(x_BLE: Tensor, norm: nn.Module, rotary: Rotary | None) -> Tensor:
    """`norm` over E, then each pair of lanes turned by its token's angle: BLND in x's dtype.

    Without `rotary` nothing is turned. One pass where nothing needs a gradient and a kernel runs;
    it rounds once, after the rotary, the plain way also after the norm.
    """
    if fuses(x_BLE, norm):
        from .kernels import prepass

        return prepass.half_rows(split_heads(x_BLE), norm_of(norm), rotary)
    return norm_rotate_plainly(x_BLE, norm, rotary)


def norm_rotate_plainly(x_BLE: Tensor, norm: nn.Module, rotary: Rotary | None) -> Tensor:
    x_BLND = split_heads(norm(x_BLE))
    return x_BLND if rotary is None else rotate(x_BLND, rotary)


def rotate(x_BLND: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair of lanes by its token's angle, in float32; result in the input's dtype."""
    cos, sin = (part[None, :, None, :] for part in rotary)
    even, odd = x_BLND.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x_BLND.dtype)


def split_heads(x_BLE: Tensor) -> Tensor:
    return x_BLE.unflatten(-1, (-1, HEAD_DIM))  # BLE -> BLND


def fuses(x_BLE: Tensor, *norms: nn.Module) -> bool:
    """Whether our kernels may do what `norms` do to `x_BLE`: decided from kinds and devices."""
    return (
        x_BLE.is_cuda
        and x_BLE.dtype in HALVES
        and x_BLE.stride(-1) == 1
        and is_plain_call()
        # A host's own layers may cast, patch or move their weights in ways of their own.
        and all(type(norm) is RMSNorm and norm.weight.device == x_BLE.device for norm in norms)
        and kernel_runs(x_BLE.device)
    )


def norm_of(norm: nn.Module) -> tuple[Tensor, float]:
    """Weight and eps of an RMSNorm."""
    assert isinstance(norm, RMSNorm) and norm.eps is not None, "fuses() lets only those through"
    return norm.weight, norm.eps


@cache
def kernel_runs(device: torch.device) -> bool:
    """Tried once on each device, before its first use; said once why not."""
    reason = triton_blocked_by(describe_card(device)) or _trial(device)
    if reason:
        log.info("norm and rotary take several passes: %s", reason)
    return reason is None


def _trial(device: torch.device) -> str | None:
    """What is wrong with the kernel here, from a few tokens; None when it equals the plain way."""
    from .kernels import prepass
    from .trial import failure

    generator = torch.Generator(device).manual_seed(0)
    x_BLE = torch.randn(1, 37, 3 * HEAD_DIM, generator=generator, device=device).bfloat16()
    norm = RMSNorm(3 * HEAD_DIM, eps=1e-6, device=device)
    angle = torch.rand(37, HEAD_DIM // 2, generator=generator, device=device)
    rotary = (angle.cos(), angle.sin())
    expected = norm_rotate_plainly(x_BLE, norm, rotary)
    return failure(
        lambda: prepass.half_rows(split_heads(x_BLE), norm_of(norm), rotary), expected, OWN_ERROR
    )
