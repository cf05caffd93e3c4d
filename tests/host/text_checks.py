"""Our CLIP inside a real ComfyUI; registered by inprocess_codecs."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations


from inside import WORK, Heard, check, host_nodes, pack, run, sentence

import torch
from small_codecs import (
    PROMPT,
    TEXT_WEIGHTS,
    close,
    codecs,
    encode,
    our_clip,
)
from small_files import spiece_model, write


@check
def clip_text_encode_gives_the_cores_states_padded_to_512() -> str:
    cond = encode(our_clip())
    assemble = pack("lightx2v_core.assemble")
    path = WORK / "models/text_encoders/small_umt5.safetensors"
    states = assemble.load_text_encoder(path, dtype=torch.float32).encode([PROMPT])
    assert cond[0][0].shape == (1, 512, 64)
    return close(cond[0][0], states, 0.0)


@check
def clip_text_encode_equals_the_hosts_own_wan_encoder() -> str:
    import comfy.text_encoders.wan

    te = comfy.text_encoders.wan.te(dtype_t5=torch.float32)
    config = {
        **{"d_ff": 128, "d_kv": 32, "d_model": 64, "num_heads": 2, "num_layers": 2},
        **{"vocab_size": 48, "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True},
        **{"model_type": "umt5", "decoder_start_token_id": 0, "dropout_rate": 0.0},
        **{"eos_token_id": 1, "pad_token_id": 0, "layer_norm_epsilon": 1e-06},
        **{"relative_attention_num_buckets": 32, "tie_word_embeddings": False},
    }
    native = comfy.text_encoders.t5.T5(config, torch.float32, "cpu", comfy.ops.manual_cast)
    weights = {k: v for k, v in TEXT_WEIGHTS.items() if k != "spiece_model"}
    native.load_state_dict(weights, strict=False)
    clip = our_clip()
    ids = [token[0] for token in clip.tokenize(PROMPT)["umt5xxl"][0]]
    tokens = torch.zeros(1, 512, dtype=torch.int64)
    tokens[0, : len(ids)] = torch.tensor(ids)
    mask = (torch.arange(512) < len(ids)).long()[None]
    embeds = native.get_input_embeddings()(tokens, out_dtype=torch.float32)
    theirs = native(None, attention_mask=mask, embeds=embeds)[0]
    assert te is not None
    return close(encode(clip)[0][0], theirs * mask[..., None])


@check
def a_broken_transformers_package_is_a_sentence_with_its_cause() -> str:
    def broken(*_: object, **__: object) -> None:
        try:
            raise RuntimeError("TorchAudio was built for another PyTorch")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'UMT5EncoderModel'") from error

    names = codecs.load_text_encoder.__globals__
    real, names["build_text_encoder"] = names["build_text_encoder"], broken
    try:
        told = sentence(our_clip)
    finally:
        names["build_text_encoder"] = real
    assert "TorchAudio was built for another PyTorch" in told, told
    assert "install or repair it" in told, told
    return told


@check
def clip_survives_clone_lora_set_last_layer_and_zero_out() -> None:
    clip = our_clip()
    plain = encode(clip)[0][0]
    assert torch.equal(encode(clip.clone())[0][0], plain)
    with Heard() as heard:
        stopped = host_nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
        assert torch.equal(encode(stopped)[0][0], plain)
    assert any("CLIPSetLastLayer" in line for line in heard.lines)
    zeroed = host_nodes.ConditioningZeroOut().zero_out(encode(clip))[0]
    assert not zeroed[0][0].any()


@check
def a_native_lora_on_our_clip_changes_it_and_is_undone() -> None:
    clip = our_clip()
    plain = encode(clip)[0][0]
    stem = "text_encoders.encoder.transformer.encoder.block.0.layer.0.SelfAttention.q"
    up = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    tensors = {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": up.t().contiguous()}
    write(WORK / "models/loras/text.safetensors", tensors)
    with Heard() as heard:
        _, changed = host_nodes.LoraLoader().load_lora(None, clip, "text.safetensors", 1.0, 1.0)
    assert not [line for line in heard.lines if "not loaded" in line.lower()], heard.lines
    assert not torch.equal(encode(changed)[0][0], plain)
    assert torch.equal(encode(clip)[0][0], plain)


@check
def a_prompt_of_more_than_512_tokens_is_cut_with_a_warning() -> None:
    with Heard() as heard:
        cond = encode(our_clip(), "moving right " * 400)
    assert cond[0][0].shape == (1, 512, 64)
    assert any("the first 512 are used" in line for line in heard.lines)


@check
def an_encoder_without_a_tokenizer_is_a_sentence() -> str:
    bare = {k: v for k, v in TEXT_WEIGHTS.items() if k != "spiece_model"}
    folder = WORK / "models/text_encoders/alone"
    folder.mkdir(exist_ok=True)
    write(folder / "bare.safetensors", bare)
    told = sentence(lambda: run("LightX2VLoadTextEncoder", file="alone/bare.safetensors"))
    assert "no UMT5 tokenizer for bare.safetensors" in told, told
    (folder / "spiece.model").write_bytes(spiece_model())
    with_file = run("LightX2VLoadTextEncoder", file="alone/bare.safetensors")[0]
    assert torch.equal(encode(with_file)[0][0], encode(our_clip())[0][0])
    return told
