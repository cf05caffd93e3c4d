"""Token ids, padding and the search for tokenizer files."""

from __future__ import annotations

import json

import pytest
import torch

from lightx2v_core.errors import CapabilityError, CheckpointError
from lightx2v_core.text import tokenizer as module
from lightx2v_core.text.tokenizer import PromptTokenizer, find_tokenizer, read_tokenizer
from tests.unit.text.samples import (
    foreign_spiece_model,
    spiece_model,
    spiece_tensor,
    tokenizer,
)


def test_prompt_ends_with_eos_and_is_padded_with_zeros_to_512():
    ids, mask = tokenizer()(["a red fox"])

    length = int(mask.sum())
    assert ids.shape == mask.shape == (1, 512)
    assert ids.dtype == mask.dtype == torch.int64
    assert ids[0, length - 1] == 1
    assert 1 not in ids[0, : length - 1]
    assert not ids[0, length:].any()
    assert mask[0, :length].all()


def test_empty_prompt_is_eos_alone():
    ids, mask = tokenizer()([""])

    assert ids[0, :2].tolist() == [1, 0]
    assert mask.sum() == 1


def test_long_prompt_is_cut_and_keeps_its_eos():
    whole, _ = tokenizer()(["a red fox runs over the hill"])

    ids, mask = tokenizer()(["a red fox runs over the hill"], max_length=5)

    assert ids.tolist() == [[*whole[0, :4].tolist(), 1]]
    assert mask.all()


def test_rows_of_a_batch_equal_prompts_alone():
    prompts = ["红色的狐狸", "", "a small dog 😀"]

    ids, mask = tokenizer()(prompts)

    for row, prompt in enumerate(prompts):
        alone_ids, alone_mask = tokenizer()([prompt])
        assert torch.equal(ids[row], alone_ids[0])
        assert torch.equal(mask[row], alone_mask[0])


def test_bytes_that_are_no_sentencepiece_model_are_refused():
    with pytest.raises(CheckpointError, match=r"^x\.model is not a SentencePiece model \(4 bytes"):
        PromptTokenizer.from_sentencepiece(b"junk", "x.model")


def test_tokenizer_of_another_family_is_refused():
    with pytest.raises(CheckpointError, match="has pad id 3 and end id 2, UMT5 has 0 and 1"):
        PromptTokenizer.from_sentencepiece(foreign_spiece_model(), "x.model")


def test_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)

    with pytest.raises(CapabilityError, match="run: pip install sentencepiece"):
        PromptTokenizer.from_sentencepiece(spiece_model(), "x.model")


@pytest.mark.parametrize(
    "place",
    [
        "model/google/umt5-xxl/spiece.model",
        "model/spiece.model",
        "model/tokenizer/tokenizer.json",
        "tokenizer/tokenizer.model",
        "google/umt5-xxl/sentencepiece.bpe.model",
    ],
)
def test_tokenizer_is_found_near_the_encoder(tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).touch()

    assert find_tokenizer(tmp_path / "model" / "umt5.pth").resolve() == tmp_path / place


def test_official_folder_wins_over_a_stray_file(tmp_path):
    (tmp_path / "google/umt5-xxl").mkdir(parents=True)
    for place in ("tokenizer.json", "google/umt5-xxl/spiece.model"):
        (tmp_path / place).touch()

    assert find_tokenizer(tmp_path / "umt5.pth") == tmp_path / "google/umt5-xxl/spiece.model"


def test_given_folder_is_the_only_one_searched(tmp_path):
    (tmp_path / "spiece.model").touch()
    (tmp_path / "given").mkdir()

    with pytest.raises(CheckpointError, match="given"):
        find_tokenizer(tmp_path / "umt5.pth", tmp_path / "given")
    assert find_tokenizer(tmp_path / "a" / "umt5.pth", tmp_path) == tmp_path / "spiece.model"


def test_missing_tokenizer_says_what_was_looked_for_where_and_what_to_do(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        find_tokenizer(tmp_path / "umt5.pth")

    message = str(caught.value)
    assert message.startswith("no UMT5 tokenizer for umt5.pth")
    for part in (str(tmp_path / "google/umt5-xxl"), "spiece.model", "tokenizer.json", "; put "):
        assert part in message


def test_missing_given_path_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.model"):
        find_tokenizer(tmp_path / "umt5.pth", tmp_path / "nowhere.model")


def test_embedded_tokenizer_wins_over_a_file_beside_it(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"junk")

    read = read_tokenizer(tmp_path / "umt5.safetensors", {"spiece_model": spiece_tensor()})

    assert read.origin == "spiece_model in umt5.safetensors"
    assert torch.equal(read(["a red fox"])[0], tokenizer()(["a red fox"])[0])


def test_given_tokenizer_wins_over_the_embedded_one(tmp_path):
    given = tmp_path / "my.model"
    given.write_bytes(spiece_model())
    tensors = {"spiece_model": torch.zeros(4, dtype=torch.uint8)}

    read = read_tokenizer(tmp_path / "umt5.safetensors", tensors, given)

    assert read.origin == str(given)


def test_tokenizer_json_gives_the_ids_of_its_vocabulary(tmp_path):
    pieces = ["<pad>", "</s>", "<unk>", "▁a", "▁fox", "▁red"]
    content = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [[piece, -1.0] for piece in pieces]},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")

    read = read_tokenizer(tmp_path / "umt5.safetensors", {})

    assert read(["a red fox"], max_length=6)[0].tolist() == [[3, 5, 4, 1, 0, 0]]
    assert read.vocab_size == 6


def test_json_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("[]")

    with pytest.raises(CheckpointError, match="is not a tokenizer of the tokenizers package"):
        PromptTokenizer.from_path(tmp_path / "tokenizer.json")
