"""One generation from request to frames, without ComfyUI: encode, condition, sample, decode."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .assemble import (
    LoadedTransformer,
    Parts,
    load_clip_vision,
    load_text_encoder,
    load_transformer,
    load_vae,
)
from .conditioning import check_pairing, image_condition
from .datatypes import SamplerPlan, StepEvent, VideoSize
from .device import select_dtype
from .errors import RequestError
from .lora.apply import apply_loras
from .lora.read import read_lora
from .media import to_uint8
from .presets import Overrides, Preset, make_plan, note_for, preset_for
from .sampling.loop import make_noise, sample
from .text.umt5 import TextEncoder
from .wan.config import WanConfig

OnProgress = Callable[[str, int, int], None]  # stage, done, total


def _silent(stage: str, done: int, total: int) -> None:
    """Default progress callback."""


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """What to make. `image` and `last_image` are C H W in [-1, 1], of any size."""

    prompt: str
    negative_prompt: str = ""
    image: Tensor | None = None
    last_image: Tensor | None = None
    size: VideoSize | None = None
    seed: int = 0
    overrides: Overrides = Overrides()


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """Frames F H W C uint8, the plan they were made by, and seconds for each stage."""

    frames: Tensor
    plan: SamplerPlan
    size: VideoSize
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0


def _is_for(name: str, side: str | None) -> bool:
    named = [word for word in ("high", "low") if re.search(rf"{word}[_-]?noise", name.lower())]
    return side is None or not named or side in named


@contextmanager
def borrowed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """`module` on `device` for a while; afterwards its weights are the ones it was loaded with."""
    if device.type == "cpu":
        yield
        return
    homes = [
        (owner, name, p) for owner in module.modules() for name, p in owner._parameters.items()
    ]
    module.to(device)
    try:
        yield
    finally:
        for owner, name, parameter in homes:
            owner._parameters[name] = parameter
        module.to("cpu")  # buffers


class Pipeline:
    """Loads the parts of one model once and makes videos with them on `device`."""

    def __init__(
        self,
        parts: Parts,
        device: torch.device,
        attention: str = "auto",
        vram_bytes: int | None = None,
    ) -> None:
        self.device, self.vram_bytes = device, vram_bytes
        dtype = select_dtype(device)
        files = [parts.transformer] if parts.low is None else [parts.transformer, parts.low]
        self.experts = [load_transformer(f, dtype, attention, device) for f in files]
        self._check_experts()
        self.text = load_text_encoder(parts.text, parts.tokenizer, dtype)
        self._check_text(self.text)
        self.vae = load_vae(parts.vae, dtype)
        clip = parts.clip if self.config.clip_tokens else None
        self.clip = None if clip is None else load_clip_vision(clip, dtype)

    @property
    def config(self) -> WanConfig:
        return self.experts[0].model.config

    @property
    def preset(self) -> Preset:
        return preset_for(self.experts[0].info)

    def _check_experts(self) -> None:
        if len({expert.model.config for expert in self.experts}) > 1:
            raise RequestError(
                "the two experts are of different kinds "
                f"({'; '.join(expert.summary for expert in self.experts)}); "
                "give the high-noise and the low-noise file of the same release"
            )

    def _check_text(self, text: TextEncoder) -> None:
        if text.text_dim != self.config.text_dim:
            raise RequestError(
                f"the text encoder gives states {text.text_dim} wide and this model needs "
                f"{self.config.text_dim}; use the umt5 encoder that belongs to it"
            )

    def plan(self, overrides: Overrides = Overrides()) -> SamplerPlan:
        """The plan `generate` would follow, without running anything."""
        note = note_for(self.experts[0].info)
        return make_plan(self.preset, overrides, len(self.experts), note)

    def set_loras(self, files: Sequence[tuple[Path, float]]) -> list[str]:
        """Put LoRA files with their strengths on the experts, in place of those before; one line
        for each. A file with `high` or `low` in its name goes to that expert of two."""
        loras = [(read_lora(path), strength) for path, strength in files]
        lines = []
        for index, expert in enumerate(self.experts):
            side = ("high", "low")[index] if len(self.experts) == 2 else None
            wanted = [(lora, s) for lora, s in loras if _is_for(lora.name, side)]
            reports = apply_loras(expert.model, wanted)
            lines += [f"{side + ' noise: ' if side else ''}{r.describe()}" for r in reports]
        return lines

    @torch.inference_mode()
    def generate(self, request: GenerateRequest, on_progress: OnProgress = _silent) -> Result:
        """Run one request. Everything that can be wrong with it is said before the first stage."""
        size = request.size or self.preset.size
        size.check()
        plan = self.plan(request.overrides)
        check_pairing(self.config, request.image is not None, request.last_image is not None)
        seconds: dict[str, float] = {}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

        with self._stage("text", seconds):
            text, negative = self._encode_text(request, plan)
            on_progress("text", 1, 1)
        with self._stage("image", seconds):
            condition, clip = self._encode_images(request, size, on_progress)
        with self._stage("sampling", seconds):
            denoise = self._denoiser(plan, text, negative, condition, clip)
            rng = torch.Generator().manual_seed(request.seed)
            noise = make_noise(size.latent_shape(), rng).to(self.device)

            def on_step(event: StepEvent) -> None:
                on_progress("sampling", event.step, event.num_steps)

            latent = sample(denoise, noise, plan, rng, on_step)
            self._release()
        with self._stage("decode", seconds), borrowed(self.vae, self.device):
            pixels = self.vae.decode(
                latent, lambda done, total: on_progress("decode", done, total), output_device="cpu"
            )
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return Result(to_uint8(pixels[0]), plan, size, seconds, peak)

    @contextmanager
    def _stage(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds[name] = time.perf_counter() - started

    def _encode_text(
        self, request: GenerateRequest, plan: SamplerPlan
    ) -> tuple[Tensor, Tensor | None]:
        prompts = [request.prompt] + ([request.negative_prompt] if plan.cfg != 1.0 else [])
        with borrowed(self.text, self.device):
            states = self.text.encode(prompts)
        return states[:1], states[1:] if plan.cfg != 1.0 else None

    def _encode_images(
        self, request: GenerateRequest, size: VideoSize, on_progress: OnProgress
    ) -> tuple[Tensor | None, Tensor | None]:
        if request.image is None:
            return None, None
        with borrowed(self.vae, self.device):
            condition = image_condition(
                self.vae,
                size,
                request.image,
                request.last_image,
                lambda done, total: on_progress("image", done, total),
            )
        if self.clip is None:
            return condition, None
        images = [i for i in (request.image, request.last_image) if i is not None]
        with borrowed(self.clip, self.device):
            features = [self.clip.features(image[None].to(self.device)) for image in images]
        return condition, torch.cat(features, dim=1)

    def _denoiser(
        self,
        plan: SamplerPlan,
        text: Tensor,
        negative: Tensor | None,
        condition: Tensor | None,
        clip: Tensor | None,
    ) -> Callable[[Tensor, float, int], Tensor]:
        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            model = self._place(self.experts[plan.expert_at(step)])
            entry = x if condition is None else torch.cat((x, condition), dim=1)
            timestep = torch.tensor([1000.0 * sigma], device=x.device, dtype=torch.float32)
            velocity = model(entry, timestep, text, clip)
            if negative is None:
                return velocity
            unguided = model(entry, timestep, negative, clip)
            return unguided + plan.cfg * (velocity - unguided)

        return denoise

    def _place(self, expert: LoadedTransformer) -> nn.Module:
        if expert.residency.device is None:
            self._release()
            expert.residency.place(self.device, self.vram_bytes)
        return expert.model

    def _release(self) -> None:
        for expert in self.experts:
            expert.residency.release()
