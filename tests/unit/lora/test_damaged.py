"""LoRA files that are broken, foreign or dangerous end in one sentence."""

from __future__ import annotations

import pytest
import torch

from lightx2v_core.errors import CheckpointError
from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.branches import weight_shapes
from lightx2v_core.lora.match import match_lora
from lightx2v_core.lora.names import OTHER_ADAPTERS, OTHER_FAMILIES
from lightx2v_core.lora.read import read_lora
from lightx2v_core.wan.model import WanModel
from tests.conftest import VARIANTS, tiny_model
from tests.unit.lora.samples import pair, run, written

Q = "diffusion_model.blocks.0.self_attn.q"
UP, DOWN = f"{Q}.lora_up.weight", f"{Q}.lora_down.weight"
ONE = torch.ones


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({UP: ONE(256, 4)}, r"holds \S+q\.lora_up\.weight without its down .* damaged"),
        ({DOWN: ONE(4, 256)}, r"holds \S+q\.lora_down\.weight without its up .* damaged"),
        ({UP: ONE(256, 4), DOWN: ONE(8, 256)}, r"do not fit together \(up 256x4, down 8x256\)"),
        ({UP: ONE(256), DOWN: ONE(4, 256)}, r"do not fit together \(up 256, down 4x256\)"),
        ({UP: ONE(256, 0), DOWN: ONE(0, 256)}, r"do not fit together \(up 256x0, down 0x256\)"),
        ({UP: ONE(256, 4, 3, 3), DOWN: ONE(4, 256, 1, 1)}, "do not fit together"),
        ({UP: torch.full((256, 4), torch.nan), DOWN: ONE(4, 256)}, "is not finite"),
        ({UP: ONE(256, 4), DOWN: torch.full((4, 256), torch.inf)}, "is not finite"),
        ({f"{Q}.diff_b": torch.tensor([-torch.inf, torch.inf])}, "is not finite"),
        ({UP: ONE(256, 4), DOWN: ONE(4, 256), f"{Q}.alpha": ONE(2)}, "holds 2 numbers, not one"),
        ({UP: ONE(256, 4).to(torch.int8), DOWN: ONE(4, 256)}, "is stored as int8"),
        ({"blocks.0.ffn.0.weight": ONE(2, 2)}, "is not a LoRA this version knows: it holds blocks"),
        ({}, "is not a LoRA this version knows: it holds no tensors"),
        (
            pair("blocks.0.self_attn.q")
            | {"transformer.blocks.0.self_attn.q.lora_B.weight": ONE(256, 4)},
            r"names blocks\.0\.self_attn\.q twice .* save them as two files",
        ),
        (
            {f"{Q}.lora_A.{name}.weight": ONE(4, 256) for name in ("one", "two")}
            | {f"{Q}.lora_B.{name}.weight": ONE(256, 4) for name in ("one", "two")},
            "holds two adapters",
        ),
    ],
)
def test_a_broken_file_is_a_sentence(tmp_path, tensors, words):
    with pytest.raises(CheckpointError, match=words):
        read_lora(written(tmp_path, tensors))


ADAPTERS = {
    "LoKr": "x.lokr_w1",
    "LoHa": "x.hada_w1_a",
    "DoRA": "x.dora_scale",
    "OFT": "x.oft_blocks",
    "BOFT": "x.boft_R",
    "LoCon with a middle matrix": "x.lora_mid.weight",
    "GLoRA": "x.a1.weight",
    "IA3": "x.on_input",
    "VeRA": "x.vera_lambda_b",
    "weight replacement": "x.set_weight",
}


def test_there_is_an_example_of_every_other_adapter():
    assert ADAPTERS.keys() == {kind for _, kind in OTHER_ADAPTERS}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_another_kind_of_adapter_is_refused_by_name(tmp_path, kind):
    file = written(tmp_path, pair("blocks.0.self_attn.q") | {ADAPTERS[kind]: ONE(2, 2)})

    with pytest.raises(CheckpointError, match=rf" is a {kind} adapter, which this version does"):
        read_lora(file)


def test_lycoris_boft_is_told_from_oft_by_its_shape(tmp_path):
    with pytest.raises(CheckpointError, match=" is a BOFT adapter"):
        read_lora(written(tmp_path, {"x.oft_blocks": ONE(2, 2, 2, 2)}))


