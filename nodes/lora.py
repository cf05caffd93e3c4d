"""LoRA files onto any Wan MODEL, modulation included, with one line that says what matched."""

from __future__ import annotations

import logging

import comfy.lora
import comfy.model_patcher
import torch
from comfy_api.latest import io
from torch import nn

from ..lightx2v_core.lora.apply import LoraMatch, match_lora
from ..lightx2v_core.lora.read import read_lora
from ..lightx2v_core.quant.shapes import weight_shapes
from .files import fingerprint, list_files, resolve
from .patcher import ResidentPatcher
from .progress import show_text
from .schema import newer

log = logging.getLogger(__name__)

Patcher = comfy.model_patcher.ModelPatcher
LORAS = "loras"
PREFIX = "diffusion_model."
FEW = 0.5  # of a LoRA's parts, below which the line is a warning


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
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.String.Output(
                    display_name="summary", tooltip="What matched, rank and effective strength."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **newer(search_aliases=["lightx2v", "lora loader", "distill lora", "lightning"]),
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str, **_others: object) -> str:
        return fingerprint(LORAS, lora)

    @classmethod
    def execute(cls, model: Patcher, lora: str, strength: float) -> io.NodeOutput:
        transformer = model.model.diffusion_model
        shapes = weight_shapes(transformer)
        has_clip = getattr(transformer, "img_emb", None) is not None
        match = match_lora(read_lora(resolve(LORAS, lora)), shapes, strength, has_clip)
        summary = "\n".join([match.report.describe(), *_warnings(match, model)])
        show_text(summary, cls.hidden.unique_id)
        patched = model.clone()
        if strength != 0.0:
            _add(patched, match, strength)
        return io.NodeOutput(patched, summary)


def _warnings(match: LoraMatch, model: Patcher) -> list[str]:
    lines, report = [], match.report
    if report.matched < FEW * report.total:
        lines.append(f"only {report.matched} of {report.total} parts fit: for another model?")
    expert = getattr(getattr(model.model, "info", None), "expert", None)
    other = {"high": "low_noise", "low": "high_noise"}.get(expert or "")
    if other and other in report.name.lower():
        lines.append(f"{report.name} is on the {expert}-noise expert: exchange the two LoRAs?")
    for line in lines:
        log.warning("%s", line)
    return lines


def _add(model: Patcher, match: LoraMatch, strength: float) -> None:
    """Pairs and most differences as the host's own patches; modulation as the patcher allows."""
    tensors, targets = {}, {}
    for name, pair in match.pairs.items():
        tensors[f"{name}.lora_up.weight"] = pair.up_MR
        tensors[f"{name}.lora_down.weight"] = pair.down_RK
        if pair.alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(pair.alpha)
        targets[name] = f"{PREFIX}{name}.weight"
    patches = comfy.lora.load_lora(tensors, targets, log_missing=False)
    for name, difference in match.differences.items():
        key = PREFIX + name
        if name.endswith("modulation") and not isinstance(model, ResidentPatcher):
            # The stock patcher skips parameters of modules that hold others.
            current = model.get_model_object(key)
            total = current.detach().float() + strength * difference.float().to(current.device)
            model.add_object_patch(key, nn.Parameter(total.to(current.dtype), requires_grad=False))
        else:
            patches[key] = ("diff", (difference,))
    model.add_patches(patches, strength)
