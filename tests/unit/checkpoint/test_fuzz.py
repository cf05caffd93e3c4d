"""Damaged headers, by the hundred: always a sentence or a whole model, never anything else.

LIGHTX2V_FUZZ=10000 runs more of them.
"""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from lightx2v_core.assemble import load_transformer, load_vae
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.errors import LightX2VError
from lightx2v_core.lora.read import read_lora
from lightx2v_core.report import make_report
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.model import WanModel
from lightx2v_core.wan.vae import VaeConfig, WanVae
from tests.conftest import fill
from tests.unit.checkpoint.block_forms import as_file

COUNT = int(os.environ.get("LIGHTX2V_FUZZ", "200"))
WORDS = (b'"F32"', b'"F8_E4M3"', b'"I8"', b'"shape"', b"[", b"]", b"{", b"}", b"-1", b"0", b"1e99")
WORDS += (
    b"null",
    b"NaN",
    b"\\u0000",
    b"9" * 30,
    b'"data_offsets"',
    b"blocks.0",
    b",",
    b":",
    b"\xff",
)


def transformer() -> dict[str, Tensor]:
    config = WanConfig(dim=128, ffn_dim=64, num_layers=1, text_dim=16)
    return fill(WanModel(config)).state_dict()


def quantised() -> dict[str, Tensor]:
    tensors = transformer()
    for key in [k for k, v in tensors.items() if k.startswith("blocks.") and v.ndim == 2]:
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
        tensors[key + "_scale"] = torch.ones(tensors[key].shape[0], 1)
    return tensors


def in_blocks() -> dict[str, Tensor]:
    tensors = transformer()
    linears = [k for k, v in tensors.items() if k.startswith("blocks.") and v.ndim == 2]
    return as_file(tensors, linears, "comfy")


def vae() -> dict[str, Tensor]:
    return fill(WanVae(VaeConfig(4, 4))).state_dict()


def lora() -> dict[str, Tensor]:
    stems = [f"diffusion_model.blocks.{n}.ffn.0" for n in range(8)]
    pairs = {f"{stem}.lora_up.weight": torch.ones(8, 2) for stem in stems}
    return pairs | {f"{stem}.lora_down.weight": torch.ones(2, 4) for stem in stems}


KINDS = {
    "transformer": (transformer, load_transformer),
    "quantised": (quantised, load_transformer),
    "in blocks": (in_blocks, load_transformer),
    "vae": (vae, load_vae),
    "lora": (lora, read_lora),
}


def damage(content: bytes, rng: random.Random) -> bytes:
    """One of: cut, length changed, bytes flipped, words put in, a stretch removed or doubled."""
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    data = bytearray(content)
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:
        length = rng.choice([0, 1, header_end, 2**31, 2**60, 2**64 - 1, rng.randrange(header_end)])
        return struct.pack("<Q", length) + bytes(data[8:])
    at = rng.randrange(8, header_end)
    if kind == 2:
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(8, header_end)] = rng.randrange(256)
    elif kind == 3:
        word = rng.choice(WORDS)
        data[at : at + len(word)] = word
    elif kind == 4:
        stretch = rng.randrange(1, 60)
        data[at : at + stretch] = b" " * stretch
    else:
        digits = [i for i in range(8, header_end) if chr(data[i]).isdigit()]
        for i in rng.sample(digits, 3):
            data[i] = ord(str(rng.randrange(10)))
    return bytes(data)


def split_folder(folder: Path) -> list[Path]:
    """A block-split model with its index; the files that may be damaged."""
    tensors = transformer()
    parts = {"block_0": {}, "block_1": {}, "non_block": {}}
    for name, tensor in tensors.items():
        parts["block_0" if name.startswith("blocks.") else "non_block"][name] = tensor
    for name, tensor in list(parts["block_0"].items()):
        parts["block_1"][name.replace("blocks.0.", "blocks.1.")] = tensor.clone()
    weight_map = {}
    for name, part in parts.items():
        save_file(part, folder / f"{name}.safetensors")
        weight_map |= dict.fromkeys(part, f"{name}.safetensors")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return [*sorted(folder.glob("*.safetensors")), index]


def damage_index(content: bytes, rng: random.Random) -> bytes:
    """As `damage`, for a file that is JSON from its first byte."""
    return damage(struct.pack("<Q", len(content)) + content, rng)[8:]


def test_damaged_split_folders_and_indexes_get_a_sentence_and_never_anything_else(tmp_path):
    files, rng, told = split_folder(tmp_path), random.Random("split"), 0

    for _ in range(COUNT // (len(KINDS) + 1)):
        path = rng.choice([*files, files[-1]])
        content = path.read_bytes()
        is_index = path.suffix == ".json"
        path.write_bytes((damage_index if is_index else damage)(content, rng))
        try:
            load_transformer(tmp_path)
            inspected = make_report(open_checkpoint(tmp_path)).lines()
            assert inspected[-1], "a report has lines"
        except LightX2VError as error:
            assert len(str(error)) < 700, "a sentence, not a dump"
            told += 1
        path.write_bytes(content)

    assert told > 0.3 * COUNT / (len(KINDS) + 1), "the damage must show"


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_of_a_damaged_file_is_a_sentence_or_a_report(tmp_path, kind):
    content, rng = save(KINDS[kind][0](), {"lightx2v.release": "demo"}), random.Random(f"i{kind}")
    path = tmp_path / "wan2.1_t2v_14b_lightx2v_4step.safetensors"

    for _ in range(COUNT // len(KINDS)):
        path.write_bytes(damage(content, rng))
        try:
            report = make_report(open_checkpoint(path))
        except LightX2VError as error:
            assert len(str(error)) < 700, "a sentence, not a dump"
        else:
            json.dumps(report.as_json())
            assert all(len(line) < 2000 for line in report.lines())


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_get_a_sentence_and_never_anything_else(tmp_path, kind):
    make, load = KINDS[kind]
    content, rng = save(make(), {"lightx2v.release": "demo"}), random.Random(kind)
    path, told = tmp_path / "damaged.safetensors", 0

    for _ in range(COUNT // len(KINDS)):
        path.write_bytes(damage(content, rng))
        try:
            load(path)
        except LightX2VError as error:
            assert len(str(error)) < 700, "a sentence, not a dump"
            told += 1

    assert told > 0.5 * COUNT / len(KINDS), "the damage must show"
