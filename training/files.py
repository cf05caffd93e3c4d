"""Weights of the stages on disk: float16 under official names, found in one of two folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightx2v_core.quant.dequantise import dequantised
from lightx2v_core.wan.model import WanModel
from lightx2v_core.wan.vae import VaeConfig, WanVae

from .sizes import Sizes

VAE, TEXT = "demo_vae.safetensors", "demo_umt5.safetensors"
STUDENTS = {"t2v": "demo_t2v.safetensors", "i2v": "demo_i2v.safetensors"}
TEACHERS = {"t2v": "teacher_t2v.safetensors", "i2v": "teacher_i2v.safetensors"}
QUANTISED = "lightx2v.quantised"  # metadata that `quantize` writes
FAMILIES = {"t2v": "wan2.1", "i2v": "wan2.2"}
TITLES = {
    "demo_vae": "LightX2V demo VAE",
    "demo_umt5": "LightX2V demo text encoder",
    "demo_t2v": "LightX2V demo text-to-video, 4 steps",
    "demo_i2v": "LightX2V demo image-to-video, 4 steps",
    "teacher_t2v": "LightX2V demo text-to-video teacher",
    "teacher_i2v": "LightX2V demo image-to-video teacher",
}


def save_weights(path: Path, tensors: Mapping[str, Tensor], task: str | None = None) -> None:
    """Whole or not at all: a run that is cut off leaves the previous file."""
    halves = {name: _half(tensor) for name, tensor in tensors.items()}
    is_teacher = path.stem.startswith("teacher")
    metadata = {
        "format": "pt",
        "lightx2v.release": "demo-base" if is_teacher else "demo",
        "modelspec.title": TITLES.get(path.stem, path.stem),
        "modelspec.license": "Apache-2.0",
    }
    if task is not None:
        metadata |= {"lightx2v.task": task, "lightx2v.family": FAMILIES[task]}
    part = path.with_suffix(".part")
    save_file(halves, part, metadata=metadata)
    part.chmod(0o644)
    part.replace(path)


def _half(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.half() if tensor.is_floating_point() else tensor


def find(name: str, *folders: Path | None) -> Path:
    """The first of `folders` that holds `name`."""
    for folder in folders:
        if folder is not None and (folder / name).is_file():
            return folder / name
    looked_in = ", ".join(str(folder) for folder in folders if folder is not None)
    raise FileNotFoundError(f"{name} is in none of {looked_in}; run the stage that makes it first")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Floats and 8-bit codes as float32, the rest as it is."""
    tensors = dequantised(load_file(path), path.name, "file of the demo", torch.float32)
    return {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}


def plain_file(path: Path, folder: Path) -> Path:
    """`path`, or a float16 copy of it in `folder` where its linears are 8-bit codes."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if QUANTISED not in metadata:
        return path
    tensors = {name: _half(tensor) for name, tensor in read_weights(path).items()}
    metadata.pop(QUANTISED)
    save_file(tensors, folder / path.name, metadata=metadata)
    return folder / path.name


def read_vae(path: Path) -> WanVae:
    tensors = read_weights(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    vae = WanVae(VaeConfig.from_shapes(shapes, path.name))
    vae.load_state_dict(tensors)
    return vae.requires_grad_(False).eval()


def read_transformer(path: Path, sizes: Sizes, takes_image: bool) -> WanModel:
    """Ready to train, in float32."""
    model = WanModel(sizes.transformer(takes_image))
    model.load_state_dict(read_weights(path))
    return model


def widen_input(model: WanModel, sizes: Sizes) -> WanModel:
    """A text-to-video model with 20 more input channels that count for nothing at first."""
    wide = WanModel(sizes.transformer(takes_image=True))
    tensors = dict(model.state_dict())
    narrow = tensors["patch_embedding.weight"]
    padding = torch.zeros(narrow.shape[0], 20, *narrow.shape[2:])
    tensors["patch_embedding.weight"] = torch.cat((narrow.cpu(), padding), dim=1)
    wide.load_state_dict(tensors)
    return wide


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
