"""UMT5 and its tokenizer against a second implementation each and against transformers' own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_core.text.tokenizer import PromptTokenizer
from lightx2v_core.text.umt5 import build_text_encoder
from tests.conftest import relative_error
from tests.tolerances import FLOAT32_PARITY
from tests.unit.text.samples import (
    hugging_face_tensors,
    official_tensors,
    spiece_model,
    tokenizer,
)

PROMPTS = ["a red fox runs over the hill " * 10, "", "一只小狗在窗边睡觉。"]
HARD_PROMPTS = [
    "a red fox runs over the hill",
    "红色的狐狸在雪地里奔跑\uff0c一只小狗",
    "emoji 😀🔥 and 👩‍👩‍👧 family",
    "  lead,  and   mid ",
    "tab\tnew\nline\u3000wide\u00a0hard\u200bzero",
    "Ünïcode ﬁ \uff21\uff22 ½ Ⅳ",
    "unseen letters: ξψ Ж",
    "",
    " ",
]


def plain_umt5(w: dict[str, Tensor], ids_BS: Tensor, mask_BS: Tensor, heads: int) -> Tensor:
    """The published mathematics on official names: all positions, masked keys, trimmed at the end.

    RMS norm of eps 1e-6, no 1/sqrt(d), a bias table in every block, GELU in its tanh form.
    """

    def rms(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    hidden = ids_BS.new_zeros(mask_BS.shape, dtype=torch.float32)
    hidden = hidden.masked_fill(mask_BS == 0, torch.finfo(torch.float32).min)
    bucket_SS = buckets(ids_BS.shape[1])
    x = w["token_embedding.weight"][ids_BS]
    for block in range(sum(name.endswith("norm1.weight") for name in w)):
        b = f"blocks.{block}."
        h = rms(x, f"{b}norm1")
        q, k, v = (
            (h @ w[f"{b}attn.{name}.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name in "qkv"
        )
        bias = w[f"{b}pos_embedding.embedding.weight"][bucket_SS].permute(2, 0, 1)
        scores = q @ k.transpose(2, 3) + bias + hidden[:, None, None, :]
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ w[f"{b}attn.o.weight"].T
        h = rms(x, f"{b}norm2")
        gate = F.gelu(h @ w[f"{b}ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (h @ w[f"{b}ffn.fc1.weight"].T)) @ w[f"{b}ffn.fc2.weight"].T
    return rms(x, "norm") * mask_BS[..., None]


def buckets(length: int) -> Tensor:
    """Bucket of key minus query: half per sign, exact below 8, then logarithmic up to 128."""
    table = torch.empty(length, length, dtype=torch.int64)
    for distance in range(1 - length, length):
        d = abs(distance)
        bucket = d if d < 8 else min(15, 8 + int(math.log(d / 8) / math.log(16) * 8))
        bucket += 16 if distance > 0 else 0
        table.diagonal(distance).fill_(bucket)
    return table


@pytest.mark.parametrize("embedding_scale", [1.0, 1e-3], ids=["usual", "eps_matters"])
def test_umt5_equals_a_second_implementation_in_float32(embedding_scale):
    tensors = official_tensors(layers=3)
    tensors["token_embedding.weight"] *= embedding_scale
    encoder = build_text_encoder(tensors, tokenizer(), "official.pth")
    ids, mask = encoder.tokenize(PROMPTS)
    assert 128 < mask.sum(1).max() < 512  # beyond the last bucket, and padded

    states = encoder.encode(PROMPTS)

    assert relative_error(states, plain_umt5(tensors, ids, mask, heads=4)) < FLOAT32_PARITY


def test_umt5_equals_transformers_own_class_in_float32():
    from transformers import UMT5Config, UMT5EncoderModel

    tensors = hugging_face_tensors(layers=3)
    config = UMT5Config(
        vocab_size=300, d_model=32, d_kv=16, d_ff=48, num_layers=3, num_heads=4, dropout_rate=0.0
    )
    theirs = UMT5EncoderModel(config).eval()
    tied = {"encoder.embed_tokens.weight": tensors["shared.weight"]}
    theirs.load_state_dict(tensors | tied, strict=True)
    encoder = build_text_encoder(tensors, tokenizer(), "hf.safetensors")
    ids, mask = encoder.tokenize(PROMPTS)

    with torch.inference_mode():
        expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state

    states = encoder.encode(PROMPTS)
    assert relative_error(states, expected * mask[..., None]) < FLOAT32_PARITY


def protobuf_field(message: bytes, wanted: int) -> bytes:
    """The content of one length-delimited field, b"" where it is absent."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value, at

    at = 0
    while at < len(message):
        key, at = varint(at)
        if key & 7 == 2:
            length, at = varint(at)
            if key >> 3 == wanted:
                return message[at : at + length]
            at += length
        elif key & 7 == 0:
            _, at = varint(at)
        else:
            at += 4 if key & 7 == 5 else 8
    return b""


def transformers_tokenizer(folder: Path) -> Callable[..., Any]:
    """transformers' T5 tokenizer over our SentencePiece model, in its version 4 or 5 form."""
    import transformers
    from sentencepiece import SentencePieceProcessor

    if int(transformers.__version__.split(".")[0]) < 5:
        (folder / "spiece.model").write_bytes(spiece_model())
        return transformers.T5Tokenizer(str(folder / "spiece.model"), extra_ids=0, legacy=True)
    pieces = SentencePieceProcessor(model_proto=spiece_model())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.vocab_size())]
    # ModelProto.normalizer_spec.precompiled_charsmap
    charsmap = protobuf_field(protobuf_field(spiece_model(), 3), 2)
    return transformers.T5Tokenizer(vocab, extra_ids=0, _spm_precompiled_charsmap=charsmap)


@pytest.mark.parametrize("max_length", [512, 6])
def test_tokenizer_equals_transformers_on_the_same_sentencepiece_model(tmp_path, max_length):
    theirs = transformers_tokenizer(tmp_path)

    ids, mask = tokenizer()(HARD_PROMPTS, max_length)

    expected = theirs(
        HARD_PROMPTS,
        max_length=max_length,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    assert torch.equal(ids, expected.input_ids)
    assert torch.equal(mask, expected.attention_mask)


def test_tokenizer_json_equals_the_sentencepiece_model_it_was_made_from(tmp_path):
    theirs = transformers_tokenizer(tmp_path)
    if not hasattr(theirs, "backend_tokenizer"):
        pytest.skip("transformers 4 writes no tokenizer.json without protobuf")
    (tmp_path / "tokenizer.json").write_text(theirs.backend_tokenizer.to_str(), "utf-8")
    assert json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]

    from_json = PromptTokenizer.from_path(tmp_path / "tokenizer.json")

    expected_ids, expected_mask = tokenizer()(HARD_PROMPTS)
    ids, mask = from_json(HARD_PROMPTS)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(mask, expected_mask)
