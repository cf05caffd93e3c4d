"""What the text encoder reads, refuses and returns."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightx2v_core.errors import CheckpointError
from lightx2v_core.text.umt5 import build_text_encoder, check_text_encoder
from tests.conftest import relative_error
from tests.tolerances import FLOAT32_PARITY
from tests.unit.text.samples import (
    hugging_face_tensors,
    official_shapes,
    official_tensors,
    spiece_model,
    spiece_tensor,
    tiny_encoder,
    tokenizer,
)

PROMPTS = ["a red fox runs", "", "一只小狗 sleeps on the mat, and nobody wakes it"]


def test_states_are_zero_beyond_each_prompt_and_padded_to_512():
    encoder = tiny_encoder()
    _, mask = encoder.tokenize(PROMPTS)

    states = encoder.encode(PROMPTS)

    assert states.shape == (3, 512, encoder.text_dim)
    assert torch.equal(states.abs().sum(-1) > 0, mask.bool())


def test_running_only_the_used_columns_equals_running_all_512():
    encoder = tiny_encoder()
    ids, mask = encoder.tokenize(PROMPTS)
    whole = encoder.transformer(input_ids=ids, attention_mask=mask).last_hidden_state

    states = encoder.encode_ids(ids, mask)

    assert relative_error(states, whole * mask[..., None]) < FLOAT32_PARITY


def test_only_columns_that_some_prompt_uses_are_computed():
    encoder = tiny_encoder()
    _, mask = encoder.tokenize(PROMPTS)
    seen = []
    encoder.blocks[0].register_forward_hook(lambda block, args, out: seen.append(args[0].shape[1]))

    encoder.encode(PROMPTS)

    assert seen == [int(mask.sum(1).max())]
    assert seen[0] < 100


def test_prompt_in_a_batch_has_the_states_of_the_prompt_alone():
    encoder = tiny_encoder()

    together = encoder.encode(PROMPTS)

    for row, prompt in enumerate(PROMPTS):
        assert relative_error(together[row], encoder.encode([prompt])[0]) < FLOAT32_PARITY


def test_ids_longer_than_512_keep_their_length():
    encoder = tiny_encoder()
    ids, mask = tokenizer()(["a red fox " * 300], max_length=700)

    states = encoder.encode_ids(ids, mask)

    assert states.shape == (1, 700, encoder.text_dim)
    assert bool(states[0, 699].any())


def test_prompt_is_cleaned_before_it_is_tokenised():
    encoder = tiny_encoder()

    assert torch.equal(encoder.encode([" a &amp;  fox\n"]), encoder.encode(["a & fox"]))


@pytest.mark.parametrize("prefix", ["", "encoder.", "text_encoders.umt5xxl.transformer."])
def test_hugging_face_names_give_the_states_of_the_official_ones(prefix):
    encoder = build_text_encoder(hugging_face_tensors(prefix), tokenizer(), "hf.safetensors")

    assert torch.equal(encoder.encode(PROMPTS), tiny_encoder().encode(PROMPTS))


@pytest.mark.parametrize("held", ["shared", "encoder.embed_tokens", "both"])
def test_embedding_is_one_table_under_either_name(held):
    tensors = hugging_face_tensors()
    if held != "shared":
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    if held == "encoder.embed_tokens":
        del tensors["shared.weight"]

    encoder = build_text_encoder(tensors, tokenizer(), "hf.safetensors")

    assert encoder.transformer.encoder.embed_tokens is encoder.transformer.shared
    assert encoder.bytes == sum(t.nbytes for t in official_tensors().values())
    assert torch.equal(encoder.encode(PROMPTS), tiny_encoder().encode(PROMPTS))


def test_models_beside_a_prefixed_encoder_are_left_alone():
    tensors = hugging_face_tensors("text_encoders.umt5xxl.transformer.")
    tensors["model.diffusion_model.blocks.0.cross_attn.k.weight"] = torch.zeros(2, 2)
    tensors["text_encoders.spiece_model"] = spiece_tensor()

    encoder = build_text_encoder(tensors, None, "all.safetensors")

    assert encoder.tokenizer.origin == "text_encoders.spiece_model in all.safetensors"


def test_memory_mapped_weights_are_not_copied(tmp_path):
    save_file(official_tensors(), tmp_path / "umt5.safetensors")
    tensors = load_file(tmp_path / "umt5.safetensors")

    encoder = build_text_encoder(tensors, tokenizer(), "umt5.safetensors")

    held = {weight.data_ptr() for weight in encoder.parameters()}
    assert held == {tensor.data_ptr() for tensor in tensors.values()}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)], ids=["bf16", "fp16"]
)
def test_half_precision_file_computes_in_its_dtype_near_float32(dtype, tolerance):
    encoder = tiny_encoder(dtype)

    states = encoder.encode(PROMPTS)

    assert encoder.dtype == states.dtype == dtype
    assert relative_error(states, tiny_encoder().encode(PROMPTS)) < tolerance


def test_half_precision_file_computes_in_float32_when_asked():
    tensors = official_tensors(torch.bfloat16)
    exact = {name: tensor.float() for name, tensor in tensors.items()}

    encoder = build_text_encoder(tensors, tokenizer(), "bf16.pth", torch.float32)

    expected = build_text_encoder(exact, tokenizer(), "fp32.pth").encode(PROMPTS)
    assert encoder.dtype == torch.float32
    assert torch.equal(encoder.encode(PROMPTS), expected)


def test_states_beyond_the_range_of_fp16_are_right_in_fp16():
    tensors = official_tensors(torch.float16)
    for name in tensors:
        if name.endswith("ffn.fc2.weight"):
            tensors[name] *= 2**17  # weights of 10^4, residual states above 65504
    exact = build_text_encoder(tensors, tokenizer(), "fp16.pth", torch.float32).encode(PROMPTS)

    states = build_text_encoder(tensors, tokenizer(), "fp16.pth").encode(PROMPTS)

    assert states.dtype == torch.float16
    assert relative_error(states, exact) < 0.004


def test_training_mode_of_a_parent_changes_nothing():
    encoder = tiny_encoder()
    expected = encoder.encode(PROMPTS)

    encoder.train()

    assert torch.equal(encoder.encode(PROMPTS), expected)


def test_weights_ask_for_no_gradient():
    assert not any(weight.requires_grad for weight in tiny_encoder().parameters())


def test_embedded_tokenizer_equals_the_file_it_came_from():
    tensors = official_tensors() | {"spiece_model": spiece_tensor()}

    encoder = build_text_encoder(tensors, None, "umt5.safetensors")

    assert bytes(tensors["spiece_model"].numpy()) == spiece_model()
    assert torch.equal(encoder.encode(PROMPTS), tiny_encoder().encode(PROMPTS))


def test_encoder_without_a_tokenizer_is_refused():
    with pytest.raises(CheckpointError, match="embeds no tokenizer"):
        build_text_encoder(official_tensors(), None, "umt5.pth")


def test_tokenizer_larger_than_the_vocabulary_is_refused():
    with pytest.raises(CheckpointError, match=r"knows \d+ tokens, small\.pth only 20"):
        build_text_encoder(official_tensors(vocab=20), tokenizer(), "small.pth")


def test_official_umt5_xxl_has_242_tensors_and_all_are_placed():
    shapes = official_shapes(dim=4096, heads=64, ffn_dim=10240, layers=24, vocab=256384)
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in shapes.items()
    }

    encoder = build_text_encoder(tensors, tokenizer(), "models_t5_umt5-xxl-enc-bf16.pth")

    assert len(tensors) == 242
    assert encoder.bytes == sum(tensor.nbytes for tensor in tensors.values()) == 11_361_820_672
    assert encoder.text_dim == 4096
    assert len(encoder.blocks) == 24
    assert encoder.transformer.config.d_kv == 64


def t5_xxl() -> dict[str, torch.Tensor]:
    tensors = hugging_face_tensors()
    del tensors["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]
    return tensors


REFUSED = {
    "t5xxl": (t5_xxl, r"is a T5 v1\.1 text encoder such as T5-XXL, .* Wan needs umt5_xxl$"),
    "clip_l": (
        lambda: {"text_model.embeddings.token_embedding.weight": torch.zeros(4, 4)},
        "is a CLIP text encoder, not a UMT5 text encoder; Wan needs umt5_xxl",
    ),
    "dit": (
        lambda: {"blocks.0.cross_attn.k.weight": torch.zeros(4, 4)},
        "is a Wan transformer, not a UMT5 text encoder; load it as the model",
    ),
    "xlm_roberta": (
        lambda: {
            "textual.blocks.0.attn.q.weight": torch.zeros(4, 4),
            "visual.patch_embedding.weight": torch.zeros(4, 3, 2, 2),
        },
        "is the CLIP image encoder, not a UMT5 text encoder",
    ),
    "vae": (lambda: {"decoder.conv1.weight": torch.zeros(4)}, "is a VAE, not a UMT5"),
    "lora": (
        lambda: {"x.lora_up.weight": torch.zeros(4)},
        r"is not a UMT5 text encoder: it holds x\.lora_up\.weight; give umt5_xxl",
    ),
    "empty": (dict, "it holds nothing"),
    "four bits": (
        lambda: (
            official_tensors() | {"blocks.0.attn.q.weight": torch.zeros(64, 16, dtype=torch.uint8)}
        ),
        "is a 4-bit UMT5 text encoder .* which this version does not read",
    ),
    "int8 without scale": (
        lambda: (
            official_tensors() | {"blocks.0.attn.q.weight": torch.zeros(64, 32, dtype=torch.int8)}
        ),
        r"lacks the scale of blocks\.0\.attn\.q\.weight",
    ),
    "unknown": (
        lambda: official_tensors() | {"decoder.x": torch.zeros(2), "lm_head.y": torch.zeros(2)},
        r"holds 2 tensors that no UMT5 text encoder has \(decoder\.x, lm_head\.y\)",
    ),
}


def quantised(tensors: dict[str, torch.Tensor], form: str) -> tuple[dict, dict]:
    """fp8 in LightX2V's form (rows), ComfyUI's (tensor, marker) or int8 by rows; what it means."""
    made, meant = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if weight.ndim != 2 or any(word in name for word in ("embedding", "shared", "bias")):
            continue
        axis = None if form == "comfy" else 1
        scale = weight.abs().amax(dim=axis, keepdim=axis is not None) / 127.0
        codes = (weight / scale).round().to(torch.int8)
        made[name] = codes if form == "int8" else codes.to(torch.float8_e4m3fn)
        meant[name] = made[name].float() * scale
        leaf = "scale_weight" if form == "comfy" else "weight_scale"
        made[name.removesuffix("weight") + leaf] = scale
    if form == "comfy":
        made["scaled_fp8"] = torch.zeros(0).to(torch.float8_e4m3fn)
    return made, meant


@pytest.mark.parametrize("form", ["lightx2v", "comfy", "int8"])
@pytest.mark.parametrize("names", [official_tensors, hugging_face_tensors])
def test_a_quantised_file_equals_the_weights_it_stands_for(names, form):
    made, meant = quantised(names(), form)
    expected = build_text_encoder(meant, tokenizer(), "meant").encode(["a red fox"])

    encoder = build_text_encoder(made, tokenizer(), "quantised", torch.float32)

    assert torch.equal(encoder.encode(["a red fox"]), expected)
    source = build_text_encoder(names(), tokenizer(), "source").encode(["a red fox"])
    assert not torch.equal(expected, source)


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_file_is_refused_with_a_sentence(case):
    make, sentence = REFUSED[case]

    with pytest.raises(CheckpointError, match=rf"^wrong\.safetensors.* ?{sentence}"):
        build_text_encoder(make(), tokenizer(), "wrong.safetensors")


def test_wrong_file_is_refused_before_its_tokenizer_is_missed():
    with pytest.raises(CheckpointError, match="is a Wan transformer"):
        check_text_encoder({"blocks.0.cross_attn.k.weight": torch.zeros(2)}, "dit.safetensors")


@pytest.mark.parametrize(
    "missing", ["blocks.1.attn.k.weight", "token_embedding.weight", "blocks.0.ffn.gate.0.weight"]
)
def test_missing_tensor_is_named(missing):
    tensors = official_tensors()
    del tensors[missing]

    with pytest.raises(CheckpointError, match=r"^part\.pth is not a whole .*download"):
        build_text_encoder(tensors, tokenizer(), "part.pth")


def test_tensor_of_another_shape_is_named_with_both_shapes():
    tensors = official_tensors()
    tensors["blocks.1.attn.k.weight"] = torch.zeros(8, 32)

    with pytest.raises(CheckpointError, match=r"has shape \(8, 32\), .* need \(64, 32\)"):
        build_text_encoder(tensors, tokenizer(), "odd.pth")
