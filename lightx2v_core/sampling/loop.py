"""The denoising loop. Knows flow matching; knows nothing of Wan, devices or screens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..datatypes import SamplerPlan, StepEvent
from ..errors import CapabilityError, RequestError

log = logging.getLogger(__name__)

Denoiser = Callable[[Tensor, float, int], Tensor]  # (x_BCTHW, sigma, step) -> velocity_BCTHW
OnStep = Callable[[StepEvent], None]
Rng = Generator | Sequence[Generator]  # one for the whole batch, or one for each item
LEAST_SPREAD = 1e-6  # standard deviation of a latent frame; a black frame's is near 1
SEEDS = 2**64


class Rescue(NamedTuple):
    """What to do about a broken latent: `backend` says what computed it, `switch` puts the plain
    rows in its place and says whether that changed anything."""

    backend: str
    switch: Callable[[], bool]


def _ignore(event: StepEvent) -> None:
    """Default callback."""


def euler_step(x: Tensor, denoised: Tensor, sigma: float, to: float, _rng: Rng) -> Tensor:
    """Follow the straight line from x to the clean estimate."""
    return denoised + (x - denoised) * (to / sigma)


def renoise_step(x: Tensor, denoised: Tensor, _sigma: float, to: float, rng: Rng) -> Tensor:
    """Jump to the clean estimate, then add fresh noise back (the rollout of Self-Forcing).

    https://arxiv.org/abs/2506.08009
    """
    if to == 0.0:
        return denoised
    return (1.0 - to) * denoised + to * make_noise(tuple(x.shape), rng).to(x.device)


SOLVERS = {"euler": euler_step, "renoise": renoise_step}


def make_rngs(seed: int, count: int, first: int = 0) -> list[Generator]:
    """A generator on the CPU for each item of a batch: item i is that of seed + i alone."""
    return [torch.Generator().manual_seed((seed + first + i) % SEEDS) for i in range(count)]


def make_noise(shape: tuple[int, ...], rng: Rng) -> Tensor:
    """Standard normal float32 on the generator's device."""
    if isinstance(rng, Generator):
        return torch.randn(shape, generator=rng, device=rng.device, dtype=torch.float32)
    if len(rng) != shape[0]:
        raise RequestError(f"{len(rng)} generators given for a batch of {shape[0]}")
    return torch.cat([make_noise((1, *shape[1:]), one) for one in rng])


@torch.inference_mode()
def sample(
    denoise: Denoiser,
    x_BCTHW: Tensor,
    plan: SamplerPlan,
    rng: Rng,
    on_step: OnStep = _ignore,
    steps: range | None = None,
    rescue: Rescue | None = None,
) -> Tensor:
    """Follow plan.sigmas from noise to latent, float32 throughout.

    `steps` takes a part of the plan: x is then the unscaled state before the first of them, and the
    state after the last is returned, so that two stages equal one bit for bit. Raise inside
    `on_step` or `denoise` to cancel. A latent that is broken after a step is computed once more
    after `rescue.switch`; CapabilityError, naming step and backend, if that does not mend it.
    """
    if plan.solver not in SOLVERS:
        raise RequestError(f"solver {plan.solver!r} is unknown; use {', '.join(SOLVERS)}")
    solver = SOLVERS[plan.solver]
    x = x_BCTHW.float()
    for step in steps or range(plan.steps):
        sigma, to = plan.sigmas[step], plan.sigmas[step + 1]
        denoised = x - sigma * denoise(x, sigma, step).float()
        if fault := find_fault(denoised):
            where = f"the latent {fault} after step {step + 1} of {plan.steps}, sigma {sigma:.4f}"
            if rescue is not None and rescue.switch():
                log.warning("%s (%s): once more with the plain rows", where, rescue.backend)
                denoised = x - sigma * denoise(x, sigma, step).float()
                fault = find_fault(denoised)
            if fault:
                raise CapabilityError(_broken(where, rescue))
        x = denoised if to == 0.0 else solver(x, denoised, sigma, to, rng)
        on_step(StepEvent(step + 1, plan.steps, sigma, denoised, x))
    return x


def find_fault(latent_BCTHW: Tensor) -> str | None:
    """What is wrong with a latent that would decode to black frames, or None. One look at it."""
    spread_BT = latent_BCTHW.transpose(1, 2).flatten(2).std(dim=2)
    least, most = torch.aminmax(spread_BT)
    if not torch.isfinite(torch.stack((least, most))).all():
        return "is not finite"
    return "has frames without any variation" if least < LEAST_SPREAD else None


def _broken(where: str, rescue: Rescue | None) -> str:
    if rescue is None:
        return (
            f"{where}; an attention or number format overflowed: choose attention sdpa, or "
            "another precision"
        )
    return (
        f"{where}, computed with {rescue.backend}, and with attention sdpa and dequantised matmuls "
        "too: the weights or the conditioning are broken, or their numbers too large for the "
        "compute dtype; try another file of this release"
    )
