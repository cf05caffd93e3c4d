"""Every file of one image-to-video model at its real shapes, with random weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightx2v_core.assemble import Parts
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.vae import VaeConfig, WanVae
from tests.unit.text.samples import official_shapes as text_shapes
from tests.unit.text.samples import spiece_tensor
from tests.unit.vision.samples import official_shapes as clip_shapes

from .random_models import quantised, random_weights, write_file

SEED = 3
# UMT5-XXL and CLIP ViT-H, as Wan 2.1 I2V takes them.
TEXT_XXL = {"dim": 4096, "heads": 64, "ffn_dim": 10240, "layers": 24, "vocab": 256384}
CLIP_H = {"dim": 1280, "layers": 32, "patch": 14, "tokens": 257, "head": 1024}


@dataclass(frozen=True)
class Family:
    """Sizes of all four networks."""

    transformer: WanConfig
    text: Mapping[str, int]
    clip: Mapping[str, int]
    vae: VaeConfig


def write_parts(
    folder: Path, family: Family, scheme: str, device: torch.device, sync: bool = True
) -> Parts:
    """Four files in `folder`, those that are there already kept. Drawn on `device`."""
    paths = Parts(
        transformer=folder / f"wan2.1_i2v_480p_{scheme}_lightx2v_4step.safetensors",
        vae=folder / "wan_2.1_vae.safetensors",
        text=folder / "umt5_xxl_bf16.safetensors",
        clip=folder / "clip_vision_h.safetensors",
    )
    assert paths.clip is not None, "named above"
    if not paths.transformer.is_file():
        tensors = random_weights(family.transformer, device)
        tensors = tensors if scheme == "bf16" else quantised(tensors, scheme)
        write_file(tensors, paths.transformer, sync)
    if not paths.text.is_file():
        write_file(text_tensors(family.text, device), paths.text, sync)
    if not paths.clip.is_file():
        write_file(draw(clip_shapes(**family.clip), device), paths.clip, sync)
    if not paths.vae.is_file():
        write_file(vae_tensors(family.vae, device), paths.vae, sync)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return paths


def text_tensors(sizes: Mapping[str, int], device: torch.device) -> dict[str, Tensor]:
    """A UMT5 of these sizes with a small tokenizer, as ComfyUI's files hold it."""
    return draw(text_shapes(**sizes), device) | {"spiece_model": spiece_tensor()}


def vae_tensors(config: VaeConfig, device: torch.device) -> dict[str, Tensor]:
    with torch.device("meta"):
        empty = WanVae(config).state_dict()
    return draw({name: tuple(tensor.shape) for name, tensor in empty.items()}, device)


def draw(shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
    """bfloat16: norms near one, the rest with a spread that keeps signals as large as they were."""
    generator = torch.Generator(device).manual_seed(SEED)
    drawn = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            drawn[name] = 1 + 0.1 * noise
        elif len(shape) < 2 or "embedding" in name:
            drawn[name] = 0.1 * noise
        else:
            drawn[name] = noise / math.sqrt(math.prod(shape[1:]))
    return drawn
