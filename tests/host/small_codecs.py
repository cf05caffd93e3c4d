"""A small VAE, tiny VAEs and a small text encoder, ours and the host's with the same weights."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations


from inside import WORK, fill, host_nodes, pack, relative, run

import comfy.latent_formats
import comfy.ldm.wan.vae
import comfy.sd
import comfy.taesd.taehv
import comfy.utils
import torch
from small_files import umt5_tensors, write

tiny_vae = pack("lightx2v_core.wan.tae")
wan_vae = pack("lightx2v_core.wan.vae")
codecs = pack("nodes.codecs")

VAE_WEIGHTS = fill(wan_vae.WanVae(wan_vae.VaeConfig(16, 16))).state_dict()
# Pixels inside -1..1: our decoder clamps each tile, the host's the blend of them.
VAE_WEIGHTS["decoder.head.2.weight"] *= 0.1
write(WORK / "models/vae/small_vae.safetensors", VAE_WEIGHTS)
TINY = fill(tiny_vae.TinyVae(tiny_vae.TinyConfig("taew2_1")))  # the sizes that the host knows
# As above: pixels inside 0..1.
TINY.decoder[22].weight *= 0.3
TINY.decoder[22].bias.fill_(0.5)
TINY_WEIGHTS = TINY.state_dict()
write(WORK / "models/vae_approx/taew2_1.safetensors", TINY_WEIGHTS)
write(WORK / "models/vae_approx/lighttaew2_1.safetensors", TINY_WEIGHTS)
TEXT_WEIGHTS = umt5_tensors(64)
write(WORK / "models/text_encoders/small_umt5.safetensors", TEXT_WEIGHTS)

rng = torch.Generator().manual_seed(6)
CLIP_FRAMES = torch.rand(9, 64, 64, 3, generator=rng)
LATENT = {"samples": torch.randn(1, 16, 3, 8, 8, generator=rng)}
WIDE_LATENT = {"samples": torch.randn(1, 16, 2, 4, 12, generator=rng)}
PROMPT = "a red circle   moving right"


def our_vae() -> object:
    return run("LightX2VLoadVae", file="small_vae.safetensors")[0]


def native_vae() -> object:
    return comfy.sd.VAE(sd=dict(VAE_WEIGHTS), dtype=torch.float32)


def our_tiny_vae(release: str) -> object:
    return run("LightX2VLoadVae", file=f"vae_approx/{release}.safetensors")[0]


def our_clip() -> object:
    return run("LightX2VLoadTextEncoder", file="small_umt5.safetensors")[0]


def encode(clip: object, prompt: str = PROMPT) -> list:
    return host_nodes.CLIPTextEncode().encode(clip, prompt)[0]


def close(actual: torch.Tensor, expected: torch.Tensor, limit: float = 1e-5) -> str:
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = relative(actual, expected)
    assert error <= limit, f"relative error {error:.2e} is above {limit:.0e}"
    return f"{error:.1e}"
