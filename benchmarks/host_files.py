"""Random model files in the folders, and by the names, in which ComfyUI's own loaders take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lightx2v_core.quant.formats import MARKER
from lightx2v_core.quant.quantise import WRITTEN
from lightx2v_core.text.tokenizer import SPIECE_MODEL
from lightx2v_core.wan.vae import VaeConfig

from .host_graphs import Files
from .random_files import TINY
from .random_models import quantised, random_weights, write_file
from .random_parts import TEXT_XXL, Family, draw, text_tensors, vae_tensors

# As wide in the text as ComfyUI's own Wan always is; without CLIP, which it knows in one size.
TINY_TEXT = {"dim": 4096, "heads": 2, "ffn_dim": 16, "layers": 1, "vocab": 300}
TINY_FAMILY = Family(
    replace(TINY, num_layers=2, text_dim=4096, clip_tokens=0), TINY_TEXT, {}, VaeConfig(8, 8)
)


def write_models(models: Path, family: Family, scheme: str, device: torch.device) -> Files:
    """The files of `family` below ComfyUI's folder `models`; what is there already is kept.

    `scheme` is bf16 or one of WRITTEN; ComfyUI's own loader multiplies "fp8-tensor" in fp8.
    """
    files = Files(
        transformer=f"wan2.1_i2v_480p_{scheme}_lightx2v_4step.safetensors",
        text="umt5_xxl_bf16.safetensors",
        vae="wan_2.1_vae.safetensors",
        clip="clip_vision_h.safetensors" if family.clip else None,
        text_loader="CLIPLoader" if family.text == TEXT_XXL else "LightX2VLoadTextEncoder",
    )

    def transformer() -> dict[str, Tensor]:
        tensors = random_weights(family.transformer, device)
        if scheme == "bf16":
            return tensors
        written = WRITTEN[scheme]
        # Without it ComfyUI leaves the scales out; with two numbers in it, it multiplies in bf16.
        marker = {MARKER: torch.zeros(1, dtype=written.dtype)} if written.marker else {}
        return quantised(tensors, scheme) | marker

    made = {
        ("diffusion_models", files.transformer): transformer,
        ("text_encoders", files.text): lambda: umt5_tensors(family.text, device),
        ("vae", files.vae): lambda: vae_tensors(family.vae, device),
    }
    if files.clip is not None:
        made["clip_vision", files.clip] = lambda: draw(clip_shapes(**family.clip), device)
    for (folder, name), make in made.items():
        (models / folder).mkdir(parents=True, exist_ok=True)
        if not (models / folder / name).is_file():
            write_file(make(), models / folder / name, sync=False)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return files


# Official name of a layer in a block -> Hugging Face's.
UMT5_LAYERS = {
    "norm1": "0.layer_norm",
    **{f"attn.{name}": f"0.SelfAttention.{name}" for name in "qkvo"},
    "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
    "norm2": "1.layer_norm",
    "ffn.gate.0": "1.DenseReluDense.wi_0",
    "ffn.fc1": "1.DenseReluDense.wi_1",
    "ffn.fc2": "1.DenseReluDense.wo",
}
UMT5_WHOLE = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}


def umt5_tensors(sizes: Mapping[str, int], device: torch.device) -> dict[str, Tensor]:
    """A UMT5 of these sizes by the names of Hugging Face, its tokenizer in it."""
    renamed = {}
    for name, tensor in text_tensors(sizes, device).items():
        stem = name.removesuffix(".weight")
        _, number, layer = [*stem.split(".", 2), "", ""][:3]
        if name == SPIECE_MODEL:
            renamed[name] = tensor
        elif stem in UMT5_WHOLE:
            renamed[f"{UMT5_WHOLE[stem]}.weight"] = tensor
        else:
            renamed[f"encoder.block.{number}.layer.{UMT5_LAYERS[layer]}.weight"] = tensor
    return renamed


def clip_shapes(
    dim: int, layers: int, patch: int, tokens: int, head: int
) -> dict[str, tuple[int, ...]]:
    """Of an image tower by Hugging Face's names, the only ones that ComfyUI's loader knows."""
    top = "vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        f"{top}embeddings.class_embedding": (dim,),
        f"{top}embeddings.patch_embedding.weight": (dim, 3, patch, patch),
        f"{top}embeddings.position_embedding.weight": (tokens, dim),
        "visual_projection.weight": (head, dim),
    }
    linears = {f"self_attn.{name}_proj": (dim, dim) for name in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    norms = [f"{top}pre_layrnorm", f"{top}post_layernorm"]
    for layer in range(layers):
        block = f"{top}encoder.layers.{layer}."
        norms += [f"{block}layer_norm1", f"{block}layer_norm2"]
        for name, shape in linears.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
    return shapes
