"""LoRA files onto any Wan MODEL, modulation included, with one line that says what matched."""

from __future__ import annotations

import logging

import comfy.lora
import comfy.model_patcher
import torch
from comfy_api.latest import io
from torch import nn

from ..lightx2v_core.errors import RequestError
from ..lightx2v_core.lora.branches import weight_shapes
from ..lightx2v_core.lora.match import LoraMatch, match_lora
from ..lightx2v_core.lora.read import read_lora
from ..lightx2v_core.lora.steps import read_strengths
from .files import fingerprint, list_files, resolve
from .patcher import ResidentPatcher
from .progress import show_text
from .schema import ADVANCED, found_by
from .strengths import Strength, sort_own

log = logging.getLogger(__name__)

Patcher = comfy.model_patcher.ModelPatcher
LORAS = "loras"
PREFIX = "diffusion_model."


class ApplyLora(io.ComfyNode):
    """Chain several; order does not matter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightX2VApplyLora",
            display_name="Apply LoRA (LightX2V)",
            category="LightX2V/loaders",
            description="Puts a LoRA on a Wan model: every naming, up and down pairs and the "
            "differences of distilled releases, modulation included. Says what matched.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "lora", options=list_files(LORAS), tooltip="A file of models/loras."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="1 for distilled releases. 0 is no LoRA, bit for bit.",
                ),
                io.String.Input(
                    "strengths",
                    default="",
                    optional=True,
                    tooltip="One number for each step, such as 1, 1, 0.6, 0, in place of strength. "
                    "Steps of both experts count together. Empty: strength everywhere.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.String.Output(
                    display_name="summary", tooltip="What matched, rank and effective strength."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by("lora loader", "distill lora", "lightning"),
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str, **_others: object) -> str:
        return fingerprint(LORAS, lora)

    @classmethod
    def execute(
        cls, model: Patcher, lora: str, strength: float, strengths: str = ""
    ) -> io.NodeOutput:
        wanted = read_strengths(strengths) if strengths.strip() else strength
        if isinstance(wanted, tuple) and not isinstance(model, ResidentPatcher):
            raise RequestError(
                f"strengths {strengths!r} change from step to step, which this MODEL "
                f"({type(model).__name__} of {type(model.model).__name__}) cannot do; leave "
                "strengths empty, or load it with Load Wan Model, memory: ours"
            )
        path = resolve(LORAS, lora)
        expert = getattr(getattr(model.model, "info", None), "expert", None)
        shapes = weight_shapes(model.model.diffusion_model)
        match = match_lora(read_lora(path), shapes, wanted, expert)
        summary = _summary(match)
        show_text(summary, cls.hidden.unique_id)
        patched = model.clone()
        if given := Strength(wanted, str(path)):
            _add(patched, match, given)
        return io.NodeOutput(patched, summary)


def _summary(match: LoraMatch) -> str:
    report = match.report
    line = report.describe()
    if report.modulations:
        line += f"; {report.modulations} modulations, which ComfyUI's own LoRA loader leaves out"
    for warning in report.warnings:
        log.warning("%s", warning)
    return "\n".join([line, *report.warnings])


def _add(model: Patcher, match: LoraMatch, strength: Strength) -> None:
    """Pairs and most differences as the host's own patches; modulation as the patcher allows."""
    tensors, targets = {}, {}
    for name, pair in match.pairs.items():
        tensors[f"{name}.lora_up.weight"] = pair.up_MR
        tensors[f"{name}.lora_down.weight"] = pair.down_RK
        if pair.alpha is not None:
            # The host divides by the rank; this says the same where the file divides by its root.
            alpha = pair.scale * pair.rank if pair.rank_stabilised else pair.alpha
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
        targets[name] = f"{PREFIX}{name}.weight"
    patches, added = comfy.lora.load_lora(tensors, targets, log_missing=False), {}
    for name, difference in match.differences.items():
        key = PREFIX + name
        if name.endswith("modulation") and not isinstance(model, ResidentPatcher):
            # The stock patcher skips parameters of modules that hold others.
            current = model.get_model_object(key)
            total = current.detach().float() + strength * difference.float().to(current.device)
            model.add_object_patch(key, nn.Parameter(total.to(current.dtype), requires_grad=False))
        else:
            added[key] = ("diff", (difference,))
    model.add_patches(patches, strength)
    model.add_patches(added, strength)  # a weight may have a pair and a difference
    for key in {*patches, *added}:
        sort_own(model.patches.get(key, []))
