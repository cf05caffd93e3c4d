"""The trained schedule of step-distilled Wan, and the plan of one run. Knows no model.

A list value x of 1000 stands for s = x / 1000 on an unshifted line; the shift warps it:
sigma = shift * s / (1 + (shift - 1) * s).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..datatypes import SamplerPlan
from ..errors import RequestError

DISTILL_LIST = (1000, 750, 500, 250)
BOUNDARY_TOLERANCE = 1e-6  # shift 3 gives sigma = 0.9 up to rounding, which counts as high noise


def shifted(s: float, shift: float) -> float:
    """The sigma at `s` in [0, 1] of the unshifted line."""
    return shift * s / (1 + (shift - 1) * s)


def list_sigmas(denoising_steps: Sequence[float], shift: float) -> tuple[float, ...]:
    """Sigmas of a published list such as [1000, 750, 500, 250], 0 appended."""
    values = list(denoising_steps)
    if not values or any(not 0 < x <= 1000 for x in values) or values != sorted(set(values))[::-1]:
        raise RequestError(
            f"denoising step list {values} must fall from 1000 towards 0, each value once; "
            f"use {list(DISTILL_LIST)}"
        )
    return (*(shifted(x / 1000, _checked(shift)) for x in values), 0.0)


def step_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """Sigmas of `steps` equal parts of the unshifted line, 0 appended."""
    if not 1 <= steps <= 1000:
        raise RequestError(f"{steps} steps asked for; use 1 to 1000 (4 for a distilled model)")
    return (*(shifted(1 - i / steps, _checked(shift)) for i in range(steps)), 0.0)


def _checked(shift: float) -> float:
    if not 0 < shift <= 100:
        raise RequestError(f"shift {shift} is not between 0 and 100; 5 is what the models expect")
    return shift


def experts_by_step(steps: int, high_steps: int) -> tuple[int, ...]:
    """The first `high_steps` steps by the high-noise expert, the rest by the low-noise one."""
    if not 0 < high_steps < steps:
        raise RequestError(
            f"{high_steps} of {steps} steps by the high-noise expert leaves one expert without "
            f"work; use 1 to {steps - 1}, or give one model"
        )
    return (0,) * high_steps + (1,) * (steps - high_steps)


def experts_by_boundary(sigmas: Sequence[float], boundary: float, shift: float) -> tuple[int, ...]:
    """High noise where sigma >= boundary. `shift` is only named in the message."""
    high_steps = sum(sigma >= boundary - BOUNDARY_TOLERANCE for sigma in sigmas[:-1])
    if not 0 < high_steps < len(sigmas) - 1:
        raise RequestError(
            f"boundary {boundary} with shift {shift} gives {high_steps} of {len(sigmas) - 1} steps "
            "to the high-noise expert and leaves one without work; change the boundary or the shift"
        )
    return experts_by_step(len(sigmas) - 1, high_steps)


def describe(plan: SamplerPlan) -> str:
    """The plan in words: one line per stage, sigmas, timesteps and the rules used."""
    names = ("high noise", "low noise") if plan.experts else ("one model",)
    lines = [
        f"{plan.steps} steps, {plan.solver}, "
        + ("CFG off" if plan.cfg == 1.0 else f"CFG {plan.cfg:g}")
        + (f" ({plan.rule})" if plan.rule else "")
    ]
    for expert, steps in plan.stages():
        sigmas = plan.sigmas[steps.start : steps.stop + 1]
        arrows = " → ".join(f"{sigma:.4f}" for sigma in sigmas)
        times = ", ".join(f"{1000 * sigma:.1f}" for sigma in sigmas[:-1])
        span = f"{steps.start + 1}" if len(steps) == 1 else f"{steps.start + 1}-{steps.stop}"
        lines.append(f"  step {span}, {names[expert]}: sigma {arrows}; timesteps {times}")
    return "\n".join(lines)
