"""LoRA strengths that change from step to step, from Apply LoRA to the transformer's forward."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.utils
import torch
from torch import nn

from ..lightx2v_core.errors import CapabilityError, RequestError
from ..lightx2v_core.lora.branches import Branch, Level, set_lora
from ..lightx2v_core.lora.steps import Strengths, Sum, keep_steps, steps_of

Patcher = comfy.model_patcher.ModelPatcher
# strength, value, strength of the base, offset, function
Patch = tuple[float, Any, float, Any, Any]

STEP_OPTION = "lightx2v_step"  # in transformer_options: (step from 0, steps of both experts)
SAME_SIGMA = 1e-5  # relative


class Strength(float):
    """A patch's strength that also knows its LoRA, and its value at each step where it changes.

    The host keeps it in its patches like any other number; clones, deep copies and later loaders
    leave it there.
    """

    lora: str  # its path
    steps: tuple[float, ...]

    def __new__(cls, strengths: Strengths, lora: str) -> Strength:
        steps = () if isinstance(strengths, (int, float)) else tuple(strengths)
        made = super().__new__(cls, max(steps, key=abs) if steps else strengths)
        made.lora, made.steps = lora, steps
        return made

    def level(self) -> Level:
        return Level(PurePath(self.lora).name, self.steps)

    def __deepcopy__(self, _memo: dict) -> Strength:
        return self


def steps_in(patch: Patch) -> tuple[float, ...]:
    """The strengths of a patch that changes between steps, else nothing."""
    return patch[0].steps if isinstance(patch[0], Strength) else ()


def sort_own(patches: list[Patch]) -> None:
    """Apply LoRA's patches at the end of the list into one order, so that the order of the nodes
    changes not even the last bit. Others stay where they are: theirs may matter."""
    start = len(patches)
    while start and isinstance(patches[start - 1][0], Strength):
        start -= 1
    patches[start:] = sorted(patches[start:], key=lambda p: (p[0].lora, float(p[0]), p[0].steps))


def check_strengths(models: Iterable[Patcher], steps: int) -> None:
    """Before a run: one strength for each step, or a sentence."""
    for model in models:
        for patches in model.patches.values():
            for patch in filter(steps_in, patches):
                patch[0].level().check(steps)


def refuse_changing(patches: dict[str, list[Patch]], what: str) -> None:
    """What needs one set of weights cannot have a LoRA that changes."""
    for wanted in patches.values():
        if found := next((p[0] for p in wanted if steps_in(p)), None):
            raise CapabilityError(
                f"{found.level().lora} has a strength for each step, and {what} needs one for all: "
                "leave strengths of Apply LoRA empty"
            )


def refuse_mixed(patches: dict[str, list[Patch]], in_place: Iterable[str]) -> None:
    """Of what is changed in place only differences can be added anew for each step. A pair is in
    here, and not a branch, when something else on its weight must be merged into it."""
    for key in in_place:
        if any(p[2] != 1.0 or (steps_in(p) and not isinstance(p[1], tuple)) for p in patches[key]):
            refuse_changing({key: patches[key]}, f"what else is merged into {key}")


def changing_sums(patcher: Patcher, keys: Iterable[str]) -> list[Sum]:
    """Of the small tensors the patcher has changed in place, those that change between steps."""
    made = []
    for key in keys:
        patches = patcher.patches[key]
        if not any(map(steps_in, patches)):
            continue
        base = patcher.backup[key].weight
        if constant := [p for p in patches if not steps_in(p)]:
            base = comfy.lora.calculate_weight(constant, base.detach().float().clone(), key)
        terms = [
            Branch(value[1][0], None, 1.0, strength.level())
            for strength, value, *_ in (p for p in patches if steps_in(p))
        ]
        owner, _, leaf = key.rpartition(".")
        made.append(Sum(comfy.utils.get_attr(patcher.model, owner), leaf, base, tuple(terms)))
    return made


def fill_branches(
    patcher: Patcher, branches: dict[str, tuple[Branch, ...]], in_place: list[str]
) -> None:
    """The LoRA of `patcher`, and nothing else, in the slots of its module, on its device."""
    device = patcher.load_device
    moved = {name: tuple(b.to(device) for b in made) for name, made in branches.items()}
    set_lora(patcher.model, moved)
    filled = (branch for made in moved.values() for branch in made)
    keep_steps(_transformer(patcher), filled, changing_sums(patcher, in_place))


def empty_branches(patcher: Patcher) -> None:
    set_lora(patcher.model, {})
    keep_steps(_transformer(patcher))


def _transformer(patcher: Patcher) -> nn.Module:
    """What the steps of a LoRA are kept on; VAE and text encoder have no such part."""
    return getattr(patcher.model, "diffusion_model", patcher.model)


def tell_step(extra_args: dict | None, step: int, steps: int) -> dict:
    """A sampler's arguments for the model, with the step in them."""
    args = dict(extra_args or {})
    options = dict(args.get("model_options") or {})
    inside = dict(options.get("transformer_options") or {})
    inside[STEP_OPTION] = (step, steps)
    return {**args, "model_options": {**options, "transformer_options": inside}}


def follow_step(transformer: nn.Module, options: dict) -> None:
    """Set the strengths of this forward's step, for LoRAs that have several."""
    loras = steps_of(transformer)
    if loras.levels:
        loras.follow(*(options.get(STEP_OPTION) or _step_by_sigma(options, loras.levels[0])))


def _step_by_sigma(options: dict, level: Level) -> tuple[int, int]:
    """Where the current sigma stands in the run's, as the host tells both to every model."""
    run, current = options.get("sample_sigmas"), options.get("sigmas")
    if run is None or current is None:
        raise RequestError(
            f"{level.lora} has a strength for each step, and this sampler does not say which step "
            "it is at; use Distill Sampler, or leave strengths of Apply LoRA empty"
        )
    sigma = float(torch.as_tensor(current).flatten()[0]) * (1 - SAME_SIGMA)
    steps = len(run) - 1
    reached = int((torch.as_tensor(run) >= sigma).sum()) - 1
    return min(max(reached, 0), steps - 1), steps
