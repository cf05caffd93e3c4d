"""TAEHV: the tiny autoencoder for latents of Wan 2.1, which Wan 2.2 14B uses too.

Plain 2-D convolutions over frames; what came before enters as the previous frame's features. It
decodes in a fraction of the real VAE's memory and arithmetic, at the cost of detail.
Layer order and names: https://github.com/madebyollin/taehv (taehv.py at 1f14a56), which made
taew2_1; lighttaew2_1 has the same layers (ModelTC/LightX2V at f8aee98b,
lightx2v/models/video_encoders/hf/tae.py) but reads and writes latents that are not normalised.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, RequestError, preview
from .vae import (
    SPACE,
    TIME,
    Z_DIM,
    OnChunk,
    WanVae,
    check_latent_shape,
    denormalise,
    first_frame,
    ignore,
    latent_size,
    normalise,
    spans,
)

LANDMARK = "decoder.22.bias"
MEM_BLOCKS = 3  # per level
POOLED, GROWN = (2, 2, 1), (1, 2, 2)  # frames into one and one into frames, level by level
EXTRA = TIME - 1  # frames that the first latent frame decodes to beyond the one it stands for

# (pattern in the file name, what the file is); the first match wins. Headers are all alike.
RELEASES = (
    (r"light_?tae_?w(an)?_?2[._]?1", "lighttaew2_1"),
    (r"tae_?w(an)?_?2[._]?1", "taew2_1"),
)
OTHER_FAMILIES = (("taehv", "HunyuanVideo"), ("taecvx", "CogVideoX"), ("taeos", "Open-Sora"))

Past = dict[nn.Module, Tensor]  # the last frame each layer saw, B1CHW


def is_tiny(names: Container[str]) -> bool:
    """Whether a file with these tensor names is of the TAEHV family, for whatever model."""
    return LANDMARK in names


def latent_channels(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Of a file that `is_tiny`; 0 where it does not tell. "Super" ones begin a layer earlier."""
    for name in ("decoder.1.weight", "decoder.0.weight"):
        if len(shape := shapes.get(name, ())) == 4:
            return shape[1]
    return 0


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """`release` tells taew2_1 from lighttaew2_1; `encoder_width` is 0 for a decoder alone."""

    release: str
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    encoder_width: int = 64

    @property
    def is_normalised(self) -> bool:
        """Whether its latents are the normalised ones that the transformer works in."""
        return self.release == "taew2_1"

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], source: str) -> TinyConfig:
        """Widths from tensor shapes, the release from the file name `source`.

        Raises CheckpointError for tiny VAEs of other models, and where the name is silent.
        """
        if channels := latent_channels(shapes):
            _check_channels(channels, source)
        release = _release(source)
        wanted = [f"decoder.{layer}.weight" for layer in (1, 8, 14, 20)]
        wanted += ["encoder.0.weight"] if "encoder.0.weight" in shapes else []
        if missing := [n for n in wanted if not shapes.get(n) or 0 in shapes[n]]:
            raise CheckpointError(
                f"{source} is not a whole tiny VAE (TAEHV): it lacks {preview(missing)}; "
                "download it again"
            )
        first, second, third, last, *encoder = (shapes[name][0] for name in wanted)
        return cls(release, (first, second, third, last), *encoder or (0,))


def _check_channels(channels: int, source: str) -> None:
    if channels == 48:
        raise CheckpointError(
            f"{source} is a tiny VAE with 48 latent channels (taew2_2, lighttaew2_2), only for the "
            "5B model; Wan 2.2 14B and all Wan 2.1 models use taew2_1 or lighttaew2_1"
        )
    if channels != Z_DIM:
        raise CheckpointError(
            f"{source} is a tiny VAE with {channels} latent channels, made for another model; "
            f"Wan 2.1 and Wan 2.2 14B have {Z_DIM}: use taew2_1 or lighttaew2_1"
        )


