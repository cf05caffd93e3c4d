"""What a VAE file is, from names, shapes and its own name. Reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import CheckpointError
from ..wan.tae import TinyConfig, is_tiny, latent_channels
from ..wan.vae import VaeConfig
from .headers import TensorHeader
from .layouts import VAE_DIFFUSERS_LANDMARK, VAE_OUTER, plain_vae_names

LANDMARK = "decoder.middle.0.residual.0.gamma"
# What the widths of a VAE are read from, by official name.
TELLING = ("encoder.conv1.weight", "decoder.head.0.gamma", "conv2.weight")
FAMILIES = {16: "wan2.1", 48: "wan2.2"}  # by latent channels
RELEASES = {VaeConfig(): "wan_2.1_vae", VaeConfig(24, 24): "lightvaew2_1"}


@dataclass(frozen=True, slots=True)
class VaeFacts:
    """None where the file does not tell. `refusal` says why this version cannot load it."""

    layout: str | None = None
    family: str | None = None
    release: str | None = None
    refusal: str | None = None


def detect_vae(headers: Mapping[str, TensorHeader], source: str) -> VaeFacts | None:
    """None when this is no VAE of Wan's or TAEHV's kind; `source` is the file's name."""
    stored = plain_vae_names(headers)
    shapes = {name: headers[inside].shape for name, inside in stored.items()}
    if is_tiny(shapes):
        return _detect_tiny(shapes, source)
    if LANDMARK in shapes:
        layout, names = "official", {name: name for name in TELLING}
    elif VAE_DIFFUSERS_LANDMARK in shapes:
        layout, names = "diffusers", {name: _to_diffusers(name) for name in TELLING}
    else:
        return None
    if not all(shapes.get(name) for name in names.values()):
        return VaeFacts(layout)  # the loader says what is missing
    telling = {name: shapes[theirs] for name, theirs in names.items()}
    family = FAMILIES.get(telling["conv2.weight"][0])
    try:
        config = VaeConfig.from_shapes(telling, source)
    except CheckpointError as error:
        return VaeFacts(layout, family, refusal=str(error))
    return VaeFacts(layout, family, RELEASES.get(config))


def _detect_tiny(shapes: Mapping[str, tuple[int, ...]], source: str) -> VaeFacts:
    try:
        config = TinyConfig.from_shapes(shapes, source)
    except CheckpointError as error:
        family = "wan2.2" if latent_channels(shapes) == 48 else None
        return VaeFacts("taehv", family, refusal=str(error))
    return VaeFacts("taehv", "wan2.1", config.release)


def _to_diffusers(name: str) -> str:
    layer, leaf = name.rsplit(".", 1)
    return f"{VAE_OUTER[layer]}.{leaf}"
