"""What each release was trained for, the plan that follows from it, and where the demo lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    one_for_each,
    split_first,
    step_values,
    steps_above,
)

FPS = 16
DEMO_FOLDER = Path(__file__).parent / "demo"
DEMO_FILES = {
    "t2v": "demo_t2v.safetensors",
    "i2v": "demo_i2v.safetensors",
    "vae": "demo_vae.safetensors",
    "text": "demo_umt5.safetensors",
    "base": "demo_t2v_base.safetensors",
    "lora": "demo_t2v_distill_lora.safetensors",
    "high": "demo_high_noise_lora.safetensors",
    "low": "demo_low_noise_lora.safetensors",
}


SIZE_480P, SIZE_720P = VideoSize(832, 480, 81), VideoSize(1280, 720, 81)
SIZE_DEMO = VideoSize(128, 128, 17)


@dataclass(frozen=True, slots=True)
class Preset:
    """Trained settings of a release: schedule, guidance, split of two experts, LoRA, size."""

    name: str
    denoising_list: tuple[int, ...] = DISTILL_LIST
    shift: float = 5.0
    cfg: float = 1.0
    solver: str = "euler"
    high_steps: int = 2  # of a pair of experts
    size: VideoSize = SIZE_480P
    fps: int = FPS
    equal_steps: int | None = None  # in place of the list
    cfg_low: float | None = None  # of the low-noise expert, where it has its own
    boundary: float = 0.9  # sigma at which the experts of the undistilled model change
    splits_by_boundary: bool = False
    lora_strength: float = 1.0

    @property
    def steps(self) -> int:
        return self.equal_steps or len(self.denoising_list)

    @property
    def is_distilled(self) -> bool:
        return self.cfg == 1.0

    @property
    def values(self) -> tuple[float, ...]:
        """The trained list, before the shift."""
        return step_values(self.equal_steps) if self.equal_steps else self.denoising_list

    def describe_steps(self) -> str:
        if self.equal_steps:
            return f"{self.equal_steps} equal steps"
        return "steps " + ", ".join(map(str, self.denoising_list))


def _base(name: str, steps: int, shift: float, cfg: float, **more: object) -> Preset:
    """As the official configs of Wan 2.1 and 2.2 run a model that is not distilled; their solver is
    UniPC, ours Euler."""
    preset = Preset(name, shift=shift, cfg=cfg, equal_steps=steps)
    return replace(preset, **more)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("distill-4step"),
        Preset("distill-4step-720p", size=SIZE_720P),
        Preset("distill-4step-shift7", shift=7.0),  # nvfp4-sparse of Wan 2.2 I2V
        Preset("flf2v-4step", shift=16.0, size=SIZE_720P),
        Preset("self-forcing-4step", solver="renoise"),
        Preset("causvid-12step", shift=7.0, equal_steps=12, lora_strength=0.3),
        Preset("demo-4step", size=SIZE_DEMO),
        _base("demo-base", 50, 5.0, 3.0, size=SIZE_DEMO),
        _base("base-t2v-1.3b", 50, 5.0, 5.0),
        _base("base-t2v-14b", 50, 5.0, 5.0, size=SIZE_720P),
        _base("base-i2v-480p", 40, 3.0, 5.0),
        _base("base-i2v-720p", 40, 5.0, 5.0, size=SIZE_720P),
        _base("base-flf2v", 50, 16.0, 5.5, size=SIZE_720P),
        _base("base-t2v-a14b", 40, 12.0, 4.0, cfg_low=3.0, boundary=0.875, splits_by_boundary=True),
        _base("base-i2v-a14b", 40, 5.0, 3.5, splits_by_boundary=True),
    )
}
UNDISTILLED = ("base", "demo-base")  # releases of models that are not distilled


def preset_for(info: CheckpointInfo, loras: Sequence[CheckpointInfo] = ()) -> Preset:
    """The preset of a detected file with `loras` on it.

    A distilled file decides by itself, a distillation LoRA on any other file. A model that is known
    not to be distilled gets its own settings while no LoRA is on it. A release nobody knows gets
    the settings all distilled ones share.
    """
    preset = PRESETS[_name_for(info, loras)]
    return replace(preset, boundary=0.875) if info.task == "t2v" else preset


def is_distilled(info: CheckpointInfo, loras: Sequence[CheckpointInfo] = ()) -> bool:
    """Whether four steps may be expected to do, as far as releases tell: a LoRA nobody knows may
    be a distillation."""
    return info.release not in UNDISTILLED or bool(loras)


def _name_for(info: CheckpointInfo, loras: Sequence[CheckpointInfo]) -> str:
    if info.release == "demo":
        return "demo-4step"
    if info.preset and (info.release not in UNDISTILLED or not loras):
        return info.preset
    assumed = "demo-4step" if info.release == "demo-base" else "distill-4step"
    known = next((lora.preset for lora in loras if lora.preset), assumed)
    return "flf2v-4step" if info.task == "flf2v" else known


def note_for(info: CheckpointInfo, loras: Sequence[CheckpointInfo] = ()) -> str:
    """What a plan should say of a preset that the file's release does not prescribe; or nothing."""
    if info.release == "demo":
        return ""
    if info.release in UNDISTILLED and not loras:
        return "not distilled: four steps need a distillation LoRA beside it"
    if info.preset and info.release not in UNDISTILLED:
        return ""
    if known := next((lora.release for lora in loras if lora.preset), None):
        return f"settings of the LoRA, release {known}"
    if info.release in UNDISTILLED:
        return "release of the LoRA unknown: distilled settings assumed"
    if info.release == UNKNOWN:
        return "release unknown: distilled settings assumed"
    return "distilled settings assumed"


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
    shifts: Sequence[float] | None = None  # one for each step, in place of `shift`
    cfgs: Sequence[float] | None = None  # one for each step, in place of `cfg`
    # The first step in so many parts by a model that is not distilled, with its own CFG: motion.
    base_steps: int = 0
    base_cfg: float = 3.5


