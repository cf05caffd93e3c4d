"""Every file of one image-to-video model at its real shapes, with random weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lightx2v_core.assemble import Parts
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.vae import VaeConfig, WanVae
from tests.unit.text.samples import official_shapes as text_shapes
from tests.unit.text.samples import spiece_tensor
from tests.unit.vision.samples import official_shapes as clip_shapes

from .random_files import I2V_14B
from .random_models import (
    WEIGHT_SEED,
    quantised,
    random_weights,
    safetensors_header,
    write_file,
)

SEED = 3
# UMT5-XXL and CLIP ViT-H, as Wan 2.1 I2V takes them.
TEXT_XXL = {"dim": 4096, "heads": 64, "ffn_dim": 10240, "layers": 24, "vocab": 256384}
TEXT_TYPES = {"umt5-fp16": torch.float16, "umt5-fp8": torch.float8_e4m3fn}
CLIP_H = {"dim": 1280, "layers": 32, "patch": 14, "tokens": 257, "head": 1024}


@dataclass(frozen=True)
class Family:
    """Sizes of all four networks."""

    transformer: WanConfig
    text: Mapping[str, int]
    clip: Mapping[str, int]
    vae: VaeConfig


FAMILY = Family(I2V_14B, TEXT_XXL, CLIP_H, VaeConfig())


def write_parts(
    folder: Path, family: Family, scheme: str, device: torch.device, sync: bool = True
) -> Parts:
    """Four files in `folder`, those that are there already kept. Drawn on `device`."""
    path = folder / f"wan2.1_i2v_480p_{scheme}_lightx2v_4step.safetensors"
    _write_transformer(path, family.transformer, (scheme, WEIGHT_SEED), device, sync)
    return _write_encoders(path, family, device, sync)


def write_experts(
    folder: Path, family: Family, scheme: str, device: torch.device, sync: bool = True
) -> Parts:
    """The same of a Wan 2.2 model: two experts, and no CLIP."""
    config = replace(family.transformer, clip_tokens=0)
    paths = [
        folder / f"wan2.2_i2v_A14b_{noise}_noise_{scheme}_lightx2v_4step.safetensors"
        for noise in ("high", "low")
    ]
    for seed, path in enumerate(paths, start=WEIGHT_SEED):
        _write_transformer(path, config, (scheme, seed), device, sync)
    parts = _write_encoders(paths[0], replace(family, clip={}), device, sync)
    return replace(parts, low=paths[1])


def _write_transformer(
    path: Path, config: WanConfig, drawn: tuple[str, int], device: torch.device, sync: bool
) -> None:
    """Of the scheme and seed `drawn`."""
    if path.is_file():
        return
    scheme, seed = drawn
    tensors = random_weights(config, device, seed=seed)
    write_file(tensors if scheme == "bf16" else quantised(tensors, scheme), path, sync)


def _write_encoders(transformer: Path, family: Family, device: torch.device, sync: bool) -> Parts:
    """What goes with `transformer`, beside it; CLIP where the family has one."""
    folder = transformer.parent
    paths = Parts(
        transformer=transformer,
        vae=folder / "wan_2.1_vae.safetensors",
        text=folder / "umt5_xxl_bf16.safetensors",
        clip=folder / "clip_vision_h.safetensors" if family.clip else None,
    )
    if not paths.text.is_file():
        write_file(text_tensors(family.text, device), paths.text, sync)
    if paths.clip is not None and not paths.clip.is_file():
        write_file(draw(clip_shapes(**family.clip), device), paths.clip, sync)
    if not paths.vae.is_file():
        write_file(vae_tensors(family.vae, device), paths.vae, sync)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return paths


def write_text(folder: Path, scheme: str, sizes: Mapping[str, int]) -> Path:
    """A UMT5 of zeros, named after `scheme`: official names, linears in that type (scaled where
    it is fp8) and the rest in float16. Its holes take no room on the disk."""
    path, dtype = folder / f"{scheme}.safetensors", TEXT_TYPES[scheme]
    tokens = spiece_tensor()
    tensors = {"spiece_model": tokens}
    for name, shape in text_shapes(**sizes).items():
        is_linear = ".attn." in name or ".ffn." in name
        stored = dtype if is_linear else torch.float16
        tensors[name] = torch.empty(shape, dtype=stored, device="meta")
        if is_linear and dtype != torch.float16:
            tensors[f"{name.removesuffix('weight')}scale_weight"] = torch.empty((), device="meta")
    header, _, end = safetensors_header(tensors)
    with path.open("wb") as file:
        file.write(header + tokens.numpy().tobytes())
        file.truncate(end)
    return path


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
