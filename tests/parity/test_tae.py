"""The tiny VAE against a second implementation: frame by frame, from tensors and their names.

diffusers has no TAEHV. The host tests compare with the one in ComfyUI.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_core.wan.tae import TinyConfig, TinyVae
from tests.conftest import fill, relative_error
from tests.headers.reconstruct_vae import tiny_vae
from tests.tolerances import FLOAT32_PARITY

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def ours() -> TinyVae:
    """Of the published sizes."""
    vae = fill(TinyVae(TinyConfig("taew2_1")))
    vae.decoder[22].bias.fill_(0.5)  # grey in the middle, so that little is clamped
    return vae


def conv(weights: Weights, stem: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = weights[f"{stem}.weight"]
    padding = weight.shape[-1] // 2
    return F.conv2d(x, weight, weights.get(f"{stem}.bias"), stride, padding)


def with_memory(weights: Weights, stem: str, frames: list[Tensor]) -> list[Tensor]:
    done = []
    for index, frame in enumerate(frames):
        before = frames[index - 1] if index else torch.zeros_like(frame)
        x = torch.cat([frame, before], dim=1)
        for layer in (0, 2):
            x = F.relu(conv(weights, f"{stem}.conv.{layer}", x))
        done.append(F.relu(conv(weights, f"{stem}.conv.4", x) + frame))
    return done


def decode_01(weights: Weights, latents: list[Tensor]) -> list[Tensor]:
    """Latent frames BCHW to pictures in 0..1, the first three of which nobody wants."""
    frames = [F.relu(conv(weights, "decoder.1", 3 * torch.tanh(x / 3))) for x in latents]
    for start, times in ((3, 1), (9, 2), (15, 2)):
        for index in range(start, start + 3):
            frames = with_memory(weights, f"decoder.{index}", frames)
        grown = []
        for frame in frames:
            large = F.interpolate(frame, scale_factor=2.0, mode="nearest")
            grown += conv(weights, f"decoder.{start + 4}.conv", large).chunk(times, dim=1)
        frames = [conv(weights, f"decoder.{start + 5}", frame) for frame in grown]
    return [conv(weights, "decoder.22", F.relu(frame)).clamp(0, 1) for frame in frames]


def encode_01(weights: Weights, pictures: list[Tensor]) -> list[Tensor]:
    """Pictures BCHW in 0..1, the last repeated until four divide their number, to latent frames."""
    pictures = pictures + [pictures[-1]] * (-len(pictures) % 4)
    frames = [F.relu(conv(weights, "encoder.0", picture)) for picture in pictures]
    for start, together in ((2, 2), (7, 2), (12, 1)):
        groups = [frames[i : i + together] for i in range(0, len(frames), together)]
        pooled = [conv(weights, f"encoder.{start}.conv", torch.cat(g, dim=1)) for g in groups]
        frames = [conv(weights, f"encoder.{start + 1}", frame, stride=2) for frame in pooled]
        for index in range(start + 2, start + 5):
            frames = with_memory(weights, f"encoder.{index}", frames)
    return [conv(weights, "encoder.17", frame) for frame in frames]


@pytest.mark.parametrize("latent_frames", [1, 2, 4])
@pytest.mark.parametrize("latents_per_chunk", [1, 9], ids=["one_by_one", "at_once"])
def test_decode_gives_the_frames_of_a_second_implementation(
    ours: TinyVae, latent_frames: int, latents_per_chunk: int
) -> None:
    generator = torch.Generator().manual_seed(latent_frames)
    latent = torch.randn(2, 16, latent_frames, 3, 2, generator=generator)

    pixels = ours.decode(latent, latents_per_chunk=latents_per_chunk)

    frames = decode_01(ours.state_dict(), list(latent.unbind(2)))
    expected = torch.stack(frames[3:], dim=2) * 2 - 1
    assert pixels.shape == expected.shape == (2, 3, 4 * latent_frames - 3, 24, 16)
    assert expected.abs().lt(1.0).float().mean() > 0.9
    assert relative_error(pixels, expected) <= FLOAT32_PARITY


@pytest.mark.parametrize("frames", [1, 5, 9])
@pytest.mark.parametrize("latents_per_chunk", [1, 9], ids=["one_by_one", "at_once"])
def test_encode_gives_the_latents_of_a_second_implementation(
    ours: TinyVae, frames: int, latents_per_chunk: int
) -> None:
    generator = torch.Generator().manual_seed(frames)
    pixels = torch.rand(2, 3, frames, 24, 16, generator=generator) * 2 - 1

    latent = ours.encode(pixels, latents_per_chunk=latents_per_chunk)

    pictures = [(picture + 1) / 2 for picture in pixels.unbind(2)]
    expected = torch.stack(encode_01(ours.state_dict(), pictures), dim=2)
    assert latent.shape == expected.shape == (2, 16, (frames + 3) // 4, 3, 2)
    assert relative_error(latent, expected) <= FLOAT32_PARITY


def test_the_weights_are_those_of_the_published_file_by_name_and_shape(ours: TinyVae) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}

    assert shapes == tiny_vae()