def make_plan(
    preset: Preset, overrides: Overrides | None = None, experts: int = 1, note: str = ""
) -> SamplerPlan:
    """The plan of one run. `experts` is 1 or 2; `note` is added to the rule the plan shows.

    A list wins over a step count; a boundary over a number of high-noise steps; one shift or CFG
    for each step over a single one.
    """
    asked = overrides or Overrides()
    solver = asked.solver or preset.solver
    if solver not in SOLVERS:
        raise RequestError(f"solver {solver!r} is unknown; use {', '.join(SOLVERS)}")
    values, rule = _values(preset, asked)
    shift = asked.shifts or (preset.shift if asked.shift is None else asked.shift)
    rules = [f"{rule}, shift {_numbers(shift)}"]
    # The split is of the steps as trained; the first of them may be divided afterwards.
    split = ()
    if experts == 2:
        single = shift if isinstance(shift, (int, float)) else preset.shift
        split, rule = _split(preset, asked, list_sigmas(values, single), single)
        rules.append(rule)
    if asked.base_steps:
        values = split_first(values, asked.base_steps)
        split = _with_base(split or (0,) * preset.steps, asked.base_steps, len(values))
        rules.append(f"the first step in {asked.base_steps} by the model that is not distilled")
    sigmas = list_sigmas(values, shift)
    cfgs = _cfgs(preset, asked, split, len(values))
    uniform = len(set(cfgs)) == 1
    rule = "; ".join([*rules, *([note] if note else [])])
    return SamplerPlan(sigmas, solver, split, max(cfgs), rule, () if uniform else cfgs)


def _values(preset: Preset, asked: Overrides) -> tuple[Sequence[float], str]:
    if asked.denoising_list:
        return asked.denoising_list, f"list {_numbers(asked.denoising_list)}"
    if asked.steps is not None:
        return step_values(asked.steps), f"{asked.steps} equal steps"
    return preset.values, f"preset {preset.name}"


def _numbers(given: float | Sequence[float]) -> str:
    numbers = [given] if isinstance(given, (int, float)) else given
    return ", ".join(f"{number:g}" for number in numbers)


def _with_base(split: tuple[int, ...], base_steps: int, steps: int) -> tuple[int, ...]:
    rest = split[1:] if len(split) == steps - base_steps + 1 else (0,) * (steps - base_steps)
    if 0 not in rest:
        raise RequestError(
            "the first stage takes the only step of the distilled high-noise expert; give it two "
            "steps or more (split by step, high_steps 2)"
        )
    return (2,) * base_steps + rest


def _cfgs(preset: Preset, asked: Overrides, split: Sequence[int], steps: int) -> tuple[float, ...]:
    if asked.cfgs:
        cfgs = one_for_each(asked.cfgs, steps, "CFG values")
    else:
        low = preset.cfg if preset.cfg_low is None else preset.cfg_low
        each = (preset.cfg, low) if asked.cfg is None else (asked.cfg, asked.cfg)
        by_expert = (*each, asked.base_cfg)
        cfgs = tuple(by_expert[split[step] if split else 0] for step in range(steps))
    for cfg in cfgs:
        if not 1.0 <= cfg <= 30.0:
            raise RequestError(
                f"CFG {cfg:g} is not between 1 (off) and 30; use 1 for distilled models"
            )
    return cfgs


def _split(
    preset: Preset, asked: Overrides, sigmas: Sequence[float], shift: float
) -> tuple[tuple[int, ...], str]:
    steps = len(sigmas) - 1
    boundary = asked.boundary
    if boundary is None and asked.high_steps is None and preset.splits_by_boundary:
        boundary = preset.boundary
    if boundary is not None:
        experts = experts_by_boundary(sigmas, boundary, shift)
        return experts, f"high noise while sigma >= {boundary:g}"
    high_steps = asked.high_steps
    if high_steps is None:
        high_steps = preset.high_steps if steps == preset.steps else max(1, steps // 2)
    rule = f"high noise for the first {high_steps} steps"
    if (other := steps_above(sigmas, preset.boundary)) != high_steps:
        rule += f" (by the boundary {preset.boundary:g} it would be {other})"
    return experts_by_step(steps, high_steps), rule


def demo_path(part: str) -> Path:
    """A file of the demo family, by its name in DEMO_FILES."""
    path = DEMO_FOLDER / DEMO_FILES[part]
    if not path.is_file():
        raise CheckpointError(
            f"the demo file {path} is not there; this copy of the pack is incomplete: "
            "install it again, or name your own model file"
        )
    return path
