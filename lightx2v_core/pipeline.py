"""One generation from request to frames, without ComfyUI: encode, condition, sample, decode."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .adapters import Adapters
from .assemble import (
    Parts,
    load_clip_vision,
    load_experts,
    load_text_encoder,
    load_vae,
)
from .conditioning import Last, check_encodes, check_pairing, image_condition
from .datatypes import SamplerPlan, StepEvent, VideoSize
from .device import select_dtype
from .envelope import Run, enforce, find_warnings
from .errors import CapabilityError, RequestError
from .lora.steps import Strengths, steps_of
from .media import to_uint8
from .memory.codec import (
    decode_anyhow,
    encode_anyhow,
    keep_latent,
    latents_at_once,
    whole_bytes,
)
from .memory.lending import Lent
from .memory.plan import (
    WORKSPACE_BYTES,
    Job,
    can_lock,
    card_room,
    place_within,
    text_bytes,
    with_one_retry,
)
from .memory.readahead import read_ahead
from .memory.residency import Residency
from .plainly import rescue_of
from .presets import Overrides, Preset, make_plan, note_for, preset_for
from .quant.quantise import KEEP
from .request import GenerateRequest, OnProgress, Result, silent
from .sampling.loop import make_noise, sample
from .sizing import fit_size
from .text.umt5 import TextEncoder
from .turns import Turns
from .wan.config import TEXT_LEN, WanConfig
from .wan.vae import OnChunk
from .wan.vae_pieces import Stills

log = logging.getLogger(__name__)


# What the encoded pictures do not depend on; of `size` and `size_fit` comes the size that is made.
NOT_OF_IMAGES = ("prompt", "negative_prompt", "seed", "overrides", "size", "size_fit", "strict")


class Pipeline:
    """Loads the parts of one model once and makes videos with them on `device`.

    What did not change since the video before is not done again: the same pictures, or the same
    prompt, are not encoded twice, and a transformer stays on a card where there is room for it
    beside all that runs before and after it.
    """

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
        self._last_text, self._last_images = Last(), Last()
        # In the order in which they are needed, while those before them are set up and run.
        wanted = (parts.text, parts.clip, parts.vae, parts.tae, parts.transformer, parts.low)
        read_ahead(path for path in wanted if path is not None)
        dtype = select_dtype(device)
        self.experts = load_experts(parts, dtype, attention, device, quantisation, matmul)
        self.turns = Turns(self.experts, device, self._room, self._others_bytes)
        self._check_experts()
        keep = device.type != "mps"  # which has no float8
        self.text = load_text_encoder(parts.text, parts.tokenizer, dtype, as_stored=keep)
        self._check_text(self.text)
        table = self.text.transformer.shared
        self.text_residency = Residency(self.text, [parts.text], apart=[table])
        self.text_residency.hook(self.text.blocks)
        self.vae = load_vae(parts.vae, dtype)
        self.decoder = self.vae if parts.tae is None else load_vae(parts.tae, dtype)
        clip = parts.clip if self.config.clip_tokens else None
        self.clip = None if clip is None else load_clip_vision(clip, dtype)
        whole = (self.vae, self.decoder, self.clip)
        self._lent = {id(part): Lent(part) for part in whole if part is not None}
        self.adapters = Adapters(self.experts)

    @property
    def config(self) -> WanConfig:
        return self.experts[0].model.config

    @property
    def preset(self) -> Preset:
        return preset_for(self.experts[0].info, self.adapters.infos)

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

    def plan(
        self,
        overrides: Overrides = Overrides(),
        size: VideoSize | None = None,
        strict: bool = False,
    ) -> SamplerPlan:
        """The plan `generate` would follow, without running anything; its warnings are errors
        where `strict` is set."""
        info, preset = self.experts[0].info, self.preset
        note = note_for(info, self.adapters.infos)
        plan = make_plan(preset, overrides, len(self.experts), note)
        for expert in self.experts:
            steps_of(expert.model).check(plan.steps)
        if overrides.base_steps:
            raise RequestError(
                "a first stage by a model that is not distilled needs that model; here give the "
                "LoRA a strength of 0 and CFG a value for those steps, as in 0,1,1,1 and 3.5,1,1,1"
            )
        run = Run(info, preset, size, self.adapters.by_expert(), len(self.experts), overrides)
        warnings = find_warnings(plan, run)
        enforce(warnings, strict)
        return replace(plan, warnings=warnings)

    def describe_loras(self) -> list[list[str]]:
        """For each expert what a plan says of its LoRAs."""
        return self.adapters.describe()

    def set_loras(
        self,
        files: Sequence[tuple[Path, Strengths]],
        merge: bool = False,
        experts: Sequence[str | None] = (),
    ) -> list[str]:
        """Put LoRA files on the experts, in place of those before; see `Adapters.put`."""
        self.turns.release(0)
        return self.adapters.put(files, merge, experts)

    @torch.inference_mode()
    def generate(
        self,
        request: GenerateRequest,
        on_progress: OnProgress = silent,
        rescue: Path | None = None,
    ) -> Result:
        """Run one request. Everything that can be wrong with it is said before the first stage.

        When decoding fails the latent is saved as `rescue`, and the error names it.
        """
        asked = request.size or self.preset.size
        size = fit_size(asked, request.size_fit).made if request.size_fit else asked
        size.check()
        plan = self.plan(request.overrides, size, request.strict)
        check_pairing(self.config, request.image is not None, request.last_image is not None)
        if request.image is not None:
            check_encodes(self.vae)
        seconds: dict[str, float] = {}
        self.turns.placed.clear()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

        if not self._may_stay(size):
            self.turns.make_room(max(self._others_bytes(size), self.turns.least_room(size)))
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

            rescue_rows = rescue_of([expert.model for expert in self.experts])
            try:
                latent = sample(denoise, noise, plan, rng, on_step, rescue=rescue_rows)
            except BaseException:
                self.turns.release(0)
                raise
            if not self._may_stay(size):
                self.turns.make_room(whole_bytes(self.decoder, size))
        with self._stage("decode", seconds):
            pixels = self._decode(latent, size, on_progress, rescue)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        frames = to_uint8(pixels[0])
        if request.size_fit:
            frames = fit_size(asked, request.size_fit).trim(frames)
        return Result(frames, plan, asked, seconds, peak, tuple(self.turns.placed))

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
        guided = plan.cfg != 1.0
        prompts = [request.prompt] + ([request.negative_prompt] if guided else [])

        states = self._last_text.get((*prompts,), lambda: self._run_text_encoder(prompts))
        return states[:1], states[1:] if guided else None

    def _run_text_encoder(self, prompts: list[str]) -> Tensor:
        """Streamed wherever RAM can be page-locked for it: each of its blocks runs once for a
        prompt, so that none is worth a place on the card."""
        engine, room, device = self.text_residency, self._room(), self.device
        blocks = sum(engine.block_bytes)
        activations = self._text_bytes(len(prompts))
        if room is not None and room < engine.least_bytes + activations + WORKSPACE_BYTES:
            log.info("the text encoder runs on the CPU: %.1f GB may be used", room / 1e9)
            device, room = torch.device("cpu"), None
        elif room is not None and (self.turns.is_whole_on_card or can_lock(engine, blocks)):
            room = min(room, engine.card_bytes(0) + activations + WORKSPACE_BYTES)
        place_within(engine, device, room, Job("text encoder", activations))
        try:
            return self.text.encode(prompts).to(self.device)
        finally:
            # It runs once for each prompt, and the experts that wait for RAM at every step.
            engine.release(keep_pinned=not self.turns.leave_no_ram)

    def _others_bytes(self, size: VideoSize) -> float:
        """The most that a stage beside sampling takes on the card."""
        codecs = (whole_bytes(vae, size) for vae in (self.vae, self.decoder))
        return max(*codecs, self._encoder_bytes())

    def _encoder_bytes(self) -> int:
        """The least for the encoders of text and, after it, of pictures by CLIP."""
        text = self.text_residency.card_bytes(0) + self._text_bytes(2)
        return max(text, 0 if self.clip is None else self.clip.bytes) + WORKSPACE_BYTES

    def _text_bytes(self, prompts: int) -> int:
        config = self.text.transformer.config
        activations = text_bytes(config.num_heads, config.d_ff, TEXT_LEN, prompts)
        return activations + self.text.turning_bytes

    def _encode_images(
        self, request: GenerateRequest, size: VideoSize, on_progress: OnProgress
    ) -> tuple[Tensor | None, Tensor | None]:
        if request.image is None:
            return None, None
        names = (entry.name for entry in fields(request) if entry.name not in NOT_OF_IMAGES)
        made_from = (size, *(getattr(request, name) for name in names))
        return self._last_images.get(
            made_from, lambda: self._run_image_encoders(request, size, on_progress)
        )

    def _run_image_encoders(
        self, request: GenerateRequest, size: VideoSize, on_progress: OnProgress
    ) -> tuple[Tensor, Tensor | None]:
        assert request.image is not None, "the caller has looked"
        with self._on_card(self.vae, size):
            condition = image_condition(
                self.vae,
                size,
                request.image,
                request.last_image,
                lambda done, total: on_progress("image", done, total),
                lambda *given: self._encode_clip(size, *given),
                request.fit,
                request.motion,
            )
        return condition, self.clip_features(request, size)

    @torch.inference_mode()
    def clip_features(self, request: GenerateRequest, size: VideoSize) -> Tensor | None:
        """What CLIP sees in the start image, and behind it in the end image; None without CLIP."""
        if self.clip is None or (first := request.image) is None:
            return None
        images = [first if first.ndim == 3 else first[0]]
        if (last := request.last_image) is not None:
            images.append(last if last.ndim == 3 else last[-1])
        with self._on_card(self.clip, size):
            features = [self.clip.features(image[None].to(self.device)) for image in images]
        return torch.cat(features, dim=1)

    def _encode_clip(
        self, size: VideoSize, pixels: Tensor, on_chunk: OnChunk, stills: Stills
    ) -> Tensor:
        latents = latents_at_once(self.vae, size, self._room())
        return encode_anyhow(self.vae, pixels, on_chunk, self._free_card, latents, stills)

    def _denoiser(
        self,
        plan: SamplerPlan,
        size: VideoSize,
        entries: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    ) -> Callable[[Tensor, float, int], Tensor]:
        text, negative, condition, clip = entries

        def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
            expert = self.experts[plan.expert_at(step)]
            self.turns.place(expert, size)
            steps_of(expert.model).follow(step, plan.steps)
            entry = x if condition is None else torch.cat((x, condition), dim=1)
            advise = partial(self.turns.advice, expert, size)
            timestep = torch.tensor([1000.0 * sigma], device=x.device, dtype=torch.float32)

            def velocity() -> Tensor:
                velocity, cfg = expert.model(entry, timestep, text, clip), plan.cfg_at(step)
                if negative is None or cfg == 1.0:
                    return velocity
                unguided = expert.model(entry, timestep, negative, clip)
                return unguided + cfg * (velocity - unguided)

            return with_one_retry(expert.residency, velocity, advise)

        return denoise

    def _may_stay(self, size: VideoSize) -> bool:
        """Whether the experts are left on the card while text and pictures go through theirs."""
        codecs = {whole_bytes(vae, size) for vae in (self.vae, self.decoder)} - {math.inf}
        return self.turns.may_stay(size, max((*codecs, self._encoder_bytes())) - WORKSPACE_BYTES)

    def _decode(
        self, latent: Tensor, size: VideoSize, on_progress: OnProgress, rescue: Path | None
    ) -> Tensor:
        try:
            with self._on_card(self.decoder, size):
                return decode_anyhow(
                    self.decoder,
                    latent,
                    lambda done, total: on_progress("decode", done, total),
                    self._free_card,
                    latents_at_once(self.decoder, size, self._room()),
                )
        except (RuntimeError, MemoryError) as error:
            if rescue is None:
                raise
            raise CapabilityError(
                f"decoding failed ({error}); {keep_latent(latent, rescue)}"
            ) from error

    @contextmanager
    def _on_card(self, part: torch.nn.Module, size: VideoSize) -> Iterator[None]:
        """CLIP or a VAE on the card. Where everything fits at once it stays there, if no
        page-locked copy of it brings it back in no time."""
        lent, every = self._lent[id(part)], self._lent.values()
        missing = sum(each.nbytes - each.loaded_bytes for each in every)
        stays = self.turns.is_plenty(size, missing)
        with lent.borrowed(self.device, self._free_card, stays):
            yield
        if self.turns.leave_no_ram:
            lent.unpin()

    @property
    def pinned_bytes(self) -> int:
        """Page-locked RAM that all parts hold between videos."""
        engines = (self.text_residency, *(expert.residency for expert in self.experts))
        return sum(part.pinned_bytes for part in (*engines, *self._lent.values()))

    def _room(self) -> float | None:
        return card_room(self.device, self.vram_bytes)

    def _free_card(self) -> None:
        """Everything off the card but what is running."""
        for lent in self._lent.values():
            lent.leave()
        for engine in (self.text_residency, *(e.residency for e in self.experts)):
            engine.release(keep_pinned=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
