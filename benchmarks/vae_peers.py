"""Other programs' VAE of Wan 2.1 with our weights, run beside ours in the same process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightx2v_core.checkpoint.layouts import vae_to_diffusers
from lightx2v_core.errors import RequestError
from lightx2v_core.wan.vae import VaeConfig

from .contender import Weights, installed
from .peer_lightx2v import convolve_by_rows_of_channels, lightx2v_release, lightx2v_vae
from .peers import PEERS, comfy_vae, contenders

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """Someone else's VAE; encodes to and decodes from raw means, B C T H W."""

    name: str
    version: str
    encode: Run
    decode: Run


def open_peers(
    name: str, weights: Weights, config: VaeConfig, device: torch.device, dtype: torch.dtype
) -> Iterator[Peer]:
    """What `NAME` or `NAME=PATH` has, in `dtype` on `device`, with weights of official names.

    LightX2V's comes twice, with its USE_CHANNELS_LAST_3D and without.
    Raises RequestError for a name that is unknown.
    """
    kind, _, path = name.partition("=")
    if kind == "diffusers":
        yield _diffusers(weights, config, device, dtype)
    elif kind == "comfyui":
        release = contenders(name)[0].version
        theirs = _filled(comfy_vae(config, device).to(dtype), weights)
        yield Peer(kind, release, theirs.encode, theirs.decode)
    elif kind == "lightx2v":
        release = lightx2v_release(Path(path))
        for channels_last in (False, True):
            theirs = _filled(lightx2v_vae(Path(path), config, device).to(device, dtype), weights)
            if channels_last:
                convolve_by_rows_of_channels(theirs)
            setting = "lightx2v channels-last" if channels_last else kind
            encode, decode = (_unscaled(call) for call in (theirs.encode, theirs.decode))
            yield Peer(setting, release, encode, decode)
    else:
        raise RequestError(f"peer {name!r} is unknown; use {PEERS}")


def _filled(vae: nn.Module, weights: Weights) -> nn.Module:
    vae.load_state_dict(weights)
    return vae.requires_grad_(False).eval()


def _unscaled(call: Callable[..., Tensor]) -> Run:
    """LightX2V's takes mean and deviation of the latent, here those of a raw one."""
    return lambda x: call(x, [0.0, 1.0])


def _diffusers(
    weights: Weights, config: VaeConfig, device: torch.device, dtype: torch.dtype
) -> Peer:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        theirs = AutoencoderKLWan(
            base_dim=config.encoder_dim, decoder_base_dim=config.decoder_dim, z_dim=config.z_dim
        )
    theirs.to_empty(device=device).to(dtype)
    theirs = _filled(theirs, {vae_to_diffusers(name): tensor for name, tensor in weights.items()})
    return Peer(
        "diffusers",
        installed("diffusers"),
        lambda x: theirs.encode(x).latent_dist.mean,
        lambda raw: theirs.decode(raw).sample,
    )
