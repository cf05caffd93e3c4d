"""Damaged GGUF headers, by the hundred: always a sentence or a whole model, never anything else.

LIGHTX2V_FUZZ=10000 runs more of them.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightx2v_core.assemble import load_text_encoder, load_transformer
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.errors import LightX2VError
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.model import WanModel
from tests.conftest import fill
from tests.gguf_files import is_linear, write_encoder, write_gguf

COUNT = int(os.environ.get("LIGHTX2V_FUZZ", "200"))
# Lengths, counts and offsets that no header of this size can mean.
NUMBERS = (0, 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)
WORDS = (b"GGUF", b"general.alignment", b"blocks.0", b".weight", b"split.count", b"\xff" * 8)


def transformer(path: Path) -> int:
    config = WanConfig(dim=128, ffn_dim=64, num_layers=1, text_dim=32)
    weights = fill(WanModel(config)).state_dict()
    shape = {"comfy.gguf.orig_shape.patch_embedding.weight": (128, 16, 1, 2, 2)}
    flat = weights | {"patch_embedding.weight": weights["patch_embedding.weight"].flatten(1)}
    write_gguf(path, flat, lambda n, t: "Q4_0" if is_linear(n, t) else "F32", fields=shape)
    return min(open_checkpoint(path).gguf.starts.values())


def encoder(path: Path) -> int:
    write_encoder(path)
    return min(open_checkpoint(path).gguf.starts.values())


KINDS: dict[str, tuple[Callable, Callable]] = {
    "transformer": (transformer, load_transformer),
    "text encoder": (encoder, load_text_encoder),
}


def damage(content: bytes, header_end: int, rng: random.Random) -> bytes:
    """One of: cut, bytes flipped, a number or a word put in, a stretch removed, doubled, zeroed."""
    data = bytearray(content)
    at = rng.randrange(4, header_end)
    kind = rng.randrange(7)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(4, header_end)] = rng.randrange(256)
    elif kind == 2:
        struct.pack_into("<Q", data, min(at, header_end - 8), rng.choice(NUMBERS))
    elif kind == 3:
        word = rng.choice(WORDS)
        data[at : at + len(word)] = word
    elif kind == 4:
        del data[at : at + rng.randrange(1, 40)]
    elif kind == 5:
        data[at:at] = data[at : at + rng.randrange(1, 40)]
    else:
        data[at : at + 24] = bytes(24)
    return bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_get_a_sentence_and_never_anything_else(tmp_path, kind):
    make, load = KINDS[kind]
    path, rng, told = tmp_path / "damaged.gguf", random.Random(kind), 0
    header_end = make(path)
    content = path.read_bytes()
    load(path)

    for _ in range(COUNT // len(KINDS)):
        path.unlink()
        path.write_bytes(damage(content, header_end, rng))
        try:
            with torch.inference_mode():
                load(path)
        except LightX2VError as error:
            assert len(str(error)) < 700, "a sentence, not a dump"
            told += 1

    # What hits the middle of a word of the vocabulary changes that word and cannot be seen.
    assert told > 0.4 * COUNT / len(KINDS), "the damage must show"
