"""The sampler for distilled models, and its schedule alone for native custom samplers."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import comfy.model_patcher
import torch
from comfy_api.latest import io

from ..lightx2v_core.errors import RequestError
from ..lightx2v_core.presets import PRESETS, Overrides, make_plan
from ..lightx2v_core.sampling.loop import SOLVERS
from ..lightx2v_core.sampling.schedule import describe
from .checks import check_experts, check_request
from .denoise import Conditioning, check_flow, run_plan
from .finish import note_for_files
from .progress import show_text
from .schema import (
    ADVANCED,
    found_by,
    read_numbers,
    read_overrides,
    schedule_input,
    split_input,
)
from .settings import AUTO, PRESET_CHOICES, decide, describe_loras, preset_of
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
                    options=["auto", *SOLVERS],
                    default="auto",
                    tooltip="auto: as trained. renoise adds fresh noise after each step, as the "
                    "first distilled releases were sampled.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="0: as trained, which is 1 (off) for distilled models: above it the "
                    "picture burns and each step costs twice.",
                    extra_dict=ADVANCED,
                ),
                io.Model.Input(
                    "model_low_noise", optional=True, tooltip="Wan 2.2's low-noise expert."
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Without effect while cfg is 1."
                ),
                *more_inputs(),
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                io.String.Output(display_name="plan", tooltip="What was run, step by step."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            **found_by("distill", "4 step", "ksampler", "lightning", "moe sampler"),
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
        model_base: Patcher | None = None,
        **more: object,
    ) -> io.NodeOutput:
        wanted = More(**more)
        models = [model] if model_low_noise is None else [model, model_low_noise]
        experts = [*models, *([] if model_base is None else [model_base])]
        samples = latent["samples"]
        check_experts(*(getattr(m.model, "info", None) for m in models))
        for each in experts:
            check_flow(each)
            check_request(each.model, positive, samples)
        overrides = wanted.overrides(schedule, split, cfg, solver, model_base is not None)
        plan = decide(models, overrides, samples, wanted.preset, wanted.strict, model_base)
        if plan.cfg > 1.0 and negative is None:
            raise RequestError(
                f"CFG {plan.cfg:g} needs a negative prompt; connect one, set cfg to 1, or put a "
                "distillation LoRA on a model that is not distilled"
            )
        check_strengths(models, plan.steps)
        by_number = [model, model_low_noise or model, model_base or model]
        loras = describe_loras(by_number)
        text = describe(plan, loras)
        show_text(text, cls.hidden.unique_id)
        if wanted.dry_run:
            return io.NodeOutput(latent, f"dry run, nothing was sampled\n{text}")
        result, watch = run_plan(by_number, positive, negative, latent, plan, seed)
        text = f"{describe(plan, loras, watch.stages)}\n{watch.describe(plan)}"
        show_text(text, cls.hidden.unique_id)
        note_for_files(cls.hidden.extra_pnginfo, plan=text)
        return io.NodeOutput({**latent, "samples": result}, text)


class More(NamedTuple):
    """The optional widgets; a graph saved before they were there leaves them out."""

    preset: str = AUTO
    strict: bool = False
    dry_run: bool = False
    cfgs: str = ""
    shifts: str = ""
    base_steps: int = 5
    base_cfg: float = 3.5

    def overrides(
        self, schedule: dict, split: dict, cfg: float, solver: str, has_base: bool
    ) -> Overrides:
        return replace(
            read_overrides(schedule, split, cfg, solver),
            cfgs=read_numbers(self.cfgs, "CFG values", "3.5, 1, 1, 1"),
            shifts=read_numbers(self.shifts, "shifts", "8, 8, 5, 5"),
            base_steps=self.base_steps if has_base else 0,
            base_cfg=self.base_cfg,
        )


def more_inputs() -> list[io.Input]:
    """Added after the first ones: a new widget in between would break saved graphs."""
    return [
        io.Model.Input(
            "model_base",
            optional=True,
            tooltip="For more motion: the model that is not distilled, without LoRA. It takes the "
            "first trained step in small ones with its own CFG.",
        ),
        io.Combo.Input(
            "preset",
            options=list(PRESET_CHOICES),
            default=AUTO,
            optional=True,
            tooltip="auto: what the file and its LoRAs were trained for: steps, shift, CFG, "
            "solver, split.",
        ),
        io.Boolean.Input(
            "strict",
            default=False,
            optional=True,
            tooltip="Settings outside of what the model was trained for are an error.",
            extra_dict=ADVANCED,
        ),
        io.Boolean.Input(
            "dry_run",
            default=False,
            optional=True,
            tooltip="Show the plan and sample nothing.",
            extra_dict=ADVANCED,
        ),
        io.String.Input(
            "cfgs",
            default="",
            optional=True,
            tooltip="One CFG for each step, such as 3.5, 1, 1, 1, in place of cfg.",
            extra_dict=ADVANCED,
        ),
        io.String.Input(
            "shifts",
            default="",
            optional=True,
            tooltip="One shift for each step, such as 8, 8, 5, 5, in place of shift.",
            extra_dict=ADVANCED,
        ),
        io.Int.Input(
            "base_steps",
            default=5,
            min=1,
            max=50,
            optional=True,
            tooltip="Of model_base, in place of the first trained step.",
            extra_dict=ADVANCED,
        ),
        io.Float.Input(
            "base_cfg",
            default=3.5,
            min=1.0,
            max=30.0,
            step=0.1,
            optional=True,
            tooltip="CFG of model_base.",
            extra_dict=ADVANCED,
        ),
    ]


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
            **found_by("distill", "scheduler", "4 step"),
        )

    @classmethod
    def execute(cls, schedule: dict, model: Patcher | None = None) -> io.NodeOutput:
        preset = PRESETS["distill-4step"] if model is None else preset_of(model)[0]
        plan = make_plan(preset, read_overrides(schedule))
        return io.NodeOutput(torch.tensor(plan.sigmas))
