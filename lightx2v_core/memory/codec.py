"""The VAE under any memory: whole, whole with everything else off the card, then in tiles.

There is no step in time: the core's VAE goes through a clip a few latent frames after another, so
its memory does not depend on the length.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..checkpoint.writing import replacing, write_somewhere
from ..datatypes import VideoSize
from ..errors import LightX2VError
from ..wan.vae import OnChunk, WanVae, denormalise
from ..wan.vae_pieces import Stills
from .plan import WORKSPACE_BYTES, vae_bytes

log = logging.getLogger(__name__)

TILES = ((256, 64), (128, 32))  # pixels a side, and how many of them two tiles share
CHUNKS = (4, 2, 1)  # latent frames at once
# One latent frame of so many pixels keeps a card busy: at 832x480 four at once were 3 % faster on
# an H200, and held 4.8 GB more.
BUSY_PIXELS = 832 * 480

Run = Callable[..., Tensor]


class Codec(Protocol):
    """A VAE; only some can work in tiles."""

    @property
    def encode(self) -> Run: ...
    @property
    def decode(self) -> Run: ...


def latents_at_once(
    vae: object, size: VideoSize, room: float | None, choices: Sequence[int] | None = None
) -> int:
    """The first of `choices` of latent frames that the count says fit into `room`; 0 where none.

    More than one at once is for pictures so small that all of them together have BUSY_PIXELS at
    most, and must fit into half of the room. Larger pictures never depend on the room in this, nor
    do the bits of their frames.
    Without choices: CHUNKS on CUDA cards, 1 elsewhere, where more at once is no faster. 1 where
    nothing can be counted.
    """
    if room is None or not isinstance(vae, WanVae):
        return 1
    width, weight = max(vae.config.encoder_dim, vae.config.decoder_dim), vae.conv1.weight
    for latents in choices or (CHUNKS if weight.is_cuda else CHUNKS[-1:]):
        if latents > 1 and latents * size.width * size.height > BUSY_PIXELS:
            continue
        needed = vae_bytes(width, size, weight.dtype.itemsize, latents)
        if needed + WORKSPACE_BYTES <= (room if latents == 1 else room / 2):
            return latents
    return 0


def whole_bytes(vae: nn.Module, size: VideoSize) -> float:
    """What `vae` takes on the card to work on whole frames, weights too; infinite where nothing
    can be counted."""
    if not isinstance(vae, WanVae):
        return math.inf
    width, itemsize = max(vae.config.encoder_dim, vae.config.decoder_dim), vae.conv1.weight.itemsize
    weights = sum(weight.nbytes for weight in vae.parameters())
    return weights + vae_bytes(width, size, itemsize) + WORKSPACE_BYTES


def decode_anyhow(
    vae: Codec,
    latent_BCTHW: Tensor,
    on_chunk: OnChunk,
    free_others: Callable[[], None],
    latents: int = 1,
) -> Tensor:
    """Pixels on the CPU, filled as frames come, `latents` latent frames at once; 0 begins with
    tiles.

    Raises the out-of-memory error of the last attempt.
    """
    tiled = getattr(vae, "decode_tiled", None)
    return _first_that_fits(vae.decode, tiled, latent_BCTHW, on_chunk, free_others, latents)


def encode_anyhow(
    vae: Codec,
    pixels_BCFHW: Tensor,
    on_chunk: OnChunk,
    free_others: Callable[[], None],
    latents: int = 1,
    stills: Stills | None = None,
) -> Tensor:
    """The normalised latent on the CPU; see `decode_anyhow`, and `WanVae.encode` for `stills`."""
    tiled, encode = getattr(vae, "encode_tiled", None), vae.encode
    if stills is not None:
        encode = partial(encode, stills=stills)
    return _first_that_fits(encode, tiled, pixels_BCFHW, on_chunk, free_others, latents)


def _first_that_fits(
    run: Run,
    run_tiled: Run | None,
    x: Tensor,
    on_chunk: OnChunk,
    free_others: Callable[[], None],
    latents: int,
) -> Tensor:
    def alone() -> Tensor:
        free_others()
        return run(x, on_chunk, output_device="cpu")

    def in_tiles(tile: int, overlap: int) -> Tensor:
        assert run_tiled is not None
        return run_tiled(x, on_chunk, tile=tile, overlap=overlap, output_device="cpu")

    chunk = {"latents_per_chunk": latents} if latents > 1 else {}
    attempts: list[tuple[str, Callable[[], Tensor]]] = [
        ("whole", lambda: run(x, on_chunk, output_device="cpu", **chunk)),
        ("whole, with everything else off the card", alone),
    ]
    if run_tiled is not None:
        tiles = [(f"tiles of {t} pixels", lambda t=t, o=o: in_tiles(t, o)) for t, o in TILES]
        attempts = [*attempts, *tiles] if latents else tiles
    for number, (how, attempt) in enumerate(attempts):
        if number:
            log.warning("not enough memory for the VAE; once more: %s", how)
        try:
            return attempt()
        except torch.cuda.OutOfMemoryError:
            if number == len(attempts) - 1:
                raise
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    raise AssertionError("the last attempt returns or raises")


def keep_latent(latent_BCTHW: Tensor, rescue: Path) -> str:
    """Save a latent; a sentence about where it is."""
    try:
        place = save_latent(latent_BCTHW, rescue)
    except LightX2VError as error:
        return f"and the latent of this run is lost: {error}"
    return f"the latent of this run is saved as {place}: ComfyUI's LoadLatent opens it"


def save_latent(latent_BCTHW: Tensor, path: Path) -> Path:
    """`save_raw_latent` of a normalised latent."""
    return save_raw_latent(denormalise(latent_BCTHW), path)


def save_raw_latent(raw_BCTHW: Tensor, path: Path) -> Path:
    """The raw mean in the form that ComfyUI's LoadLatent reads, whole or not at all.

    In the folder for temporary files where `path` cannot be written; the place is returned. Raises
    CheckpointError where neither takes it.
    """
    from safetensors.torch import save

    raw = raw_BCTHW.detach().cpu().contiguous()
    data = save({"latent_tensor": raw, "latent_format_version_0": torch.tensor([])})

    def write(target: Path) -> None:
        with replacing(target, len(data)) as part:
            part.write_bytes(data)

    return write_somewhere(write, path)
