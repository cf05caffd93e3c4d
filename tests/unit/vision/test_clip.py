"""What the CLIP image encoder reads, refuses and returns."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from lightx2v_core.assemble import load_clip_vision
from lightx2v_core.errors import CheckpointError
from lightx2v_core.vision.clip import build_clip_vision
from tests.conftest import relative_error
from tests.tolerances import FLOAT32_PARITY
from tests.unit.vision.samples import (
    hugging_face_tensors,
    official_shapes,
    official_tensors,
    sample_image,
    tiny_vision,
)


def test_images_of_any_size_give_one_state_per_patch_and_class_token_in_float32():
    vision = tiny_vision(torch.bfloat16)

    for height, width in ((40, 56), (7, 90), (28, 28)):
        states = vision.features(sample_image(height, width))

        assert states.shape == (2, 17, 160)
        assert states.dtype == torch.float32


def test_hugging_face_names_give_the_states_of_the_official_ones():
    vision = build_clip_vision(hugging_face_tensors(), "clip_vision_h.safetensors")

    states = vision.features(sample_image())

    assert relative_error(states, tiny_vision().features(sample_image())) < FLOAT32_PARITY


@pytest.mark.parametrize("unused", ["transformer.2.mlp.0.weight", "post_norm.weight", "head"])
def test_states_do_not_depend_on_what_lies_behind_them(unused):
    tensors = official_tensors()
    tensors[f"visual.{unused}"] = torch.full_like(tensors[f"visual.{unused}"], torch.nan)

    states = build_clip_vision(tensors, "clip.pth").features(sample_image())

    assert torch.equal(states, tiny_vision().features(sample_image()))


def test_states_depend_on_the_last_block_that_is_read():
    tensors = official_tensors()
    tensors["visual.transformer.1.mlp.2.bias"] += 1.0

    states = build_clip_vision(tensors, "clip.pth").features(sample_image())

    assert relative_error(states, tiny_vision().features(sample_image())) > 0.1


def test_white_image_is_normalised_by_the_published_statistics():
    pixels = tiny_vision().prepare(torch.ones(1, 3, 9, 31))

    expected = [(1 - 0.48145466) / 0.26862954, (1 - 0.4578275) / 0.26130258]
    expected.append((1 - 0.40821073) / 0.27577711)
    assert pixels.shape == (1, 3, 28, 28)
    assert pixels.amin((2, 3)).tolist()[0] == pytest.approx(expected)
    assert pixels.amax((2, 3)).tolist()[0] == pytest.approx(expected)


def test_linears_are_used_without_a_copy():
    tensors = official_tensors()

    vision = build_clip_vision(tensors, "clip.pth")

    held = {weight.untyped_storage().data_ptr() for weight in vision.parameters()}
    assert held <= {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}


def test_half_precision_file_computes_in_float32_when_asked():
    tensors = official_tensors(torch.float16)

    vision = build_clip_vision(tensors, "clip_fp16.pth", torch.float32)

    assert vision.dtype == torch.float32
    assert (
        relative_error(vision.features(sample_image()), tiny_vision().features(sample_image()))
        < 0.002
    )


def test_official_tower_of_392_tensors_is_read_up_to_block_31():
    shapes = official_shapes(dim=1280, layers=32, patch=14, tokens=257, head=1024)
    tensors = {
        name: torch.empty(shape, dtype=torch.float16, device="meta")
        for name, shape in shapes.items()
    }

    vision = build_clip_vision(tensors, "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")

    config = vision.transformer.config
    assert len(tensors) == 392
    assert vision.image_size == 224
    assert (config.num_hidden_layers, config.num_attention_heads) == (31, 16)
    assert config.intermediate_size == 5120
    assert vision.bytes == 2 * sum(
        tensor.numel()
        for name, tensor in tensors.items()
        if not name.startswith(("visual.transformer.31.", "visual.post_norm", "visual.head"))
    )


def clip_l() -> dict[str, torch.Tensor]:
    return {
        "vision_model.embeddings.patch_embedding.weight": torch.zeros(1024, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": torch.zeros(257, 1024),
        "vision_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(8, 1024),
    }


REFUSED = {
    "clip_l": (clip_l, r"is a CLIP image encoder of width 1024; Wan 2\.1 needs ViT-H/14"),
    "umt5": (
        lambda: {"token_embedding.weight": torch.zeros(2, 2)},
        r"is not a CLIP image encoder: it holds token_embedding\.weight; give clip_vision_h",
    ),
    "empty": (dict, "it holds nothing"),
    "int8 without scale": (
        lambda: (
            official_tensors()
            | {"visual.transformer.0.mlp.0.weight": torch.zeros(640, 160, dtype=torch.int8)}
        ),
        r"lacks the scale of transformer\.0\.mlp\.0\.weight",
    ),
    "unknown": (
        lambda: official_tensors() | {"visual.transformer.0.ls1.gamma": torch.zeros(160)},
        r"holds 1 tensors that no CLIP image encoder has \(transformer\.0\.ls1\.gamma\)",
    ),
}


# form: (dtype of the codes, a scale for each row, its leaf); no leaf is a plain cast
FORMS = {
    "lightx2v_fp8": (torch.float8_e4m3fn, True, "weight_scale"),
    "lightx2v_int8": (torch.int8, True, "weight_scale"),
    "comfy_fp8": (torch.float8_e4m3fn, False, "scale_weight"),
    "comfy_int8": (torch.int8, False, "weight_scale"),
    "fp8_cast": (torch.float8_e4m3fn, False, None),
    "fp8_e5m2_cast": (torch.float8_e5m2, False, None),
}


def quantised(tensors: dict[str, torch.Tensor], form: str) -> tuple[dict, dict]:
    """The linears of the tower as codes, and the weights that these stand for.

    LightX2V quantises `attn` and `mlp` outside `textual` (tools/convert/converter.py, wan_clip).
    """
    dtype, by_row, leaf = FORMS[form]
    made, meant = dict(tensors), dict(tensors)
    for name in [n for n in tensors if re.search(r"(qkv|proj|mlp\.\d|fc\d)\.weight$", n)]:
        weight = tensors[name]
        if name.startswith("textual.") or "visual_projection" in name:
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) if by_row else weight.abs().amax()
        scale = scale / 127.0 if leaf else torch.ones(())
        codes = weight / scale
        made[name] = (codes.round() if dtype == torch.int8 else codes).to(dtype)
        meant[name] = made[name].float() * scale
        if leaf:
            made[name.removesuffix("weight") + leaf] = scale
    if form == "comfy_fp8":
        made["scaled_fp8"] = torch.zeros(0).to(dtype)
    return made, meant


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", [official_tensors, hugging_face_tensors])
def test_a_quantised_file_equals_the_weights_it_stands_for(names, form):
    made, meant = quantised(names(), form)
    expected = build_clip_vision(meant, "meant").features(sample_image())

    features = build_clip_vision(made, "quantised", torch.float32).features(sample_image())

    assert sum(made[name].dtype == FORMS[form][0] for name in made) >= 12
    assert torch.equal(features, expected)
    source = build_clip_vision(names(), "source").features(sample_image())
    error = relative_error(features, source)
    assert 1e-4 < error < 0.2, f"{error:.3f}"


@pytest.mark.parametrize("form", ["fp16", "bf16", "lightx2v_fp8", "comfy_fp8", "lightx2v_int8"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_every_precision_is_a_vision_encoder(tmp_path, form, suffix):
    plain = {"fp16": torch.float16, "bf16": torch.bfloat16}
    tensors = official_tensors(plain.get(form, torch.float32))
    if form not in plain:
        tensors, _ = quantised(tensors, form)
    path = tmp_path / f"clip{suffix}"
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)

    features = load_clip_vision(path, torch.float32).features(sample_image())

    error = relative_error(features, tiny_vision().features(sample_image()))
    assert error < 0.06, f"{error:.3f}"


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_file_is_refused_with_a_sentence(case):
    make, sentence = REFUSED[case]

    with pytest.raises(CheckpointError, match=rf"^wrong\.safetensors.* ?{sentence}"):
        build_clip_vision(make(), "wrong.safetensors")


@pytest.mark.parametrize("missing", ["transformer.0.attn.to_qkv.bias", "pos_embedding"])
def test_missing_tensor_is_named(missing):
    tensors = official_tensors()
    del tensors[f"visual.{missing}"]

    with pytest.raises(CheckpointError, match=r"^part\.pth is not a whole CLIP image encoder"):
        build_clip_vision(tensors, "part.pth")
