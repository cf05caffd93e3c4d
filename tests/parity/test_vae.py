"""The VAE against the one in diffusers: same names, same shapes, same numbers in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightx2v_core.checkpoint.layouts import vae_to_diffusers
from lightx2v_core.wan.vae import LATENT_MEAN, LATENT_STD, VaeConfig, WanVae, denormalise
from tests.conftest import fill, relative_error
from tests.tolerances import FLOAT32_PARITY

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pair() -> tuple[WanVae, torch.nn.Module]:
    """Ours and theirs with the same weights; the decoder is wider than the encoder."""
    ours = fill(WanVae(VaeConfig(encoder_dim=8, decoder_dim=12)))
    weights = ours.state_dict()
    theirs = diffusers.AutoencoderKLWan(base_dim=8, decoder_base_dim=12).requires_grad_(False)
    theirs.load_state_dict({vae_to_diffusers(name): value for name, value in weights.items()})
    return ours, theirs


def clip(frames: int, batch: int = 2, height: int = 24, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_encode_gives_the_normalised_mean_of_diffusers(
    pair: tuple[WanVae, torch.nn.Module], frames: int
) -> None:
    ours, theirs = pair

    latent = ours.encode(clip(frames))

    mean = torch.tensor(LATENT_MEAN).view(1, 16, 1, 1, 1)
    std = torch.tensor(LATENT_STD).view(1, 16, 1, 1, 1)
    expected = (theirs.encode(clip(frames)).latent_dist.mean - mean) / std
    assert latent.shape == expected.shape
    assert relative_error(latent, expected) <= FLOAT32_PARITY


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_decode_gives_the_frames_of_diffusers(
    pair: tuple[WanVae, torch.nn.Module], frames: int
) -> None:
    ours, theirs = pair
    generator = torch.Generator().manual_seed(frames)
    latent = torch.randn(2, 16, (frames - 1) // 4 + 1, 3, 2, generator=generator)

    pixels = ours.decode(latent)

    expected = theirs.decode(denormalise(latent)).sample
    assert pixels.shape == expected.shape == (2, 3, frames, 24, 16)
    assert expected.abs().lt(1.0).float().mean() > 0.5  # most of it is not hidden by the clamp
    assert relative_error(pixels, expected) <= FLOAT32_PARITY


def test_latent_statistics_are_those_of_diffusers(pair: tuple[WanVae, torch.nn.Module]) -> None:
    config = pair[1].config

    assert tuple(config.latents_mean) == LATENT_MEAN
    assert tuple(config.latents_std) == LATENT_STD


def test_the_official_file_loads_by_its_own_194_names_and_shapes() -> None:
    with torch.device("meta"):
        ours = WanVae(VaeConfig()).state_dict()
        theirs = diffusers.AutoencoderKLWan().state_dict()

    shapes = {vae_to_diffusers(name): tensor.shape for name, tensor in ours.items()}

    assert len(ours) == 194
    assert shapes == {name: tensor.shape for name, tensor in theirs.items()}
