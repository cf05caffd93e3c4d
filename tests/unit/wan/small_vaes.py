"""Both kinds of VAE with few channels, and what they read."""

from __future__ import annotations

import torch
from torch import Tensor

from lightx2v_core.wan.tae import TinyConfig, TinyVae
from lightx2v_core.wan.vae import VaeConfig, WanVae
from tests.conftest import fill


def small_vae() -> WanVae:
    return fill(WanVae(VaeConfig(encoder_dim=4, decoder_dim=4)))


def small_tiny_vae(release: str = "taew2_1", encoder_width: int = 8) -> TinyVae:
    vae = fill(TinyVae(TinyConfig(release, (16, 8, 8, 8), encoder_width)))
    vae.decoder[22].bias.fill_(0.5)  # grey in the middle, so that little is clamped
    return vae


def clip(frames: int, height: int = 16, width: int = 24, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


def latent(frames: int, height: int = 2, width: int = 3, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, 16, frames, height, width, generator=generator)
