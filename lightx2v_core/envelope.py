"""What a plan does outside of what its model was trained for: one named warning each, with the fix.

COSTS says in which measure the demo model gets worse by it (training.table --misuse, its figures in
benchmarks/results/misuse.json): prompt following ("score"), likeness to real clips ("Fréchet
distance"), variety between seeds ("diversity").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .checkpoint.detect import CheckpointInfo
from .datatypes import SamplerPlan, VideoSize
from .errors import RequestError
from .presets import UNDISTILLED, Overrides, Preset, is_distilled
from .sampling.schedule import step_values

SAME = 2.0  # of list values: those from 999 and from 1000 are both as published
# Name of a warning -> measures that the demo model loses in.
COSTS: dict[str, tuple[str, ...]] = {
    "cfg": ("score", "Fréchet distance"),
    "steps": ("score", "Fréchet distance"),
    "shift": ("score", "Fréchet distance"),  # below the trained one
    "shift above": (),  # at 8 nothing is to be seen; at 12 less than a point of the score
    "list": ("score", "Fréchet distance"),
    "frames": ("score", "Fréchet distance"),
    "size": ("score", "Fréchet distance"),
    "not distilled": ("score", "Fréchet distance"),
    "one expert": ("score",),
    "lora strength": ("score", "Fréchet distance"),
    "caching": ("score", "Fréchet distance"),  # two of four steps skipped; one costs little
}
LARGER, SMALLER = 2.5, 0.4  # times the pixels of the trained frame; 480p releases run at 720p too


Lora = tuple[str, float | Sequence[float], CheckpointInfo]


@dataclass(frozen=True, slots=True)
class Run:
    """What is known of a run beside its plan. `loras` of each expert: (file, strengths, what it
    is)."""

    info: CheckpointInfo | None  # of the first expert; None for a model of another loader
    preset: Preset
    size: VideoSize | None = None
    loras: Sequence[Sequence[Lora]] = ()
    experts: int = 1
    asked: Overrides = Overrides()
    caching: str | None = None  # the name of what skips steps, such as EasyCache
    base: CheckpointInfo | None = None  # of the model for a first stage without distillation

    @property
    def facts(self) -> list[CheckpointInfo]:
        return [info for loras in self.loras for _, _, info in loras]


def find_warnings(plan: SamplerPlan, run: Run) -> tuple[str, ...]:
    """Each as "name: what is unusual, what it costs, what to do instead"."""
    return (*_schedule(plan, run), *_guidance(plan, run), *_model(plan, run), *_size(run))


def enforce(warnings: Sequence[str], strict: bool) -> None:
    """With `strict` a warning is an error."""
    if strict and warnings:
        raise RequestError(f"strict is on: {'; '.join(warnings)}")


def _warning(name: str, text: str, fix: str, costs: tuple[str, ...] | None = None) -> str:
    if costs := COSTS[name] if costs is None else costs:
        text += f" (the demo model gets worse in {' and '.join(costs)})"
    return f"{name}: {text}; {fix}"


def _schedule(plan: SamplerPlan, run: Run) -> list[str]:
    preset, asked, found = run.preset, run.asked, []
    if not preset.is_distilled:
        return []
    steps = plan.steps - max(asked.base_steps - 1, 0)
    if steps < preset.steps:
        text = f"{steps} steps on a model distilled for {preset.steps}"
        found.append(_warning("steps", text, f"use {preset.steps}, or schedule auto"))
    shifts = asked.shifts or ([] if asked.shift is None else [asked.shift])
    if any(abs(shift - preset.shift) > 0.01 for shift in shifts):
        told = ", ".join(f"{shift:g}" for shift in shifts)
        text = f"shift {told} on a model trained at {preset.shift:g}"
        costs = COSTS["shift" if min(shifts) < preset.shift else "shift above"]
        fix = f"set shift {preset.shift:g}, or schedule auto"
        found.append(_warning("shift", text, fix, costs))
    values = asked.denoising_list
    if values and len(values) >= preset.steps and not asked.base_steps:
        trained = preset.values if len(values) == preset.steps else step_values(len(values))
        if any(abs(a - b) > SAME for a, b in zip(values, trained, strict=True)):
            text = f"timesteps {_told(values)} are not those of the training"
            found.append(_warning("list", text, f"use {_told(trained)}, or schedule auto"))
    return found


def _told(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _guidance(plan: SamplerPlan, run: Run) -> list[str]:
    """CFG counts where the step is of a distilled model: not the first stage of three, nor steps
    in which every LoRA is off."""
    if not run.preset.is_distilled:
        return []
    base = run.base
    if base is not None and base.preset and base.release not in UNDISTILLED and plan.cfg > 1.0:
        text = f"CFG {plan.cfg:g} on model_base, which is distilled itself (release {base.release})"
        return [_warning("cfg", text, "connect the model that is not distilled, without LoRA")]
    guided = [
        step
        for step in range(plan.steps)
        if plan.cfg_at(step) > 1.0 and plan.expert_at(step) != 2 and not _is_off(plan, run, step)
    ]
    if not guided:
        return []
    cfg = max(plan.cfg_at(step) for step in guided)
    where = "" if len(guided) == plan.steps else f" in step {', '.join(str(s + 1) for s in guided)}"
    text = f"CFG {cfg:g}{where} on a CFG-distilled model burns the picture and costs twice the time"
    return [_warning("cfg", text, "set CFG 1.0")]


def _is_off(plan: SamplerPlan, run: Run, step: int) -> bool:
    """Whether a base model runs this step bare: its LoRAs are for other steps."""
    if run.info is not None and run.info.preset and is_distilled(run.info):
        return False
    expert = plan.expert_at(step)
    loras = run.loras[expert] if expert < len(run.loras) else ()
    return bool(loras) and all(
        not isinstance(s, (int, float)) and step < len(s) and s[step] == 0.0 for _, s, _ in loras
    )


def _model(plan: SamplerPlan, run: Run) -> list[str]:
    found, info = [], run.info
    if info is not None and not is_distilled(info, run.facts) and plan.cfg == 1.0:
        found.append(
            _warning(
                "not distilled",
                f"{plan.steps} steps without CFG on a model that is not distilled",
                "put a distillation LoRA on it, or use the preset auto",
            )
        )
    if info is not None and info.expert and run.experts == 1 and info.family == "wan2.2":
        other = {"high": "low", "low": "high"}[info.expert]
        found.append(
            _warning(
                "one expert",
                f"the {info.expert}-noise expert of Wan 2.2 runs all steps alone, "
                f"{'which leaves noise' if info.expert == 'high' else 'untrained for the first'}",
                f"connect the {other}-noise file too",
            )
        )
    for name, strengths, lora in {lora[0]: lora for loras in run.loras for lora in loras}.values():
        wanted = run.preset.lora_strength
        largest = strengths if isinstance(strengths, (int, float)) else max(strengths, key=abs)
        if lora.preset and not 0.5 * wanted <= largest <= 2.0 * wanted:
            text = f"{name} at {largest:g}, made for {wanted:g} (the alpha in the file is applied)"
            found.append(_warning("lora strength", text, f"set strength {wanted:g}"))
    if run.caching and run.preset.is_distilled:
        text = f"{run.caching} skips whole steps, and a distilled model has only {plan.steps}"
        found.append(_warning("caching", text, "remove it"))
    return found


def _size(run: Run) -> list[str]:
    if run.size is None:
        return []
    found, trained, size = [], run.preset.size, run.size
    if size.frames > trained.frames:
        text = f"{size.frames} frames, trained with {trained.frames}: motion repeats or drifts"
        found.append(_warning("frames", text, f"use {trained.frames} or fewer"))
    ratio = size.width * size.height / (trained.width * trained.height)
    if not SMALLER <= ratio <= LARGER:
        text = f"{size.width}x{size.height}, trained at {trained.width}x{trained.height}"
        found.append(_warning("size", text, "use a size near that, of any aspect"))
    return found
