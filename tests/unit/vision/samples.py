"""Small CLIP image towers under official and Hugging Face names."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightx2v_core.vision.clip import ClipVision, build_clip_vision


def official_shapes(
    dim: int = 160, layers: int = 3, patch: int = 7, tokens: int = 17, head: int = 24
) -> dict[str, tuple[int, ...]]:
    """The visual half of the official .pth; ViT-H is 1280, 32, 14, 257, 1024."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (dim, 3, patch, patch),
        "cls_embedding": (1, 1, dim),
        "pos_embedding": (1, tokens, dim),
        "pre_norm.weight": (dim,),
        "pre_norm.bias": (dim,),
        "post_norm.weight": (dim,),
        "post_norm.bias": (dim,),
        "head": (dim, head),
    }
    linears = {"attn.to_qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    linears |= {"mlp.0": (4 * dim, dim), "mlp.2": (dim, 4 * dim)}
    for block in (f"transformer.{layer}." for layer in range(layers)):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}{norm}.weight": (dim,), f"{block}{norm}.bias": (dim,)}
        for name, shape in linears.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
    return {f"visual.{name}": shape for name, shape in shapes.items()}


def official_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The visual half among a few tensors of the textual one."""
    generator = torch.Generator().manual_seed(11)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            return (1.0 + 0.1 * noise).to(dtype)
        if name.endswith("weight"):
            return (noise / math.sqrt(noise[0].numel())).to(dtype)
        return (0.5 * noise).to(dtype)

    tensors = {name: draw(name, shape) for name, shape in official_shapes().items()}
    return tensors | {
        "log_scale": torch.zeros(()),
        "textual.token_embedding.weight": torch.zeros(4, 4),
        "textual.blocks.0.attn.q.weight": torch.zeros(4, 4),
    }


def hugging_face_tensors() -> dict[str, Tensor]:
    """The same tower under the names of Hugging Face, written out by hand."""
    whole = {
        "patch_embedding.weight": "embeddings.patch_embedding.weight",
        "pre_norm.weight": "pre_layrnorm.weight",
        "pre_norm.bias": "pre_layrnorm.bias",
        "post_norm.weight": "post_layernorm.weight",
        "post_norm.bias": "post_layernorm.bias",
    }
    parts = {
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.proj": "self_attn.out_proj",
        "mlp.0": "mlp.fc1",
        "mlp.2": "mlp.fc2",
    }
    official = {
        name.removeprefix("visual."): tensor
        for name, tensor in official_tensors().items()
        if name.startswith("visual.")
    }
    renamed = {
        "embeddings.class_embedding": official.pop("cls_embedding")[0, 0],
        "embeddings.position_embedding.weight": official.pop("pos_embedding")[0],
        "embeddings.position_ids": torch.arange(17)[None],
    }
    head = official.pop("head")
    for name, tensor in official.items():
        if name in whole:
            renamed[whole[name]] = tensor
            continue
        _, layer, rest = name.split(".", 2)
        part, kind = rest.rsplit(".", 1)
        if part == "attn.to_qkv":
            for row, letter in enumerate("qkv"):
                rows = tensor[row * 160 : (row + 1) * 160]
                renamed[f"encoder.layers.{layer}.self_attn.{letter}_proj.{kind}"] = rows
        else:
            renamed[f"encoder.layers.{layer}.{parts[part]}.{kind}"] = tensor
    prefixed = {f"vision_model.{name}": tensor for name, tensor in renamed.items()}
    return prefixed | {"visual_projection.weight": head.T}


def tiny_vision(dtype: torch.dtype = torch.float32) -> ClipVision:
    return build_clip_vision(official_tensors(dtype), "tiny.pth")


def sample_image(height: int = 40, width: int = 56, batch: int = 2) -> Tensor:
    """BCHW in [-1, 1]."""
    generator = torch.Generator().manual_seed(7)
    return torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
