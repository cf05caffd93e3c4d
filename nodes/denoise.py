"""One sampling path for every MODEL, ours or not: CFGGuider around the core's loop.

Hooks, masks, previews and interrupts are the host's. The second expert takes over the unscaled
float32 state of the first, so that two stages equal one bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Generator, Tensor

from ..lightx2v_core.datatypes import SamplerPlan, StepEvent, VideoSize
from ..lightx2v_core.errors import RequestError
from ..lightx2v_core.memory.plan import cheaper, is_ram_short, with_one_retry
from ..lightx2v_core.sampling.loop import make_noise, make_rngs, sample
from ..lightx2v_core.sampling.schedule import stage_names
from .finish import Watch
from .patcher import ResidentPatcher
from .plainly import Plainly
from .progress import step_callback
from .strengths import tell_step

log = logging.getLogger(__name__)

Patcher = comfy.model_patcher.ModelPatcher
Conditioning = list[list]

PURE_NOISE = 0.999  # a list that starts at 999 means noise, not 0.9998 times noise


def run_plan(
    models: list[Patcher],
    positive: Conditioning,
    negative: Conditioning | None,
    latent: dict,
    plan: SamplerPlan,
    seed: int,
) -> tuple[Tensor, Watch]:
    """The latent (raw mean) that `plan` leads to, and what each stage took.

    `models` by the number of an expert in the plan. Item i of a batch is that of seed + i alone.
    """
    samples = comfy.sample.fix_empty_latent_channels(models[0], latent["samples"])
    rngs = _rngs(seed, len(samples), latent.get("batch_index"))
    noise = make_noise(tuple(samples.shape), rngs)
    callback = step_callback(models[0], plan.steps)
    watch = Watch(models[0].load_device)
    carried = Carried(plan, noise, rngs, [], watch)
    result, stages = samples, plan.stages()
    for number, (expert, steps) in enumerate(stages):
        if number:
            _leave_ram(models[stages[number - 1][0]], models[expert])
        guider = _make_guider(models[expert], positive, negative, plan.cfg_at(steps.start))
        with watch.stage():
            result = guider.sample(
                noise,
                samples,
                comfy.samplers.KSAMPLER(_make_stage(models[expert], guider, steps, carried)),
                torch.tensor(plan.sigmas[steps.start : steps.stop + 1]),
                denoise_mask=latent.get("noise_mask"),
                callback=_count_from(steps.start, plan.steps, callback),
                disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
                seed=seed,
            )
        name = stage_names(plan)[expert]
        log.info("%s: %d steps in %.1f s", name, len(steps), watch.stages[-1])
    return result.to(mm.intermediate_device(), _intermediate_dtype()), watch


class Carried(NamedTuple):
    """What the stages of one run share; the last holds the state that one leaves to the next."""

    plan: SamplerPlan
    noise: Tensor
    rngs: list[Generator]
    state: list[Tensor]
    watch: Watch


def _rngs(seed: int, count: int, batch_index: list[int] | None) -> list[Generator]:
    """`batch_index` is the host's: which items of a larger batch these are."""
    if batch_index is None or len(batch_index) != count:
        return make_rngs(seed, count)
    return [make_rngs(seed, 1, index)[0] for index in batch_index]


def check_flow(model: Patcher) -> None:
    """Distilled sigmas mean nothing to a model that is no flow model."""
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.CONST):
        raise RequestError(
            f"{type(model.model).__name__} is not a flow-matching model, and this sampler is for "
            "Wan; use KSampler, or load a Wan model"
        )


def _make_guider(
    model: Patcher, positive: Conditioning, negative: Conditioning | None, cfg: float
) -> comfy.samplers.CFGGuider:
    guider = comfy.samplers.CFGGuider(model)
    if negative is None:
        guider.inner_set_conds({"positive": positive})
    else:
        guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def _leave_ram(before: Patcher, after: Patcher) -> None:
    """Where both experts do not fit into RAM the one that is done gives up what it can read again
    from its file; the host's cache may keep the object."""
    if not all(isinstance(each, ResidentPatcher) for each in (before, after)) or before.backup:
        return
    done, following = before.model.engine, after.model.engine
    if done is following:
        return
    on_card = not mm.is_device_cpu(after.load_device)
    if is_ram_short(following.ram_bytes() + (following.total_bytes if on_card else 0)):
        log.info("%.2f GB of RAM of the first expert given back", done.forget() / 1e9)


def _advice(patcher: ResidentPatcher, shape: torch.Size) -> str:
    """What it takes at least, what there is, and the cheapest changes that would fit."""
    _, _, T, H, W = shape
    model, engine = patcher.model, patcher.model.engine
    there = mm.get_free_memory(patcher.load_device) + engine.loaded_bytes

    def needed(size: VideoSize) -> int:
        return engine.least_bytes + model.memory_required(list(size.latent_shape()))

    size = VideoSize(W * 8, H * 8, (T - 1) * 4 + 1)
    changes = cheaper(
        size,
        lambda smaller: needed(smaller) <= there,
        "an fp8 file, or fewer other models at the same time",
    )
    return (
        f"this size takes at least {needed(size) / 1e9:.2f} GB and {there / 1e9:.2f} GB are there: "
        f"{changes}"
    )


def _make_stage(
    patcher: Patcher, guider: comfy.samplers.CFGGuider, steps: range, carried: Carried
) -> Callable:
    """A sampler function for KSAMPLER that runs `steps`; takes over the state and leaves its own.

    Out of memory in our own model costs one more attempt at that step with fewer blocks on the
    card; the second time the host's exception passes, so that the host unloads. A broken latent
    costs one more attempt with plain attention and dequantised matmuls.
    """
    plan, noise, rngs, state, watch = carried
    plainly = Plainly(patcher)

    def follow(
        model: Callable,
        x: Tensor,
        _sigmas: Tensor,
        extra_args: dict | None = None,
        callback: Callable | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            told = plainly.tell(tell_step(extra_args, step, plan.steps))
            guider.set_cfg(plan.cfg_at(step))

            def denoised() -> Tensor:
                return model(x, x.new_full((x.shape[0],), sigma), **told)

            if not isinstance(patcher, ResidentPatcher):
                return (x - denoised()) / sigma
            result = with_one_retry(
                patcher.model.engine, denoised, lambda: _advice(patcher, x.shape)
            )
            return (x - result) / sigma

        def on_step(event: StepEvent) -> None:
            if callback is not None:
                callback(
                    {
                        "i": event.step - 1 - steps.start,
                        "x": event.x_BCTHW,
                        "denoised": event.denoised_BCTHW,
                        "sigma": event.sigma,
                        "sigma_hat": event.sigma,
                    }
                )

        if state:
            x = state.pop().to(x)
        elif plan.sigmas[steps.start] > PURE_NOISE:
            x = noise.to(x)
        with watch.stepping():
            x = sample(denoise, x, plan, rngs, on_step, steps, plainly.rescue())
        state.append(x)
        return x

    return follow


def _count_from(start: int, total: int, callback: Callable) -> Callable:
    """Steps counted over all experts: one bar for the whole run."""
    return lambda step, denoised, x, _total: callback(start + step, denoised, x, total)


def _intermediate_dtype() -> torch.dtype:
    """Newer hosts may want half precision on the wire."""
    choose = getattr(mm, "intermediate_dtype", None)
    return torch.float32 if choose is None else choose()
