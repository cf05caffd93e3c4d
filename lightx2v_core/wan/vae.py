"""The Wan 2.1 VAE, which Wan 2.2 14B uses too: pixels to latents and back, in causal chunks.

One latent frame stands for the first pixel frame, every later one for four; height and width
shrink by eight. Latents are normalised here; ComfyUI's LATENT is the raw mean of the encoder, and
`normalise` and `denormalise` are the border. Gradients follow the caller's grad mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from ..device import describe_card
from ..errors import CheckpointError, RequestError, preview
from ..ops.channels import select_pass
from . import vae_card
from .vae_layers import Decoder, Encoder, Stream, run_layers
from .vae_output import Collector
from .vae_pieces import Piece, Stills, cut, find_stills, through

LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
Z_DIM = len(LATENT_MEAN)
SPACE = 8  # pixels per latent row or column
TIME = 4  # frames per latent frame after the first

OnChunk = Callable[[int, int], None]  # (chunks done, chunks in all); raise inside to cancel


def ignore(done: int, total: int) -> None:
    """The `on_chunk` of a caller that does not listen."""


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """Widths only. 96 is the official file, 24 lightvaew2_1; all else is the same in each."""

    encoder_dim: int = 96
    decoder_dim: int = 96
    z_dim: int = Z_DIM

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, tuple[int, ...]], source: str = "this file"
    ) -> VaeConfig:
        """Read the widths from tensor shapes under official names; `source` is for messages."""
        wanted = ("encoder.conv1.weight", "decoder.head.0.gamma", "conv2.weight")
        missing = [name for name in wanted if not shapes.get(name) or 0 in shapes[name]]
        if missing:
            raise CheckpointError(
                f"{source} is not a Wan 2.1 VAE with encoder and decoder: it lacks "
                f"{preview(missing)} and holds {preview(shapes)}. Use wan_2.1_vae."
            )
        encoder_dim, decoder_dim, z_dim = (shapes[name][0] for name in wanted)
        if z_dim == 48 or any(name.startswith("decoder.upsamples.0.upsamples.") for name in shapes):
            raise CheckpointError(
                f"{source} is wan2.2_vae ({z_dim} latent channels), which is only for the 5B "
                "model; Wan 2.2 14B and all Wan 2.1 models use wan_2.1_vae. Load that file."
            )
        if z_dim != Z_DIM:
            raise CheckpointError(
                f"{source} has {z_dim} latent channels; a Wan 2.1 VAE has {Z_DIM}. Use wan_2.1_vae."
            )
        return cls(encoder_dim, decoder_dim, z_dim)


class WanVae(nn.Module):
    """Computes in the dtype and on the device of its weights; what it returns is float32.

    `output_device` is where the result is collected, by default where the input is.
    `latents_per_chunk` trades memory for larger steps and never changes the result.
    To train: `vae.conv1(vae.encoder(x, Stream()))` is mean and log variance of a whole clip in
    one chunk, `vae.decoder(vae.conv2(raw), Stream())` its pixels before clamping.
    """

    plain_layers = False  # also on cards that the faster ones are for, to compare

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder_dim, config.z_dim)
        self.conv1 = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config.decoder_dim, config.z_dim)

    def encode(
        self,
        pixels_BCFHW: Tensor,
        on_chunk: OnChunk = ignore,
        *,
        output_device: torch.device | str | None = None,
        latents_per_chunk: int = 1,
        stills: Stills | None = None,
    ) -> Tensor:
        """Pixels in [-1, 1] to the normalised mean, BCTHW; nothing is sampled.

        `stills` are the stretches of equal frames where the caller knows them; None looks.
        """
        B, T, H, W = latent_size(pixels_BCFHW)
        device = output_device or pixels_BCFHW.device
        raw_BCTHW = torch.empty(B, self.config.z_dim, T, H, W, dtype=torch.float32, device=device)
        chunks, weight = spans(T, latents_per_chunk), self.conv1.weight
        # Frames that share what was computed once would share its gradient too.
        if pixels_BCFHW.requires_grad:
            stills = []
        known = find_stills(pixels_BCFHW) if stills is None else stills

        def pieces() -> Iterator[Piece]:
            for frames in cut([(first_frame(a), first_frame(b)) for a, b in chunks], known):
                if (frames.start, frames.stop) in known:
                    one = pixels_BCFHW[:, :, frames.start : frames.start + 1]
                    yield Piece(one.to(weight), frames.stop - frames.start)
                else:
                    yield Piece(pixels_BCFHW[:, :, frames].to(weight))

        done, at = 0, 0
        learns = pixels_BCFHW.requires_grad
        for piece in self._through(self.encoder, pieces(), latents_per_chunk, learns):
            moments = self.conv1(piece.frames)
            raw_BCTHW[:, :, at : at + piece.length] = moments[:, : self.config.z_dim]
            at += piece.length
            while done < len(chunks) and chunks[done][1] <= at:
                done += 1
                on_chunk(done, len(chunks))
        return normalise(raw_BCTHW)

    def decode(
        self,
        latent_BCTHW: Tensor,
        on_chunk: OnChunk = ignore,
        *,
        output_device: torch.device | str | None = None,
        latents_per_chunk: int = 1,
    ) -> Tensor:
        """A normalised latent to pixels in [-1, 1], BCFHW."""
        raw_BCTHW = denormalise(latent_BCTHW)
        B, _, T, H, W = raw_BCTHW.shape
        frames = (B, 3, first_frame(T), H * SPACE, W * SPACE)
        pixels = Collector(frames, output_device or latent_BCTHW.device)
        chunks = spans(T, latents_per_chunk)

        def pieces() -> Iterator[Piece]:
            for start, stop in chunks:
                yield Piece(self.conv2(raw_BCTHW[:, :, start:stop].to(self.conv2.weight)))

        done = 0
        learns = latent_BCTHW.requires_grad
        for piece in self._through(self.decoder, pieces(), latents_per_chunk, learns):
            pixels.put(piece.frames.clamp(-1.0, 1.0))
            while done < len(chunks) and first_frame(chunks[done][1]) <= pixels.filled:
                done += 1
                on_chunk(done, len(chunks))
        return pixels.finish()

    def _through(
        self, half: Encoder | Decoder, pieces: Iterable[Piece], latents: int, learns: bool
    ) -> Iterator[Piece]:
        """All stages at `latents` latent frames at once, the small ones on a card at more."""
        stages, weight = half.stages(), self.conv1.weight
        learns = learns or any(p.requires_grad for p in half.parameters())
        plain = self.plain_layers or (learns and torch.is_grad_enabled())
        if plain or vae_card.blocked_by(describe_card(weight.device), weight.dtype):
            limits = [stage.frames * latents for stage in stages]
            return through(stages, pieces, limits, run_layers, Stream())
        run = vae_card.CardLayers(select_pass(weight.device))
        limits = [stage.frames * latents << stage.level for stage in stages]
        return through(stages, pieces, limits, run, Stream())

    def encode_tiled(
        self,
        pixels_BCFHW: Tensor,
        on_chunk: OnChunk = ignore,
        *,
        tile: int = 256,
        overlap: int = 64,
        output_device: torch.device | str | None = None,
    ) -> Tensor:
        """`encode` in tiles of at most `tile` pixels a side, joined linearly over `overlap`.

        Near the whole result, not equal to it: a tile sees nothing beyond its edges, and the
        attention in the middle nothing beyond its tile. One tile is the whole result exactly.
        """
        _, _, H, W = latent_size(pixels_BCFHW)

        def run(rows: Strip, columns: Strip, report: OnChunk) -> Tensor:
            part = pixels_BCFHW[..., rows.scaled(SPACE), columns.scaled(SPACE)]
            return self.encode(part, report, output_device=output_device)

        rows, columns = _strips(H, tile, overlap), _strips(W, tile, overlap)
        return _join(run, rows, columns, 1, on_chunk)

    def decode_tiled(
        self,
        latent_BCTHW: Tensor,
        on_chunk: OnChunk = ignore,
        *,
        tile: int = 256,
        overlap: int = 64,
        output_device: torch.device | str | None = None,
    ) -> Tensor:
        """`decode` in tiles of at most `tile` pixels a side, as `encode_tiled`."""
        H, W = latent_BCTHW.shape[-2:]

        def run(rows: Strip, columns: Strip, report: OnChunk) -> Tensor:
            part = latent_BCTHW[..., rows.scaled(1), columns.scaled(1)]
            return self.decode(part, report, output_device=output_device)

        rows, columns = _strips(H, tile, overlap), _strips(W, tile, overlap)
        # Weights add up to one only to rounding, so a white area could end above 1.
        return _join(run, rows, columns, SPACE, on_chunk).clamp_(-1.0, 1.0)


def normalise(raw_BCTHW: Tensor) -> Tensor:
    """The encoder's mean, as on ComfyUI's LATENT wire, to the core's latent; float32."""
    mean, std = _statistics(raw_BCTHW)
    return (raw_BCTHW.float() - mean) / std


