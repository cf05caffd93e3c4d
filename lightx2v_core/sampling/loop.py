"""The denoising loop. Knows flow matching; knows nothing of Wan, devices or screens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ..datatypes import SamplerPlan, StepEvent
from ..errors import CapabilityError, RequestError

Denoiser = Callable[[Tensor, float, int], Tensor]  # (x_BCTHW, sigma, step) -> velocity_BCTHW
OnStep = Callable[[StepEvent], None]


def _ignore(event: StepEvent) -> None:
    """Default callback."""


def euler_step(x: Tensor, denoised: Tensor, sigma: float, to: float, _rng: Generator) -> Tensor:
    """Follow the straight line from x to the clean estimate."""
    return denoised + (x - denoised) * (to / sigma)


def renoise_step(x: Tensor, denoised: Tensor, _sigma: float, to: float, rng: Generator) -> Tensor:
    """Jump to the clean estimate, then add fresh noise back (the rollout of Self-Forcing).

    https://arxiv.org/abs/2506.08009
    """
    if to == 0.0:
        return denoised
    noise = torch.randn(x.shape, generator=rng, device=rng.device, dtype=torch.float32)
    return (1.0 - to) * denoised + to * noise.to(x.device)


SOLVERS = {"euler": euler_step, "renoise": renoise_step}


def make_noise(shape: tuple[int, ...], rng: Generator) -> Tensor:
    """Standard normal float32 on the generator's device."""
    return torch.randn(shape, generator=rng, device=rng.device, dtype=torch.float32)


@torch.inference_mode()
def sample(
    denoise: Denoiser,
    x_BCTHW: Tensor,
    plan: SamplerPlan,
    rng: Generator,
    on_step: OnStep = _ignore,
    steps: range | None = None,
) -> Tensor:
    """Follow plan.sigmas from noise to latent, float32 throughout.

    `steps` takes a part of the plan: x is then the unscaled state before the first of them, and the
    state after the last is returned, so that two stages equal one bit for bit. Raise inside
    `on_step` or `denoise` to cancel.
    """
    if plan.solver not in SOLVERS:
        raise RequestError(f"solver {plan.solver!r} is unknown; use {', '.join(SOLVERS)}")
    solver = SOLVERS[plan.solver]
    x = x_BCTHW.float()
    for step in steps or range(plan.steps):
        sigma, to = plan.sigmas[step], plan.sigmas[step + 1]
        denoised = x - sigma * denoise(x, sigma, step).float()
        x = denoised if to == 0.0 else solver(x, denoised, sigma, to, rng)
        if not torch.isfinite(x).all():
            raise CapabilityError(
                f"the latent is not finite after step {step + 1} of {plan.steps}, "
                f"sigma {sigma:.4f}; an attention or number format overflowed: "
                "choose attention sdpa, or another precision"
            )
        on_step(StepEvent(step + 1, plan.steps, sigma, denoised, x))
    return x
