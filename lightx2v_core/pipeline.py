"""One generation from request to frames, without ComfyUI: encode, condition, sample, decode."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .assemble import (
    LoadedTransformer,
    Parts,
    load_clip_vision,
    load_experts,
    load_text_encoder,
    load_vae,
)
from .conditioning import Fit, check_encodes, check_pairing, fit_image, image_condition
from .datatypes import SamplerPlan, StepEvent, VideoSize
from .device import select_dtype
from .errors import CapabilityError, RequestError
from .lora.apply import apply_loras
from .lora.identify import identify
from .lora.read import LoraFile, read_lora
from .lora.steps import Strengths, steps_of
from .media import to_uint8
from .memory.codec import borrowed, decode_anyhow, encode_anyhow, fits_whole, save_latent
from .memory.plan import (
    WORKSPACE_BYTES,
    Job,
    activation_bytes,
    card_room,
    cheaper,
    is_ram_short,
    place_within,
    text_bytes,
    video_tokens,
    with_one_retry,
)
from .memory.residency import Residency
from .presets import Overrides, Preset, make_plan, note_for, preset_for
from .quant.linear import holds_codes
from .quant.quantise import KEEP
from .sampling.loop import make_noise, sample
from .text.umt5 import TextEncoder
from .wan.config import TEXT_LEN, WanConfig

log = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int], None]  # stage, done, total


def _silent(stage: str, done: int, total: int) -> None:
    """Default progress callback."""


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """What to make. `image` and `last_image` are C H W in [-1, 1], of any size, which `fit` brings
    to that of the video."""

    prompt: str
    negative_prompt: str = ""
    image: Tensor | None = None
    last_image: Tensor | None = None
    size: VideoSize | None = None
    seed: int = 0
    overrides: Overrides = Overrides()
    fit: Fit = fit_image


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """Frames F H W C uint8, the plan they were made by, and seconds for each stage."""

    frames: Tensor
    plan: SamplerPlan
    size: VideoSize
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    memory: tuple[str, ...] = ()  # for each placing of an expert, where its weights were


def _name(expert: LoadedTransformer) -> str:
    return f"{expert.info.expert}-noise transformer" if expert.info.expert else "transformer"


class Pipeline:
    """Loads the parts of one model once and makes videos with them on `device`."""

    def __init__(
        self,
        parts: Parts,
        device: torch.device,
        attention: str = "auto",
        vram_bytes: int | None = None,
        quantisation: str = KEEP,
        matmul: str = "auto",
    ) -> None:
        self.device, self.vram_bytes = device, vram_bytes
        self._placed: list[str] = []
        dtype = select_dtype(device)
        self.experts = load_experts(parts, dtype, attention, device, quantisation, matmul)
        self._check_experts()
        self.text = load_text_encoder(parts.text, parts.tokenizer, dtype)
        self._check_text(self.text)
        self.text_residency = Residency(self.text, [parts.text])
        self.text_residency.hook(self.text.blocks)
        self.vae = load_vae(parts.vae, dtype)
        self.decoder = self.vae if parts.tae is None else load_vae(parts.tae, dtype)
        clip = parts.clip if self.config.clip_tokens else None
        self.clip = None if clip is None else load_clip_vision(clip, dtype)
        self._lora_files: dict[tuple[Path, int, int], LoraFile] = {}

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
        plan = make_plan(self.preset, overrides, len(self.experts), note)
        for expert in self.experts:
            steps_of(expert.model).check(plan.steps)
        return plan

    def set_loras(
        self,
        files: Sequence[tuple[Path, Strengths]],
        merge: bool = False,
        experts: Sequence[str | None] = (),
    ) -> list[str]:
        """Put LoRA files on the experts, in place of those before; a line for each, and warnings.

        A strength is one number, or one for each step of the run (of both experts together). A
        file that says high or low noise goes to that expert of two; `experts` says it for each
        file in its place (high, low, or None for what the file says). `merge`: into the weights.
        """
        self._release(0)
        for expert in self.experts if merge else ():
            expert.residency.recall()  # merging changes blocks, which must be there
        loras = [(self._read_lora(path), strengths) for path, strengths in files]
        told = experts or [None] * len(loras)
        made_for = [
            expert or identify(lora).expert for (lora, _), expert in zip(loras, told, strict=True)
        ]
        lines = []
        for index, expert in enumerate(self.experts):
            side = ("high", "low")[index] if len(self.experts) == 2 else None
            wanted = [
                lora
                for lora, for_expert in zip(loras, made_for, strict=True)
                if side is None or for_expert in (None, side)
            ]
            reports = apply_loras(expert.model, wanted, side or expert.info.expert, merge)
            prefix = f"{side} noise: " if side else ""
            for report in reports:
                lines.append(prefix + report.describe() + (", merged" if merge else ""))
                lines += [f"warning: {warning}" for warning in report.warnings]
        used = {id(lora) for lora, _ in loras}
        self._lora_files = {k: v for k, v in self._lora_files.items() if id(v) in used}
        return lines

    def _read_lora(self, path: Path) -> LoraFile:
        """Files of the set before are not read again, so that trying strengths costs nothing."""
        if not path.is_file():
            return read_lora(path)
        facts = path.stat()
        key = (path, facts.st_mtime_ns, facts.st_size)
        if key not in self._lora_files:
            self._lora_files[key] = read_lora(path)
        return self._lora_files[key]

    @torch.inference_mode()
    def generate(
        self,
        request: GenerateRequest,
        on_progress: OnProgress = _silent,
        rescue: Path | None = None,
    ) -> Result:
        """Run one request. Everything that can be wrong with it is said before the first stage.

        When decoding fails the latent is saved as `rescue`, and the error names it.
        """
        size = request.size or self.preset.size
        size.check()
        plan = self.plan(request.overrides)
        check_pairing(self.config, request.image is not None, request.last_image is not None)
        if request.image is not None:
            check_encodes(self.vae)
        seconds: dict[str, float] = {}
        self._placed.clear()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

        with self._stage("text", seconds):
            text, negative = self._encode_text(request, plan)
            on_progress("text", 1, 1)
        with self._stage("image", seconds):
            condition, clip = self._encode_images(request, size, on_progress)
        with self._stage("sampling", seconds):
            denoise = self._denoiser(plan, size, (text, negative, condition, clip))
            rng = torch.Generator().manual_seed(request.seed)
            noise = make_noise(size.latent_shape(), rng).to(self.device)

            def on_step(event: StepEvent) -> None:
                on_progress("sampling", event.step, event.num_steps)

            latent = sample(denoise, noise, plan, rng, on_step)
            self._release(0)
        with self._stage("decode", seconds):
            pixels = self._decode(latent, size, on_progress, rescue)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return Result(to_uint8(pixels[0]), plan, size, seconds, peak, tuple(self._placed))

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
        engine, room = self.text_residency, self._room()
        config = self.text.transformer.config
        activations = text_bytes(config.num_heads, config.d_ff, TEXT_LEN, len(prompts))
        device = self.device
        if room is not None and room < engine.least_bytes + activations + WORKSPACE_BYTES:
            log.info("the text encoder runs on the CPU: %.1f GB may be used", room / 1e9)
            device, room = torch.device("cpu"), None
        place_within(engine, device, room, Job("text encoder", activations))
        try:
            states = self.text.encode(prompts).to(self.device)
        finally:
            engine.release()
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
                lambda pixels, on_chunk: encode_anyhow(
                    self.vae,
                    pixels,
                    on_chunk,
                    self._free_card,
                    fits_whole(self.vae, size, self._room()),
                ),
                request.fit,
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
        size: VideoSize,
        entries: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    ) -> Callable[[Tensor, float, int], Tensor]:
        text, negative, condition, clip = entries

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            expert = self.experts[plan.expert_at(step)]
            self._place(expert, size)
            steps_of(expert.model).follow(step, plan.steps)
            entry = x if condition is None else torch.cat((x, condition), dim=1)
            timestep = torch.tensor([1000.0 * sigma], device=x.device, dtype=torch.float32)

            def velocity() -> Tensor:
                velocity = expert.model(entry, timestep, text, clip)
                if negative is None:
                    return velocity
                unguided = expert.model(entry, timestep, negative, clip)
                return unguided + plan.cfg * (velocity - unguided)

            return with_one_retry(expert.residency, velocity, lambda: self._advice(expert, size))

        return denoise

    def _place(self, expert: LoadedTransformer, size: VideoSize) -> None:
        engine = expert.residency
        if engine.device is not None:
            return
        self._release(engine.ram_bytes() + (engine.total_bytes if self._on_card else 0))
        activations = self._activations(expert, size)
        job = Job(_name(expert), activations, self._advice(expert, size))
        self._placed.append(place_within(engine, self.device, self._room(), job))

    def _activations(self, expert: LoadedTransformer, size: VideoSize) -> int:
        dtype = expert.model.compute_dtype
        quantised, tokens = holds_codes(expert.model), video_tokens(size)
        return activation_bytes(self.config, tokens, dtype.itemsize, quantised=quantised)

    def _advice(self, expert: LoadedTransformer, size: VideoSize) -> str:
        """The cheapest changes that would fit into what may be used now."""
        engine, room = expert.residency, self._room()
        least = engine.least_bytes - engine.loaded_bytes + WORKSPACE_BYTES

        def fits(size: VideoSize) -> bool:
            return room is None or least + self._activations(expert, size) <= room

        return cheaper(size, fits, "" if holds_codes(expert.model) else "an fp8 file")

    def _decode(
        self, latent: Tensor, size: VideoSize, on_progress: OnProgress, rescue: Path | None
    ) -> Tensor:
        try:
            with borrowed(self.decoder, self.device):
                return decode_anyhow(
                    self.decoder,
                    latent,
                    lambda done, total: on_progress("decode", done, total),
                    self._free_card,
                    fits_whole(self.decoder, size, self._room()),
                )
        except (RuntimeError, MemoryError) as error:
            if rescue is None:
                raise
            raise CapabilityError(
                f"decoding failed ({error}); the latent of this run is saved as "
                f"{save_latent(latent, rescue)}: ComfyUI's LoadLatent opens it"
            ) from error

    @property
    def _on_card(self) -> bool:
        return self.device.type == "cuda"

    def _room(self) -> float | None:
        return card_room(self.device, self.vram_bytes)

    def _free_card(self) -> None:
        """Everything off the card but what is running."""
        for engine in (self.text_residency, *(e.residency for e in self.experts)):
            engine.release(keep_pinned=True)
        if self._on_card:
            torch.cuda.empty_cache()

    def _release(self, next_bytes: int) -> None:
        """The experts off the card, and out of RAM too where `next_bytes` would not fit beside
        them; they can be read again from their files."""
        for expert in self.experts:
            engine = expert.residency
            is_placed = engine.device is not None
            engine.release(keep_pinned=True)
            if is_placed and is_ram_short(next_bytes):
                log.info(
                    "%.2f GB of RAM of the %s given back", engine.forget() / 1e9, _name(expert)
                )
