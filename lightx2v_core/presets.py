"""What each release was trained for, the plan that follows from it, and where the demo lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .checkpoint.detect import UNKNOWN, CheckpointInfo
from .datatypes import SamplerPlan, VideoSize
from .errors import CheckpointError, RequestError
from .sampling.loop import SOLVERS
from .sampling.schedule import (
    DISTILL_LIST,
    experts_by_boundary,
    experts_by_step,
    list_sigmas,
    step_sigmas,
)

FPS = 16
DEMO_FOLDER = Path(__file__).parent / "demo"
DEMO_FILES = {
    "t2v": "demo_t2v.safetensors",
    "i2v": "demo_i2v.safetensors",
    "vae": "demo_vae.safetensors",
    "text": "demo_umt5.safetensors",
}


@dataclass(frozen=True, slots=True)
class Preset:
    """Trained settings of a release: schedule, guidance, split of two experts, size."""

    name: str
    denoising_list: tuple[int, ...] = DISTILL_LIST
    shift: float = 5.0
    cfg: float = 1.0
    solver: str = "euler"
    high_steps: int = 2  # of a pair of experts
    size: VideoSize = VideoSize(832, 480, 81)
    fps: int = FPS


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("distill-4step"),
        Preset("distill-4step-720p", size=VideoSize(1280, 720, 81)),
        Preset("distill-4step-shift7", shift=7.0),  # nvfp4-sparse of Wan 2.2 I2V
        Preset("flf2v-4step", shift=16.0),
        Preset("demo-4step", size=VideoSize(128, 128, 17)),
    )
}


def preset_for(info: CheckpointInfo) -> Preset:
    """The preset of a detected file. A release nobody knows gets the one all of them share."""
    if info.release == "demo":
        return PRESETS["demo-4step"]
    shared = "flf2v-4step" if info.task == "flf2v" else "distill-4step"
    return PRESETS[info.preset or shared]


def note_for(info: CheckpointInfo) -> str:
    """What a plan should say of a preset that the file's release does not prescribe; or nothing."""
    if info.release == UNKNOWN:
        return "release unknown: distilled settings assumed"
    if info.release == "base":
        return "not distilled: these four steps need a distillation LoRA beside it"
    return "" if info.preset else "distilled settings assumed"


@dataclass(frozen=True, slots=True)
class Overrides:
    """What a person set by hand; None leaves the preset's value."""

    steps: int | None = None
    shift: float | None = None
    denoising_list: Sequence[float] | None = None
    cfg: float | None = None
    solver: str | None = None
    high_steps: int | None = None
    boundary: float | None = None


def make_plan(
    preset: Preset, overrides: Overrides | None = None, experts: int = 1, note: str = ""
) -> SamplerPlan:
    """The plan of one run. `experts` is 1 or 2; `note` is added to the rule the plan shows.

    A list wins over a step count; a boundary over a number of high-noise steps.
    """
    asked = overrides or Overrides()
    shift = preset.shift if asked.shift is None else asked.shift
    solver = asked.solver or preset.solver
    if solver not in SOLVERS:
        raise RequestError(f"solver {solver!r} is unknown; use {', '.join(SOLVERS)}")
    if asked.denoising_list:
        sigmas = list_sigmas(asked.denoising_list, shift)
        rules = [f"list {', '.join(f'{x:g}' for x in asked.denoising_list)}, shift {shift:g}"]
    elif asked.steps is not None:
        sigmas = step_sigmas(asked.steps, shift)
        rules = [f"{asked.steps} equal steps, shift {shift:g}"]
    else:
        sigmas = list_sigmas(preset.denoising_list, shift)
        rules = [f"preset {preset.name}, shift {shift:g}"]
    split, rule = _split(preset, asked, sigmas, shift) if experts == 2 else ((), "")
    rules += [text for text in (rule, note) if text]
    cfg = preset.cfg if asked.cfg is None else asked.cfg
    if not 1.0 <= cfg <= 30.0:
        raise RequestError(f"CFG {cfg:g} is not between 1 (off) and 30; use 1 for distilled models")
    return SamplerPlan(sigmas, solver, split, cfg, "; ".join(rules))


def _split(
    preset: Preset, asked: Overrides, sigmas: Sequence[float], shift: float
) -> tuple[tuple[int, ...], str]:
    steps = len(sigmas) - 1
    if asked.boundary is not None:
        experts = experts_by_boundary(sigmas, asked.boundary, shift)
        return experts, f"high noise while sigma >= {asked.boundary:g}"
    high_steps = asked.high_steps
    if high_steps is None:
        trained = steps == len(preset.denoising_list)
        high_steps = preset.high_steps if trained else max(1, steps // 2)
    return experts_by_step(steps, high_steps), f"high noise for the first {high_steps} steps"


def demo_path(part: str) -> Path:
    """A file of the demo family: t2v, i2v, vae or text."""
    path = DEMO_FOLDER / DEMO_FILES[part]
    if not path.is_file():
        raise CheckpointError(
            f"the demo file {path} is not there; this copy of the pack is incomplete: "
            "install it again, or name your own model file"
        )
    return path