def denormalise(latent_BCTHW: Tensor) -> Tensor:
    """The core's latent to the encoder's mean, as on ComfyUI's LATENT wire; float32."""
    mean, std = _statistics(latent_BCTHW)
    return latent_BCTHW.float() * std + mean


def _statistics(latent_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    check_latent_shape(latent_BCTHW)
    mean, std = torch.tensor([LATENT_MEAN, LATENT_STD], device=latent_BCTHW.device)
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)


def check_latent_shape(latent_BCTHW: Tensor) -> None:
    """RequestError when this is no video latent of Wan 2.1."""
    shape = tuple(latent_BCTHW.shape)
    if len(shape) != 5 or shape[1] != Z_DIM:
        hint = " 48 channels belong to the 5B model and wan2.2_vae." if 48 in shape[1:2] else ""
        raise RequestError(
            f"this latent is {shape}; Wan 2.1 and Wan 2.2 14B need (batch, {Z_DIM}, latent frames, "
            f"height / {SPACE}, width / {SPACE}).{hint} Make it with wan_2.1_vae."
        )


def latent_size(pixels_BCFHW: Tensor) -> tuple[int, int, int, int]:
    """B T H W of the latent, or RequestError when these pixels have none."""
    if pixels_BCFHW.ndim != 5 or pixels_BCFHW.shape[1] != 3:
        raise RequestError(
            f"these pixels are {tuple(pixels_BCFHW.shape)}; "
            "the VAE needs (batch, 3, frames, height, width)"
        )
    B, _, frames, height, width = pixels_BCFHW.shape
    if frames % TIME != 1:
        nearest = (max(frames, 1) + 1) // TIME * TIME + 1
        raise RequestError(f"{frames} frames is not 4*n + 1; use {nearest}")
    if height % SPACE or width % SPACE:
        sides = [max((side + SPACE // 2) // SPACE, 1) * SPACE for side in (width, height)]
        raise RequestError(
            f"{width}x{height} is not divisible by {SPACE}; use {sides[0]}x{sides[1]}"
        )
    return B, (frames - 1) // TIME + 1, height // SPACE, width // SPACE


def first_frame(latent_frame: int) -> int:
    """The first pixel frame under a latent frame; for T latent frames, the count of frames."""
    return max(TIME * (latent_frame - 1) + 1, 0)


def spans(latent_frames: int, per_chunk: int) -> list[tuple[int, int]]:
    """First latent frame of each chunk and the one behind its last."""
    if per_chunk < 1:
        raise RequestError(f"{per_chunk} latent frames per chunk; use 1 or more")
    return [
        (start, min(start + per_chunk, latent_frames))
        for start in range(0, latent_frames, per_chunk)
    ]


@dataclass(frozen=True, slots=True)
class Strip:
    """The extent of a tile along one axis, in latent cells."""

    start: int
    stop: int

    def scaled(self, scale: int) -> slice:
        return slice(self.start * scale, self.stop * scale)


def _strips(cells: int, tile: int, overlap: int) -> list[Strip]:
    """As few strips as `tile` pixels allow, of one length, neighbours sharing `overlap` or more."""
    if tile % SPACE or overlap % SPACE or not 0 <= overlap < tile:
        raise RequestError(
            f"tile {tile} with overlap {overlap} does not fit; use multiples of {SPACE} "
            "with the overlap smaller than the tile, such as 256 and 64"
        )
    tile, overlap = tile // SPACE, overlap // SPACE
    if cells <= tile:
        return [Strip(0, cells)]
    count = math.ceil((cells - overlap) / (tile - overlap))
    length = math.ceil((cells + (count - 1) * overlap) / count)
    starts = [i * (cells - length) // (count - 1) for i in range(count)]
    return [Strip(start, start + length) for start in starts]


def _weights(strips: list[Strip], scale: int) -> list[Tensor]:
    """Per strip a ramp over what it shares with each neighbour; together they are 1 everywhere."""
    ramps = []
    for i, strip in enumerate(strips):
        ramp = torch.ones((strip.stop - strip.start) * scale)
        if i > 0 and (shared := (strips[i - 1].stop - strip.start) * scale):
            ramp[:shared] *= _rise(shared)
        if i + 1 < len(strips) and (shared := (strip.stop - strips[i + 1].start) * scale):
            ramp[-shared:] *= _rise(shared).flip(0)
        ramps.append(ramp)
    # Where overlaps are long, three strips meet, and their ramps alone do not add up to 1.
    total = torch.zeros(strips[-1].stop * scale)
    for strip, ramp in zip(strips, ramps, strict=True):
        total[strip.scaled(scale)] += ramp
    return [ramp / total[strip.scaled(scale)] for strip, ramp in zip(strips, ramps, strict=True)]


def _rise(length: int) -> Tensor:
    """From just above 0 to just below 1, and 1 together with its mirror image."""
    return (torch.arange(length) + 0.5) / length


def _join(
    run: Callable[[Strip, Strip, OnChunk], Tensor],
    rows: list[Strip],
    columns: list[Strip],
    scale: int,
    on_chunk: OnChunk,
) -> Tensor:
    """Run every tile and add up the weighted results; `scale` is output pixels per latent cell."""
    tiles = len(rows) * len(columns)
    if tiles == 1:
        return run(rows[0], columns[0], on_chunk)
    joined: Tensor | None = None
    weighted_rows = list(zip(rows, _weights(rows, scale), strict=True))
    weighted_columns = list(zip(columns, _weights(columns, scale), strict=True))
    for index, ((row, row_weight), (column, column_weight)) in enumerate(
        product(weighted_rows, weighted_columns)
    ):

        def report(done: int, chunks: int, before: int = index) -> None:
            on_chunk(before * chunks + done, tiles * chunks)

        part = run(row, column, report)
        if joined is None:
            height, width = rows[-1].stop * scale, columns[-1].stop * scale
            joined = part.new_zeros(*part.shape[:3], height, width)
        part = part * row_weight.to(part.device).unsqueeze(1) * column_weight.to(part.device)
        joined[..., row.scaled(scale), column.scaled(scale)] += part
    assert joined is not None, "there is at least one tile"
    return joined