def test_a_dora_that_only_its_config_names_is_refused(tmp_path):
    file = written(tmp_path, pair("blocks.0.self_attn.q"), "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"use_dora": true}')

    with pytest.raises(CheckpointError, match="is a DoRA adapter"):
        read_lora(file)


@pytest.mark.parametrize("config", ["{", "[1]", '{"lora_alpha": "much"}', '{"alpha_pattern": 3}'])
def test_a_config_that_decides_the_strength_and_cannot_be_read_is_a_sentence(tmp_path, config):
    file = written(tmp_path, pair("blocks.0.ffn.0"), lora_adapter_metadata=config)

    with pytest.raises(CheckpointError, match="it decides how strong the LoRA is"):
        read_lora(file)


def test_half_a_file_and_no_file_are_sentences(tmp_path):
    whole = written(tmp_path, pair("blocks.0.self_attn.q")).read_bytes()
    half, empty = tmp_path / "half.safetensors", tmp_path / "empty.safetensors"
    half.write_bytes(whole[: len(whole) // 2])
    empty.write_bytes(b"")

    with pytest.raises(CheckpointError, match="is incomplete"):
        read_lora(half)
    with pytest.raises(CheckpointError, match=r"empty\.safetensors .*0 bytes"):
        read_lora(empty)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_lora(tmp_path / "nowhere.safetensors")


class Hostile:
    def __reduce__(self):
        return (eval, ("1 / 0",))


def test_a_pickle_with_code_is_refused_and_one_with_tensors_is_read(tmp_path):
    bad, good = tmp_path / "bad.pt", tmp_path / "good.pt"
    torch.save({"x": Hostile()}, bad)
    torch.save(pair("blocks.0.self_attn.q"), good)

    with pytest.raises(CheckpointError, match="would run code"):
        read_lora(bad)
    assert list(read_lora(good).pairs) == ["blocks.0.self_attn.q"]


def test_two_spellings_of_one_layer_are_refused_and_nothing_is_applied(tmp_path):
    twice = pair("blocks.0.self_attn.q")
    for name, tensor in list(twice.items()):
        kohya = name.replace("diffusion_model.blocks.0.self_attn.q", "x")
        twice[kohya.replace("x", "lora_unet_blocks_0_self_attn_q")] = tensor
    model = tiny_model()

    with pytest.raises(CheckpointError, match=r"names blocks\.0\.self_attn\.q\.weight twice"):
        apply_loras(model, [(read_lora(written(tmp_path, twice)), 1.0)])

    assert torch.equal(run(model), run(tiny_model()))


FAMILIES = {
    "FLUX": "diffusion_model.double_blocks.0.img_attn.qkv",
    "HunyuanVideo": "diffusion_model.double_blocks.0.img_attn_qkv",
    "FLUX or HunyuanVideo": "lora_unet_double_blocks_0_img_attn_qkv",
    "Qwen-Image": "transformer.transformer_blocks.0.img_mlp.net.2",
    "LTX-Video or CogVideoX": "transformer.transformer_blocks.0.attn1.to_q",
    "SD3 or FLUX": "transformer.transformer_blocks.0.attn.to_q",
    "Stable Diffusion or SDXL": "lora_unet_input_blocks_4_1_proj_in",
    "Z-Image or Lumina": "diffusion_model.layers.0.attention.to_q",
    "a text encoder": "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "Wan VACE": "diffusion_model.vace_blocks.0.self_attn.q",
    "Wan Animate": "diffusion_model.face_adapter.fuser_blocks.0.linear1_q",
    "Wan S2V": "diffusion_model.casual_audio_encoder.encoder.conv",
    "HuMo": "diffusion_model.audio_proj.proj1",
    "Wan Fun": "diffusion_model.control_adapter.conv",
    "the second expert in diffusers' form": "transformer_2.blocks.0.attn1.to_q",
}


def test_there_is_an_example_of_every_other_family():
    assert FAMILIES.keys() == {family for _, family in OTHER_FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_of_another_family_is_named(tmp_path, family):
    stem = FAMILIES[family]
    tensors = {f"{stem}.lora_A.weight": ONE(4, 64), f"{stem}.lora_B.weight": ONE(64, 4)}
    lora = read_lora(written(tmp_path, tensors))

    with torch.device("meta"):
        shapes = weight_shapes(WanModel(VARIANTS["t2v"]))

    with pytest.raises(CheckpointError, match=f"no layer of .* it was made for {family};"):
        match_lora(lora, shapes)