def named_release(file_name: str) -> str | None:
    """taew2_1 or lighttaew2_1, by the file name alone."""
    name = file_name.lower()
    return next((release for pattern, release in RELEASES if re.search(pattern, name)), None)


def _release(source: str) -> str:
    if release := named_release(source):
        return release
    for word, model in OTHER_FAMILIES:
        if word in source.lower():
            raise CheckpointError(
                f"{source} is a tiny VAE for {model}; use taew2_1 or lighttaew2_1 for Wan"
            )
    raise CheckpointError(
        f"{source} is a tiny VAE (TAEHV) with {Z_DIM} latent channels, and its name does not say "
        "which: taew2_1 and lighttaew2_1 hold the same tensors but need differently scaled "
        "latents. Put the right one of these words back into the file name"
    )


class TinyVae(nn.Module):
    """Computes in the dtype and on the device of its weights; what it returns is float32.

    Called as `WanVae` is: normalised latents, pixels in [-1, 1]. `latents_per_chunk` 1 keeps one
    latent frame at work, the clip's length all at once; the frames are the same.
    """

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        width = config.encoder_width
        self.encoder = _make_encoder(width) if width else None
        self.decoder = _make_decoder(config.widths)

    def encode(
        self,
        pixels_BCFHW: Tensor,
        on_chunk: OnChunk = ignore,
        *,
        output_device: torch.device | str | None = None,
        latents_per_chunk: int = 1,
    ) -> Tensor:
        """Pixels in [-1, 1] to a normalised latent, BCTHW; near the real VAE's, not equal to it.

        One latent frame stands for four pixel frames, the first too (the last one has the final
        frame repeated), so a single picture among other frames is not kept apart from them.
        """
        if self.encoder is None:
            raise RequestError(
                "this tiny VAE holds a decoder alone and cannot encode; use wan_2.1_vae for that"
            )
        B, T, H, W = latent_size(pixels_BCFHW)
        device = output_device or pixels_BCFHW.device
        latent_BCTHW = torch.empty(B, Z_DIM, T, H, W, dtype=torch.float32, device=device)
        weight, past = next(self.encoder.parameters()), Past()
        chunks = spans(T, latents_per_chunk)
        for done, (start, stop) in enumerate(chunks, start=1):
            chunk = pixels_BCFHW[:, :, start * TIME : stop * TIME]
            missing = (stop - start) * TIME - chunk.shape[2]
            chunk = torch.cat((chunk, chunk[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2)
            x_BTCHW = ((chunk.float() + 1.0) / 2.0).transpose(1, 2).to(weight)
            latent_BCTHW[:, :, start:stop] = _run(self.encoder, x_BTCHW, past).transpose(1, 2)
            on_chunk(done, len(chunks))
        return latent_BCTHW if self.config.is_normalised else normalise(latent_BCTHW)

    def decode(
        self,
        latent_BCTHW: Tensor,
        on_chunk: OnChunk = ignore,
        *,
        output_device: torch.device | str | None = None,
        latents_per_chunk: int = 1,
    ) -> Tensor:
        """A normalised latent to pixels in [-1, 1], BCFHW."""
        check_latent_shape(latent_BCTHW)
        x_BCTHW = latent_BCTHW if self.config.is_normalised else denormalise(latent_BCTHW)
        B, _, T, H, W = x_BCTHW.shape
        pixels_BCFHW = torch.empty(
            (B, 3, first_frame(T), H * SPACE, W * SPACE),
            dtype=torch.float32,
            device=output_device or latent_BCTHW.device,
        )
        weight, past = next(self.decoder.parameters()), Past()
        chunks = spans(T, latents_per_chunk)
        for done, (start, stop) in enumerate(chunks, start=1):
            x_BTCHW = x_BCTHW[:, :, start:stop].transpose(1, 2).to(weight)
            frames_BTCHW = _run(self.decoder, x_BTCHW, past).clamp(0.0, 1.0) * 2.0 - 1.0
            if start == 0:
                frames_BTCHW = frames_BTCHW[:, EXTRA:]
            pixels_BCFHW[:, :, first_frame(start) : first_frame(stop)] = frames_BTCHW.transpose(
                1, 2
            )
            on_chunk(done, len(chunks))
        return pixels_BCFHW


Vae = WanVae | TinyVae


class SoftClamp(nn.Module):
    """Latents held within -3 to 3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3.0) * 3.0


class MemBlock(nn.Module):
    """A residual block that sees each frame beside the one before it, zeros before the first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        first, *others = [nn.Conv2d(c, dim, 3, padding=1) for c in (2 * dim, dim, dim)]
        self.conv = nn.Sequential(
            first, nn.ReLU(inplace=True), others[0], nn.ReLU(inplace=True), others[1]
        )

    def forward(self, x_BTCHW: Tensor, past: Past) -> Tensor:
        last_B1CHW = past.get(self)
        if last_B1CHW is None:
            last_B1CHW = torch.zeros_like(x_BTCHW[:, :1])
        before_BTCHW = torch.cat((last_B1CHW, x_BTCHW[:, :-1]), dim=1)
        past[self] = x_BTCHW[:, -1:].clone()  # a view would keep the whole chunk
        joined = torch.cat((x_BTCHW, before_BTCHW), dim=2).flatten(0, 1)
        return (self.conv(joined).unflatten(0, x_BTCHW.shape[:2]) + x_BTCHW).relu_()


class TPool(nn.Module):
    """`frames` frames into one."""

    def __init__(self, dim: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(dim * frames, dim, 1, bias=False)

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        stacked = x_BTCHW.unflatten(1, (-1, self.frames)).flatten(2, 3)
        return self.conv(stacked.flatten(0, 1)).unflatten(0, stacked.shape[:2])


class TGrow(nn.Module):
    """One frame into `frames` frames."""

    def __init__(self, dim: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(dim, dim * frames, 1, bias=False)

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        grown = self.conv(x_BTCHW.flatten(0, 1)).unflatten(0, x_BTCHW.shape[:2])
        return grown.unflatten(2, (self.frames, -1)).flatten(1, 2)


def _make_encoder(dim: int) -> nn.ModuleList:
    layers: list[nn.Module] = [nn.Conv2d(3, dim, 3, padding=1), nn.ReLU(inplace=True)]
    for frames in POOLED:
        halve = nn.Conv2d(dim, dim, 3, stride=2, padding=1, bias=False)
        layers += [TPool(dim, frames), halve, *(MemBlock(dim) for _ in range(MEM_BLOCKS))]
    return nn.ModuleList([*layers, nn.Conv2d(dim, Z_DIM, 3, padding=1)])


def _make_decoder(widths: tuple[int, ...]) -> nn.ModuleList:
    layers: list[nn.Module] = [
        SoftClamp(),
        nn.Conv2d(Z_DIM, widths[0], 3, padding=1),
        nn.ReLU(inplace=True),
    ]
    for (dim, out_dim), frames in zip(pairwise(widths), GROWN, strict=True):
        layers += [MemBlock(dim) for _ in range(MEM_BLOCKS)]
        layers += [nn.Upsample(scale_factor=2), TGrow(dim, frames)]
        layers.append(nn.Conv2d(dim, out_dim, 3, padding=1, bias=False))
    return nn.ModuleList([*layers, nn.ReLU(inplace=True), nn.Conv2d(widths[-1], 3, 3, padding=1)])


def _run(layers: nn.ModuleList, x_BTCHW: Tensor, past: Past) -> Tensor:
    """The layers in order; those without a sense of time see frames as a batch."""
    x = x_BTCHW
    for layer in layers:
        if isinstance(layer, MemBlock):
            x = layer(x, past)
        elif isinstance(layer, (TPool, TGrow)):
            x = layer(x)
        else:
            x = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return x
