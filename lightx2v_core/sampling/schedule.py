"""The trained schedule of step-distilled Wan, and the plan of one run. Knows no model.

A list value x of 1000 stands for s = x / 1000 on an unshifted line; the shift warps it:
sigma = shift * s / (1 + (shift - 1) * s).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ..datatypes import SamplerPlan
from ..errors import RequestError

DISTILL_LIST = (1000, 750, 500, 250)
BOUNDARY_TOLERANCE = 1e-6  # shift 3 gives sigma = 0.9 up to rounding, which counts as high noise


def shifted(s: float, shift: float) -> float:
    """The sigma at `s` in [0, 1] of the unshifted line."""
    return shift * s / (1 + (shift - 1) * s)


def list_sigmas(
    denoising_steps: Sequence[float], shift: float | Sequence[float]
) -> tuple[float, ...]:
    """Sigmas of a published list such as [1000, 750, 500, 250], 0 appended. `shift` is one number,
    or one for each step."""
    values = list(denoising_steps)
    if not values or any(not 0 < x <= 1000 for x in values) or values != sorted(set(values))[::-1]:
        raise RequestError(
            f"denoising step list {[round(x, 3) for x in values]} must fall from 1000 towards 0, "
            f"each value once; use {list(DISTILL_LIST)}"
        )
    shifts = one_for_each(shift, len(values), "shifts")
    sigmas = [shifted(x / 1000, _checked(s)) for x, s in zip(values, shifts, strict=True)]
    for step, (sigma, to) in enumerate(pairwise(sigmas), start=1):
        if to >= sigma:
            raise RequestError(
                f"shifts {', '.join(f'{s:g}' for s in shifts)} make sigma rise from {sigma:.4f} to "
                f"{to:.4f} after step {step}; give shifts that do not rise that much"
            )
    return (*sigmas, 0.0)


def one_for_each(given: float | Sequence[float], steps: int, what: str) -> tuple[float, ...]:
    """One number for all steps, or as many as there are steps; `what` names them in the message."""
    if isinstance(given, (int, float)):
        return (float(given),) * steps
    if len(given) != steps:
        raise RequestError(
            f"{len(given)} {what} are given and the run has {steps} steps; give one for each step, "
            "or a single one for all"
        )
    return tuple(map(float, given))


def step_values(steps: int) -> tuple[float, ...]:
    """The list of `steps` equal parts of the unshifted line."""
    if not 1 <= steps <= 1000:
        raise RequestError(f"{steps} steps asked for; use 1 to 1000 (4 for a distilled model)")
    return tuple(1000 * (1 - i / steps) for i in range(steps))


def step_sigmas(steps: int, shift: float | Sequence[float]) -> tuple[float, ...]:
    """Sigmas of `steps` equal parts of the unshifted line, 0 appended."""
    return list_sigmas(step_values(steps), shift)


def split_first(values: Sequence[float], parts: int) -> tuple[float, ...]:
    """The list with its first step divided into `parts` equal ones, for a model that is not
    distilled and needs smaller ones."""
    if len(values) < 2:
        raise RequestError(
            "a first stage without distillation needs at least two steps in all; use the trained "
            f"{list(DISTILL_LIST)}"
        )
    first, second = values[0], values[1]
    return (*(first + (second - first) * i / parts for i in range(parts)), *values[1:])


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
    high_steps = steps_above(sigmas, boundary)
    if not 0 < high_steps < len(sigmas) - 1:
        raise RequestError(
            f"boundary {boundary} with shift {shift} gives {high_steps} of {len(sigmas) - 1} steps "
            "to the high-noise expert and leaves one without work; change the boundary or the shift"
        )
    return experts_by_step(len(sigmas) - 1, high_steps)


def steps_above(sigmas: Sequence[float], boundary: float) -> int:
    """How many steps start at `boundary` or above it."""
    return sum(sigma >= boundary - BOUNDARY_TOLERANCE for sigma in sigmas[:-1])


def stage_names(plan: SamplerPlan) -> tuple[str, str, str]:
    """By the number of an expert in the plan."""
    if 1 in plan.experts:
        return ("high noise", "low noise", "not distilled")
    return ("distilled" if plan.experts else "one model", "low noise", "not distilled")


def describe(
    plan: SamplerPlan, loras: Sequence[Sequence[str]] = (), seconds: Sequence[float] = ()
) -> str:
    """The plan in words: one line per stage with sigmas, timesteps and the rules used, then the
    warnings. `loras` are what each expert has, `seconds` how long each stage took, once known."""
    names = stage_names(plan)
    lines = [
        f"{plan.steps} steps, {plan.solver}, {_cfg(plan, range(plan.steps))}"
        + (f" ({plan.rule})" if plan.rule else "")
    ]
    for number, (expert, steps) in enumerate(plan.stages()):
        sigmas = plan.sigmas[steps.start : steps.stop + 1]
        arrows = " → ".join(f"{sigma:.4f}" for sigma in sigmas)
        times = ", ".join(f"{1000 * sigma:.1f}" for sigma in sigmas[:-1])
        span = f"{steps.start + 1}" if len(steps) == 1 else f"{steps.start + 1}-{steps.stop}"
        line = f"  step {span}, {names[expert]}: sigma {arrows}; timesteps {times}"
        if plan.cfgs:
            line += f"; {_cfg(plan, steps)}"
        if expert < len(loras) and loras[expert]:
            line += f"; LoRA {', '.join(loras[expert])}"
        lines.append(line + (f"; {seconds[number]:.1f} s" if number < len(seconds) else ""))
    return "\n".join([*lines, *(f"warning: {warning}" for warning in plan.warnings)])


def _cfg(plan: SamplerPlan, steps: range) -> str:
    values = [plan.cfg_at(step) for step in steps]
    if len(set(values)) > 1:
        return f"CFG {', '.join(f'{value:g}' for value in values)}"
    return "CFG off" if values[0] == 1.0 else f"CFG {values[0]:g}"
