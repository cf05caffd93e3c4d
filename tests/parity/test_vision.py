"""The CLIP image encoder against a second implementation and against transformers' own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_core.vision.clip import build_clip_vision
from tests.conftest import relative_error
from tests.tolerances import FLOAT32_PARITY
from tests.unit.vision.samples import (
    hugging_face_tensors,
    official_tensors,
    sample_image,
)


def plain_clip(w: dict[str, Tensor], image_BCHW: Tensor, blocks: int) -> Tensor:
    """The published mathematics on official names: `blocks` blocks, no norm behind them."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    pixels = F.interpolate(image_BCHW, size=(28, 28), mode="bicubic", align_corners=False)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    pixels = (pixels.mul(0.5).add(0.5) - mean) / std
    patches = F.conv2d(pixels, w["visual.patch_embedding.weight"], stride=7).flatten(2).mT
    cls = w["visual.cls_embedding"].expand(len(patches), 1, -1)
    x = norm(torch.cat([cls, patches], 1) + w["visual.pos_embedding"], "visual.pre_norm")
    for block in range(blocks):
        b = f"visual.transformer.{block}."
        qkv = linear(norm(x, f"{b}norm1"), f"{b}attn.to_qkv")
        q, k, v = (part.unflatten(-1, (-1, 80)).transpose(1, 2) for part in qkv.chunk(3, -1))
        scores = (q @ k.transpose(2, 3) / 80**0.5).softmax(-1)
        x = x + linear((scores @ v).transpose(1, 2).flatten(2), f"{b}attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{b}norm2"), f"{b}mlp.0")), f"{b}mlp.2")
    return x


@pytest.mark.parametrize("embedding_scale", [1.0, 1e-2], ids=["usual", "eps_matters"])
def test_features_equal_a_second_implementation_in_float32(embedding_scale):
    tensors = official_tensors()
    for name in ("patch_embedding.weight", "cls_embedding", "pos_embedding"):
        tensors[f"visual.{name}"] *= embedding_scale
    expected = plain_clip(tensors, sample_image(), blocks=2)

    states = build_clip_vision(tensors, "clip.pth").features(sample_image())

    assert relative_error(states, expected) < FLOAT32_PARITY


def test_features_equal_the_penultimate_states_of_transformers_own_class():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        hidden_act="gelu",
    )
    theirs = CLIPVisionModel(config).eval()
    vision = build_clip_vision(hugging_face_tensors(), "hf.safetensors")
    weights = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in hugging_face_tensors().items()
        if name.startswith("vision_model.") and not name.endswith("position_ids")
    }
    getattr(theirs, "vision_model", theirs).load_state_dict(weights, strict=True)
    pixels = vision.prepare(sample_image())

    with torch.inference_mode():
        expected = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]

    assert relative_error(vision.features(sample_image()), expected) < FLOAT32_PARITY
