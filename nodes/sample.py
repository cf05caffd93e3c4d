"""The sampler for distilled models, and its schedule alone for native custom samplers."""

from __future__ import annotations

import comfy.model_patcher
import torch
from comfy_api.latest import io

from ..lightx2v_core.errors import RequestError
from ..lightx2v_core.presets import PRESETS, Preset, make_plan, note_for, preset_for
from ..lightx2v_core.sampling.loop import SOLVERS
from ..lightx2v_core.sampling.schedule import describe
from .checks import check_experts, check_request
from .denoise import Conditioning, check_flow, run_plan
from .progress import show_text
from .schema import ADVANCED, newer, read_overrides, schedule_input, split_input
from .strengths import check_strengths

Patcher = comfy.model_patcher.ModelPatcher


class DistillSampler(io.ComfyNode):
    """Widgets in, latent out; everything between lives in the core and in denoise.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightX2VDistillSampler",
            display_name="Distill Sampler (LightX2V)",
            category="LightX2V/sampling",
            description="Four-step sampling of distilled Wan models, one or two experts, for "
            "MODELs of any loader. The schedule follows the file.",
            inputs=[
                io.Model.Input("model", tooltip="The model, or Wan 2.2's high-noise expert."),
                io.Conditioning.Input("positive"),
                io.Latent.Input("latent"),
                schedule_input(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Noise is drawn on the CPU: a seed means the same on every machine.",
                ),
                split_input(),
                io.Combo.Input(
                    "solver",
                    options=list(SOLVERS),
                    default="euler",
                    tooltip="renoise adds fresh noise after each step: more variety.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="1 for distilled models: above it the picture burns and each step "
                    "costs twice.",
                    extra_dict=ADVANCED,
                ),
                io.Model.Input(
                    "model_low_noise", optional=True, tooltip="Wan 2.2's low-noise expert."
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Without effect while cfg is 1."
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                io.String.Output(display_name="plan", tooltip="What was run, step by step."),
            ],
            hidden=[io.Hidden.unique_id],
            **newer(search_aliases=["lightx2v", "4 step", "ksampler", "lightning", "moe sampler"]),
        )

    @classmethod
    def execute(
        cls,
        model: Patcher,
        positive: Conditioning,
        latent: dict,
        schedule: dict,
        seed: int,
        split: dict,
        solver: str,
        cfg: float,
        model_low_noise: Patcher | None = None,
        negative: Conditioning | None = None,
    ) -> io.NodeOutput:
        models = [model] if model_low_noise is None else [model, model_low_noise]
        check_experts(*(getattr(m.model, "info", None) for m in models))
        for each in models:
            check_flow(each)
            check_request(each.model, positive, latent["samples"])
        if cfg > 1.0 and negative is None:
            raise RequestError(f"CFG {cfg:g} needs a negative prompt; connect one or set cfg to 1")
        preset, notes = _preset_of(model)
        if cfg > 1.0 and preset.cfg == 1.0:
            notes.append(f"CFG {cfg:g} on a CFG-distilled model burns the picture: set 1")
        overrides = read_overrides(schedule, split, cfg, solver)
        plan = make_plan(preset, overrides, len(models), "; ".join(notes))
        check_strengths(models, plan.steps)
        text = describe(plan)
        show_text(text, cls.hidden.unique_id)
        samples = run_plan(models, positive, negative, latent, plan, seed)
        return io.NodeOutput({**latent, "samples": samples}, text)


class DistillSigmas(io.ComfyNode):
    """The trained schedule as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightX2VDistillSigmas",
            display_name="Distill Sigmas (LightX2V)",
            category="LightX2V/sampling",
            description="The schedule of distilled Wan models for SamplerCustom and its kind.",
            inputs=[
                schedule_input(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Lets auto follow the file; without it auto is the 4 steps at shift 5 "
                    "that the releases share.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas")],
            **newer(search_aliases=["lightx2v", "scheduler", "4 step"]),
        )

    @classmethod
    def execute(cls, schedule: dict, model: Patcher | None = None) -> io.NodeOutput:
        preset = PRESETS["distill-4step"] if model is None else _preset_of(model)[0]
        plan = make_plan(preset, read_overrides(schedule))
        return io.NodeOutput(torch.tensor(plan.sigmas))


def _preset_of(model: Patcher) -> tuple[Preset, list[str]]:
    """The preset of the file behind a MODEL, and what the plan should say about the choice."""
    info = getattr(model.model, "info", None)
    if info is None:
        return PRESETS["distill-4step"], ["another loader's model: distilled settings assumed"]
    note = note_for(info)
    return preset_for(info), [note] if note else []
