"""What a run will do, decided from the files behind its MODELs before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import comfy.model_patcher
import torch

from ..lightx2v_core.checkpoint.detect import CheckpointInfo, detect
from ..lightx2v_core.checkpoint.source import open_checkpoint
from ..lightx2v_core.datatypes import SamplerPlan, VideoSize
from ..lightx2v_core.envelope import Run, enforce, find_warnings
from ..lightx2v_core.errors import LightX2VError
from ..lightx2v_core.lora.steps import Strengths, describe_strengths
from ..lightx2v_core.presets import PRESETS, Overrides, Preset, make_plan, note_for, preset_for
from ..lightx2v_core.wan.vae import SPACE, TIME
from .strengths import Strength

Patcher = comfy.model_patcher.ModelPatcher
AUTO = "auto"
PRESET_CHOICES = (AUTO, *PRESETS)
OTHER_LOADER = "a LoRA of another loader"


class Lora(NamedTuple):
    """A LoRA on a MODEL: its file's name, its strength or strengths, and what the file is."""

    name: str
    strengths: Strengths
    info: CheckpointInfo


def loras_of(model: Patcher) -> list[Lora]:
    """Those of Apply LoRA by name; what another loader added counts as one that nobody knows."""
    found: dict[tuple, Lora] = {}
    for patches in model.patches.values():
        for strength, *_ in patches:
            if isinstance(strength, Strength):
                key = (strength.lora, float(strength), strength.steps)
                if key not in found:
                    path = Path(strength.lora)
                    value = strength.steps or float(strength)
                    found[key] = Lora(path.name, value, _read(path))
            else:
                info = CheckpointInfo("lora")
                found.setdefault((OTHER_LOADER,), Lora(OTHER_LOADER, float(strength), info))
    return list(found.values())


def _read(path: Path) -> CheckpointInfo:
    try:
        return detect(open_checkpoint(path))
    except (LightX2VError, OSError):  # moved away since it was applied: its release stays unknown
        return CheckpointInfo("lora")


def preset_of(model: Patcher, name: str = AUTO) -> tuple[Preset, str]:
    """The preset of the file behind a MODEL with its LoRAs, or the one asked for by name, and what
    the plan should say about the choice."""
    info = getattr(model.model, "info", None)
    if name != AUTO:
        return PRESETS[name], "chosen by hand"
    if info is None:
        return PRESETS["distill-4step"], "another loader's model: distilled settings assumed"
    loras = [lora.info for lora in loras_of(model)]
    return preset_for(info, loras), note_for(info, loras)


def decide(
    models: Sequence[Patcher],
    overrides: Overrides,
    samples: torch.Tensor,
    preset_name: str = AUTO,
    strict: bool = False,
    base: Patcher | None = None,
) -> SamplerPlan:
    """The plan with its warnings; an error where `strict` is set and there is one. `base` is the
    model for a first stage without distillation."""
    preset, note = preset_of(models[0], preset_name)
    plan = make_plan(preset, overrides, len(models), note)
    run = Run(
        getattr(models[0].model, "info", None),
        preset,
        size_of(samples),
        [[tuple(lora) for lora in loras_of(model)] for model in models],
        len(models),
        overrides,
        next((name for model in models if (name := caching_of(model))), None),
        None if base is None else _info_with_loras(base),
    )
    warnings = find_warnings(plan, run)
    enforce(warnings, strict)
    return replace(plan, warnings=warnings)


def _info_with_loras(model: Patcher) -> CheckpointInfo | None:
    """Of the file, or of the LoRA that distils it."""
    distilling = (lora.info for lora in loras_of(model) if lora.info.preset)
    return next(distilling, getattr(model.model, "info", None))


def size_of(samples: torch.Tensor) -> VideoSize:
    """Of the clip that a latent B C T H W decodes to."""
    frames, rows, columns = samples.shape[2:]
    return VideoSize(columns * SPACE, rows * SPACE, (frames - 1) * TIME + 1)


def caching_of(model: Patcher) -> str | None:
    """The name of what skips whole steps on this MODEL, as its own node calls it."""
    for key, value in model.model_options.get("transformer_options", {}).items():
        if "cache" in key.lower():
            return str(getattr(value, "name", key))
    return None


def describe_loras(models: Sequence[Patcher]) -> list[list[str]]:
    """By the number of an expert in the plan."""
    return [
        [f"{name} {describe_strengths(strengths)}" for name, strengths, _ in loras_of(model)]
        for model in models
    ]
