"""The core's VAE and text encoder as ComfyUI's VAE and CLIP. LATENT on the wire is the raw mean."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import comfy.hooks
import comfy.model_management as mm
import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn

from ..lightx2v_core.assemble import load_text_encoder, load_vae
from ..lightx2v_core.datatypes import VideoSize
from ..lightx2v_core.errors import RequestError
from ..lightx2v_core.memory.codec import latents_at_once
from ..lightx2v_core.memory.residency import Residency
from ..lightx2v_core.text.clean import clean_prompt
from ..lightx2v_core.text.tokenizer import EOS, MAX_TOKENS, PromptTokenizer
from ..lightx2v_core.text.umt5 import TextEncoder
from ..lightx2v_core.wan.tae import TinyVae, Vae
from ..lightx2v_core.wan.vae import SPACE, TIME, Z_DIM, denormalise, first_frame, normalise
from .patcher import ResidentPatcher

log = logging.getLogger(__name__)

TOKENS_KEY = "umt5xxl"  # the name native nodes know Wan's tokens by
SMALL_ENCODER = 2**31  # bytes
OFFICIAL_WIDTH = 96  # of the VAE whose memory ComfyUI's figures are for
# Values at work per pixel of one frame in the tiny VAE. Counted for one latent frame at a time:
# 475 while it encodes, 600 while it decodes; the rest is room for the convolutions' workspace.
TINY_ENCODE, TINY_DECODE = 650, 800


class VaeBorder(nn.Module):
    """`first_stage_model`: raw mean outside, normalised latents inside. On a card whole or not."""

    blocks = ()

    def __init__(self, vae: Vae, files: Sequence[Path] = ()) -> None:
        super().__init__()
        self.core = vae
        self.engine = Residency(self, files)

    def encode(self, pixels_BCFHW: Tensor, **_options: object) -> Tensor:
        if isinstance(self.core, TinyVae):
            log.warning("a tiny VAE encodes only nearly; for start images use wan_2.1_vae")
        _, _, frames, height, width = pixels_BCFHW.shape
        at_once = _at_once(self.core, VideoSize(width, height, frames))
        return denormalise(
            self.core.encode(pixels_BCFHW, _chunk_report(), latents_per_chunk=at_once)
        )

    def decode(self, raw_BCTHW: Tensor, **_options: object) -> Tensor:
        _, _, T, H, W = raw_BCTHW.shape
        at_once = _at_once(self.core, VideoSize(W * SPACE, H * SPACE, first_frame(T)))
        return self.core.decode(
            normalise(raw_BCTHW),
            _chunk_report(),
            output_device=mm.intermediate_device(),
            latents_per_chunk=at_once,
        )


def _at_once(vae: Vae, size: VideoSize) -> int:
    """Latent frames that go through at once; at least 1, since the host decides on tiles. What is
    reserved for other programs stays free."""
    device = next(vae.parameters()).device
    is_card = device.type == "cuda"
    room = mm.get_free_memory(device) - mm.extra_reserved_memory() if is_card else None
    return max(latents_at_once(vae, size, room), 1)


def _chunk_report() -> Callable[[int, int], None]:
    """A progress bar over chunks that is also the interrupt check."""
    bars: list[comfy.utils.ProgressBar] = []

    def report(done: int, total: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        if not bars:
            bars.append(comfy.utils.ProgressBar(total))
        bars[0].update_absolute(done, total)

    return report


class HostVae(comfy.sd.VAE):
    """The host's VAE around our module. Its __init__ is left out: it wants a file it knows."""

    def __init__(self, vae: Vae, dtype: torch.dtype, files: Sequence[Path] = ()) -> None:
        self.first_stage_model = VaeBorder(vae, files).eval()
        self.vae_dtype, self.working_dtypes = dtype, [dtype]
        self.device, self.output_device = mm.vae_device(), mm.intermediate_device()
        self.latent_channels, self.latent_dim = Z_DIM, 3
        self.output_channels, self.pad_channel_value = 3, 1.0
        self.upscale_ratio = (lambda frames: max(0, frames * TIME - (TIME - 1)), SPACE, SPACE)
        self.downscale_ratio = (
            lambda frames: max(0, math.floor((frames + TIME - 1) / TIME)),
            SPACE,
            SPACE,
        )
        self.upscale_index_formula = self.downscale_index_formula = (TIME, SPACE, SPACE)
        self.process_input = lambda image: image * 2.0 - 1.0
        # In place: newer hosts ignore what this returns.
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        self.memory_used_encode, self.memory_used_decode = _memory_of(vae)
        self.crop_input, self.not_video, self.disable_offload = True, False, False
        self.extra_1d_channel = self.size = None
        self.audio_sample_rate = 44100
        self.patcher = ResidentPatcher(
            self.first_stage_model,
            load_device=self.device,
            offload_device=mm.vae_offload_device(),
        )


def _memory_of(vae: Vae) -> tuple[Callable, Callable]:
    """Bytes that encoding (of B C F H W pixels) and decoding (of a B C T H W latent) take."""
    if isinstance(vae, TinyVae):
        return _tiny_memory(TINY_ENCODE, 1, 1), _tiny_memory(TINY_DECODE, SPACE, TIME)
    return (
        _memory(vae.config.encoder_dim, 1500, 6000, 1),
        _memory(vae.config.decoder_dim, 2200, 7000, SPACE * SPACE),
    )


