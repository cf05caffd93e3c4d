"""The CLIP image encoder of Wan 2.1 (open-clip ViT-H/14), around the one in transformers.

Wan reads the states before the last block, so the last block and all behind it are never built.
Names may be those of the official release (`visual.*`) or of Hugging Face (`vision_model.*`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, preview
from ..ops.placing import place
from ..quant.dequantise import dequantised

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModel

WHAT = "CLIP image encoder"
HEAD_DIM = 80  # of ViT-H; the other published CLIPs have 64, 88 or 104
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

OFFICIAL_PREFIX, PREFIX = "visual.", "vision_model."
PATCHES = "embeddings.patch_embedding.weight"
POSITIONS = "embeddings.position_embedding.weight"
LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
# Behind the states that Wan reads, or not a weight.
UNUSED = re.compile(r"(post_norm|post_layernorm|head|embeddings\.position_ids)(\..*)?")
# (pattern, replacement) from official names to those of transformers.
OFFICIAL_NAMES = (
    (r"patch_embedding\.weight", PATCHES),
    (r"cls_embedding", "embeddings.class_embedding"),
    (r"pos_embedding", POSITIONS),
    (r"pre_norm\.(\w+)", r"pre_layrnorm.\1"),
    (r"transformer\.(\d+)\.norm([12])\.(\w+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"transformer\.(\d+)\.attn\.to_qkv\.(\w+)", r"encoder.layers.\1.self_attn.qkv_proj.\2"),
    (r"transformer\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (r"transformer\.(\d+)\.mlp\.0\.(\w+)", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"transformer\.(\d+)\.mlp\.2\.(\w+)", r"encoder.layers.\1.mlp.fc2.\2"),
)


class ClipVision(nn.Module):
    """Images to the states before the last block."""

    def __init__(self, transformer: CLIPVisionModel, image_size: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.image_size = image_size  # side of the square it looks at, in pixels

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def bytes(self) -> int:
        return sum(weight.nbytes for weight in self.parameters())

    @torch.no_grad()
    def features(self, image_BCHW: Tensor) -> Tensor:
        """States BSE float32 of images in [-1, 1]; ViT-H has 257 tokens of 1280."""
        pixels = self.prepare(image_BCHW.to(self.device))
        return self.transformer(pixel_values=pixels.to(self.dtype)).last_hidden_state.float()

    def prepare(self, image_BCHW: Tensor) -> Tensor:
        """Squeezed to a square whatever the aspect ratio, as the model was trained, normalised."""
        size = (self.image_size, self.image_size)
        square = F.interpolate(image_BCHW.float(), size, mode="bicubic", align_corners=False)
        mean, std = (
            torch.tensor(values, device=square.device).view(1, 3, 1, 1)
            for values in (PIXEL_MEAN, PIXEL_STD)
        )
        return (square * 0.5 + 0.5 - mean) / std


def build_clip_vision(
    tensors: Mapping[str, Tensor], source: str, dtype: torch.dtype | None = None
) -> ClipVision:
    """From the tensors of a file named `source`; they are used as they are where dtype agrees.

    No dtype means that of the file's patch embedding.
    """
    weights = _transformers_weights(tensors, source, dtype or torch.float16)
    config = _make_config(weights, source)
    weights = {name: weight for name, weight in weights.items() if not _is_behind(name, config)}
    dtype = dtype or weights[PATCHES].dtype
    cast = {name: weight.to(dtype) for name, weight in weights.items()}
    transformer = _build_transformer(config)
    tower = _tower(transformer)
    place(tower, cast, source, WHAT)
    # Not part of any file, so the build on meta left it empty.
    positions, patch = weights[POSITIONS], weights[PATCHES].shape[2]
    position_ids = torch.arange(len(positions), device=positions.device)[None]
    tower.get_submodule("embeddings").register_buffer("position_ids", position_ids, False)
    return ClipVision(transformer, math.isqrt(len(positions) - 1) * patch)


def _transformers_weights(
    tensors: Mapping[str, Tensor], source: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of the tower by their names in transformers, `vision_model.` left out.

    Quantised weights become plain ones in `dtype`.
    """
    is_official = f"{OFFICIAL_PREFIX}patch_embedding.weight" in tensors
    prefix = OFFICIAL_PREFIX if is_official else PREFIX
    if f"{prefix}{PATCHES}" not in tensors and not is_official:
        raise CheckpointError(
            f"{source} is not a {WHAT}: it holds {preview(tensors) or 'nothing'}; give "
            "clip_vision_h or models_clip_open-clip-xlm-roberta-large-vit-huge-14"
        )
    # The text half and the projection, outside the prefix, are of no use here.
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not UNUSED.fullmatch(name.removeprefix(prefix))
    }
    found = dequantised(found, source, WHAT, dtype)
    if not is_official:
        return found
    weights: dict[str, Tensor] = {}
    for name, tensor in found.items():
        weights |= _from_official(name, tensor)
    return weights


def _from_official(official: str, tensor: Tensor) -> dict[str, Tensor]:
    """One official tensor as transformers holds it: queries, keys and values apart."""
    for pattern, name in OFFICIAL_NAMES:
        if match := re.fullmatch(pattern, official):
            name = match.expand(name)
            break
    else:
        return {official: tensor}
    if "qkv_proj" in name:
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {name.replace("qkv_proj", f"{letter}_proj"): part for letter, part in parts}
    if official == "cls_embedding":  # 11E -> E
        return {name: tensor.flatten()}
    if official == "pos_embedding":  # 1SE -> SE
        return {name: tensor.flatten(0, 1)}
    return {name: tensor}


def _make_config(weights: Mapping[str, Tensor], source: str) -> CLIPVisionConfig:
    from transformers import CLIPVisionConfig

    needed = (PATCHES, POSITIONS, "encoder.layers.0.mlp.fc1.weight")
    if missing := [name for name in needed if name not in weights]:
        raise CheckpointError(
            f"{source} is not a whole {WHAT}: it lacks {preview(missing)}; download the file again"
        )
    (dim, _, patch, _), (positions, _), (ffn_dim, _) = (weights[name].shape for name in needed)
    if dim % HEAD_DIM:
        raise CheckpointError(
            f"{source} is a {WHAT} of width {dim}; Wan 2.1 needs ViT-H/14, which has 1280: "
            "give clip_vision_h or models_clip_open-clip-xlm-roberta-large-vit-huge-14"
        )
    layers = 1 + max(int(match[1]) for name in weights if (match := LAYER.match(name)))
    return CLIPVisionConfig(
        hidden_size=dim,
        intermediate_size=ffn_dim,
        num_hidden_layers=layers - 1,
        num_attention_heads=dim // HEAD_DIM,
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        attention_dropout=0.0,
    )


def _is_behind(name: str, config: CLIPVisionConfig) -> bool:
    """Whether a tensor belongs to the last block, whose output Wan does not read."""
    match = LAYER.match(name)
    return match is not None and int(match[1]) >= config.num_hidden_layers


def _build_transformer(config: CLIPVisionConfig) -> CLIPVisionModel:
    from transformers import CLIPVisionModel

    with torch.device("meta"):
        transformer = CLIPVisionModel(config)
    _tower(transformer).post_layernorm = nn.Identity()
    return transformer


def _tower(transformer: CLIPVisionModel) -> nn.Module:
    """Up to transformers 4 the layers sit one level down."""
    return getattr(transformer, "vision_model", transformer)
