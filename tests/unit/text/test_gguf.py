"""UMT5 encoders in GGUF: llama.cpp's names, and its copy of the vocabulary."""

from __future__ import annotations

import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lightx2v_core.assemble import load_text_encoder
from lightx2v_core.checkpoint.detect import detect
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.errors import CheckpointError
from lightx2v_core.text.gguf_vocabulary import spiece_model as rebuilt
from lightx2v_core.text.umt5 import build_text_encoder
from tests.gguf_files import write_encoder
from tests.unit.text.samples import (
    SENTENCES,
    hugging_face_tensors,
    spiece_model,
    tokenizer,
)

PROMPTS = [*SENTENCES, "  lead,  and   mid ", "Ünïcode ﬁ \uff21\uff22 ½ Ⅳ", "unseen: ξψ Ж", "", " "]


def test_an_encoder_in_f32_equals_the_same_weights_in_safetensors(tmp_path):
    write_encoder(tmp_path / "umt5.gguf")
    plain = build_text_encoder(hugging_face_tensors(ffn_dim=64), tokenizer(), "plain")

    loaded = load_text_encoder(tmp_path / "umt5.gguf", dtype=torch.float32)

    assert torch.equal(loaded.encode(PROMPTS), plain.encode(PROMPTS))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_quantised_encoder_becomes_plain_weights_rounded_once(tmp_path, kind):
    write_encoder(tmp_path / "umt5.gguf", kind)
    type_, expected = gguf.GGMLQuantizationType[kind], hugging_face_tensors(ffn_dim=64)
    for name, tensor in expected.items():
        if tensor.ndim == 2 and "bias" not in name:
            numbers = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), type_), type_)
            expected[name] = torch.from_numpy(numbers)

    loaded = load_text_encoder(tmp_path / "umt5.gguf")

    plain = build_text_encoder(expected, tokenizer(), "plain", torch.bfloat16)
    weights = plain.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in loaded.state_dict().items())
    assert torch.equal(loaded.encode(PROMPTS), plain.encode(PROMPTS))


def test_the_vocabulary_spells_as_the_model_it_was_copied_from(tmp_path):
    write_encoder(tmp_path / "umt5.gguf")
    original = tokenizer()

    pieces = load_text_encoder(tmp_path / "umt5.gguf").tokenizer

    for prompt in PROMPTS:
        assert pieces.spell(prompt) == original.spell(prompt), prompt


def test_without_a_vocabulary_a_tokenizer_is_asked_for_and_one_beside_it_taken(tmp_path):
    write_encoder(tmp_path / "umt5.gguf", vocabulary=False)

    with pytest.raises(CheckpointError, match=r"no UMT5 tokenizer for umt5\.gguf: it embeds none"):
        load_text_encoder(tmp_path / "umt5.gguf")
    (tmp_path / "spiece.model").write_bytes(spiece_model())
    assert load_text_encoder(tmp_path / "umt5.gguf").encode(["a fox"]).any()


def fields(**changed: object) -> dict[str, object]:
    known = {
        "model": "t5",
        "tokens": ["<pad>", "</s>", "<unk>", "a"],
        "scores": [0.0, 0.0, 0.0, -1.0],
        "token_type": [3, 3, 2, 1],
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (known | changed).items()}


def test_a_vocabulary_of_another_kind_is_none_of_ours():
    for change in ({"model": "llama"}, {"model": None}, {"scores": None}):
        found = fields(**change)
        assert rebuilt(found.get, found.get, "umt5.gguf") is None


def test_a_vocabulary_whose_parts_differ_in_length_is_refused():
    found = fields(scores=[0.0])

    with pytest.raises(CheckpointError, match="4 tokens, 1 scores and 4 types"):
        rebuilt(found.get, found.get, "umt5.gguf")


def test_it_is_detected_as_a_text_encoder(tmp_path):
    write_encoder(tmp_path / "umt5.gguf", "Q8_0")

    info = detect(open_checkpoint(tmp_path / "umt5.gguf"))

    assert (info.kind, info.scheme) == ("text encoder", "gguf-Q8_0")


def test_a_vocabulary_as_long_as_umt5s_is_read_in_seconds(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "t5encoder")
    writer.add_tokenizer_model("t5")
    count = 256384
    writer.add_token_list([f"token {n}" for n in range(count)])
    writer.add_token_scores([-float(n) for n in range(count)])
    writer.add_token_types([1] * count)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    started = time.process_time()

    file = open_checkpoint(tmp_path / "v.gguf").gguf

    opened = time.process_time() - started
    assert file.array("tokenizer.ggml.tokens")[-1] == "token 256383"
    assert opened < 2.0, f"{opened:.1f} s of processor time"