def _tiny_memory(values: int, side: int, frames: int) -> Callable:
    """For an input whose cells are `side` pixels wide and high and `frames` frames long.

    The clip itself counts with 12 bytes a pixel, as if it were on the card.
    """

    def used(shape: Sequence[int], dtype: torch.dtype) -> float:
        per_pixel = values * mm.dtype_size(dtype) + 12 * shape[2] * frames
        return per_pixel * shape[3] * shape[4] * side * side

    return used


def _memory(width: int, short: int, long: int, area: int) -> Callable:
    """The host's own figures for Wan's VAE (bytes a pixel by clip length), scaled by its width."""

    def used(shape: Sequence[int], dtype: torch.dtype) -> float:
        per_pixel = (short if shape[2] <= 4 else long) * max(width / OFFICIAL_WIDTH, 0.1)
        return per_pixel * shape[3] * shape[4] * area * mm.dtype_size(dtype)

    return used


def load_host_vae(path: Path) -> HostVae:
    dtype = mm.vae_dtype(mm.vae_device(), [torch.bfloat16, torch.float16, torch.float32])
    return HostVae(load_vae(path, dtype), dtype, [path])


class TextStage(nn.Module):
    """`cond_stage_model`. Everything of ours is here or in the tokenizer: the host's CLIP.clone()
    returns a plain CLIP, so a subclass would lose its methods."""

    def __init__(self, encoder: TextEncoder, files: Sequence[Path] = ()) -> None:
        super().__init__()
        self.encoder = encoder
        self.dtypes = {encoder.dtype}
        self.engine = Residency(self, files)
        self.engine.hook(self.blocks)
        for block in self.blocks:
            block.register_forward_pre_hook(_check_interrupt, prepend=True)
        self.warned = False

    @property
    def blocks(self) -> nn.ModuleList:
        """What streams when the card is short."""
        return self.encoder.blocks

    def reset_clip_options(self) -> None:
        """Options of the host last for one prompt; none is kept."""

    def set_clip_options(self, options: dict) -> None:
        if options.get("layer") is not None and not self.warned:
            self.warned = True
            log.warning("stopping at another layer (CLIPSetLastLayer) has no effect on UMT5 here")

    def encode_token_weights(self, tokens: dict) -> tuple[Tensor, None]:
        """States BSE padded with zeros to 512, and no pooled output."""
        ids = [token[0] for section in tokens[TOKENS_KEY] for token in section]
        if any(not isinstance(token, int) for token in ids):
            raise RequestError(
                "the prompt holds an embedding (embedding:name); UMT5 has none: remove it"
            )
        if len(ids) > MAX_TOKENS:
            log.warning("the prompt has %d tokens; the first %d are used", len(ids), MAX_TOKENS)
            ids = [*ids[: MAX_TOKENS - 1], EOS]
        ids_BS = torch.zeros((1, MAX_TOKENS), dtype=torch.int64)
        ids_BS[0, : len(ids)] = torch.tensor(ids)
        mask_BS = torch.zeros_like(ids_BS)
        mask_BS[0, : len(ids)] = 1
        states = self.encoder.encode_ids(ids_BS, mask_BS)
        return states.to(mm.intermediate_device(), torch.float32), None


def _check_interrupt(*_call: object) -> None:
    mm.throw_exception_if_processing_interrupted()


class HostTokenizer:
    """Prompts to tokens in the host's form. Text is cleaned and taken as it stands: no weights."""

    def __init__(self, pieces: PromptTokenizer) -> None:
        self.pieces = pieces

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, **_options: object
    ) -> dict[str, list[list[tuple]]]:
        ids = [*self.pieces.spell(clean_prompt(text)), EOS]
        extra = (0,) if return_word_ids else ()
        return {TOKENS_KEY: [[(token, 1.0, *extra) for token in ids]]}

    def state_dict(self) -> dict:
        return {}


def load_host_clip(path: Path) -> comfy.sd.CLIP:
    device = mm.text_encoder_device()
    encoder = load_text_encoder(path, dtype=_text_dtype(device, path))
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = TextStage(encoder, [path])
    clip.tokenizer = HostTokenizer(encoder.tokenizer)
    clip.patcher = ResidentPatcher(
        clip.cond_stage_model,
        load_device=device,
        offload_device=mm.text_encoder_offload_device(),
    )
    clip.patcher.is_clip = True
    clip.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    clip.layer_idx, clip.apply_hooks_to_conds = None, None
    clip.use_clip_schedule, clip.tokenizer_options = False, {}
    return clip


def _text_dtype(device: torch.device, path: Path) -> torch.dtype | None:
    """The file's own; on a CPU float32, which is faster there, unless it would fill the memory: a
    GGUF file may hold ten times what its size says."""
    is_small = path.is_file() and path.stat().st_size < SMALL_ENCODER and path.suffix != ".gguf"
    return torch.float32 if mm.is_device_cpu(device) and is_small else None
