"""Containers on disk: what opens, what is refused, and in which words."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightx2v_core.assemble import load_transformer
from lightx2v_core.checkpoint.layouts import to_diffusers
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.errors import CheckpointError
from tests.conftest import tiny_inputs, tiny_model

WEIGHTS = tiny_model().state_dict()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def saved(path: Path, tensors: dict[str, torch.Tensor] = WEIGHTS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def shard(folder: Path, tensors: dict[str, torch.Tensor], parts: int = 3) -> Path:
    names = sorted(tensors)
    weight_map = {}
    for index in range(parts):
        file = f"diffusion_pytorch_model-{index + 1:05}-of-{parts:05}.safetensors"
        saved(folder / file, {k: tensors[k] for k in names[index::parts]})
        weight_map |= dict.fromkeys(names[index::parts], file)
    index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def split(folder: Path) -> Path:
    """LightX2V's block-split form: a file for each block, one for the rest."""
    for block in (0, 1):
        own = {k: v for k, v in WEIGHTS.items() if k.startswith(f"blocks.{block}.")}
        saved(folder / f"block_{block}.safetensors", own)
    saved(
        folder / "non_block.safetensors",
        {k: v for k, v in WEIGHTS.items() if not k.startswith("blocks.")},
    )
    return folder


def layouts(folder: Path) -> dict[str, Path]:
    """One file or folder for each form the same weights are published in."""
    prefixed = {"model.diffusion_model." + k: v for k, v in WEIGHTS.items()}
    wrapped = {"generator_ema": {"model._fsdp_wrapped_module." + k: v for k, v in WEIGHTS.items()}}
    torch.save(dict(WEIGHTS), folder / "plain.pt")
    torch.save(wrapped, folder / "wrapped.pth")
    return {
        "official": saved(folder / "official.safetensors"),
        "comfy": saved(folder / "comfy.safetensors", prefixed),
        "diffusers": saved(
            folder / "diffusers.safetensors", {to_diffusers(k): v for k, v in WEIGHTS.items()}
        ),
        "sharded": shard(folder / "sharded", WEIGHTS),
        "one shard": next(shard(folder / "one", WEIGHTS).glob("*-00002-*")),
        "block split": split(folder / "split"),
        "one block": split(folder / "by_block") / "block_1.safetensors",
        "no block": split(folder / "by_rest") / "non_block.safetensors",
        "distill_models": saved(folder / "repo/distill_models/distill_model.safetensors").parents[
            1
        ],
        "pt": folder / "plain.pt",
        "wrapped pt": folder / "wrapped.pth",
    }


@torch.inference_mode()
def test_every_layout_gives_the_same_output(folder):
    inputs = tiny_inputs(tiny_model().config, batch=1)
    expected = tiny_model()(**inputs)

    outputs = {
        name: load_transformer(path).model(**inputs) for name, path in layouts(folder).items()
    }

    assert [name for name, y in outputs.items() if not torch.equal(y, expected)] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_the_files_own_dtype_stay_memory_mapped(folder, dtype):
    path = saved(folder / "w.safetensors", {k: v.to(dtype) for k, v in WEIGHTS.items()})

    model = load_transformer(path, dtype=dtype).model

    weight = model.blocks[0].ffn[0].weight
    mapped = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
    ]
    spans = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in mapped]
    assert weight.dtype == dtype
    assert any(start <= weight.data_ptr() < stop for start, stop in spans)


def test_a_half_file_says_how_much_of_it_is_there(folder):
    path = saved(folder / "half.safetensors")
    os.truncate(path, path.stat().st_size * 2 // 3)

    with pytest.raises(CheckpointError, match=r"half\.safetensors is incomplete: .* MB of .* MB"):
        open_checkpoint(path)


def header_only(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def test_a_header_whose_length_begins_like_a_web_page_is_read(tmp_path):
    text = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    content = header_only(text.ljust(0x3C20)) + struct.pack("<f", 1.5)
    assert content[:2] == b" <"
    (tmp_path / "a.safetensors").write_bytes(content)

    checkpoint = open_checkpoint(tmp_path / "a.safetensors")

    assert checkpoint.tensors({"w": "w"})["w"].tolist() == [1.5]


LYING = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
GAP = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}).encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "Git-LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"", "holds 0 bytes"),
        (struct.pack("<Q", 2**60) + b"{}" * 40, "header claims 1152921504606846976 bytes"),
        (header_only(b"not json" * 10), "header is not readable"),
        (header_only(b"[1, 2, 3]" + b" " * 9), "header is not readable"),
        (header_only(LYING) + bytes(16), "sizes for w contradict"),
        (header_only(GAP) + bytes(16), "sizes for w contradict"),
        (header_only(LYING.replace(b"F32", b"Q42")) + bytes(16), "dtype Q42"),
    ],
)
def test_a_bad_file_gets_a_sentence(folder, content, words):
    path = folder / "bad.safetensors"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


class Surprise:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("should_never_exist",))


def test_a_pickle_with_code_is_refused_and_not_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with (folder / "evil.pth").open("wb") as file:
        pickle.dump({"w": Surprise()}, file, protocol=2)

    with pytest.raises(CheckpointError, match="loading it would run code"):
        open_checkpoint(folder / "evil.pth")

    assert not (folder / "should_never_exist").exists()


def test_a_half_pickle_is_refused(folder):
    torch.save(dict(WEIGHTS), folder / "w.pt")
    os.truncate(folder / "w.pt", 4000)

    with pytest.raises(CheckpointError, match=r"w\.pt is not a whole PyTorch file"):
        open_checkpoint(folder / "w.pt")


def test_a_missing_shard_is_named(folder):
    shard(folder, WEIGHTS)
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"lacks 1 of 3 shards .*00002-of-00003"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["block_0.safetensors", "non_block.safetensors"])
def test_a_missing_file_of_a_block_split_folder_is_named(folder, name):
    (split(folder) / name).unlink()

    with pytest.raises(CheckpointError, match=f"lacks 1 of 3 files .*{name}"):
        open_checkpoint(folder)


def test_a_block_alone_is_told_that_it_is_a_part(folder):
    path = split(folder) / "block_1.safetensors"
    (folder / "non_block.safetensors").unlink()

    with pytest.raises(CheckpointError, match="holds blocks of a Wan transformer and not the rest"):
        load_transformer(path)


def test_a_block_split_folder_ignores_what_lies_beside_it(folder):
    saved(split(folder) / "lora.safetensors", {"x.lora_up.weight": torch.ones(2)})

    assert open_checkpoint(folder).headers.keys() == WEIGHTS.keys()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "is not a safetensors index"),
        ('{"weight_map": {}}', "lists no tensors"),
        ('{"weight_map": {"w": "' + "x" * 300 + '"}}', "lacks 1 of 1 shards"),
        ('{"weight_map": {"w": "a\\u0000b"}}', "outside its folder"),
        ('{"weight_map": [1]}', "is not a safetensors index"),
    ],
)
def test_a_bad_index_gets_a_sentence(folder, content, words):
    (folder / "m.safetensors.index.json").write_text(content)

    with pytest.raises(CheckpointError, match=words) as refused:
        open_checkpoint(folder)

    assert len(str(refused.value)) < 400


def test_an_index_may_not_point_outside_its_folder(folder):
    (folder / "m.safetensors.index.json").write_text('{"weight_map": {"w": "../x.safetensors"}}')

    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(folder)


def test_two_models_in_one_folder_are_told_apart(folder):
    saved(folder / "a.safetensors")
    saved(folder / "b.safetensors")

    with pytest.raises(CheckpointError, match="both hold .* they are two models"):
        open_checkpoint(folder)


def test_a_model_folder_is_not_confused_by_what_lies_beside_the_transformer(folder):
    saved(folder / "wan2.1_t2v.safetensors")
    saved(folder / "Wan2.1_VAE.safetensors", {"conv1.weight": torch.ones(2)})
    saved(folder / "text" / "umt5.safetensors", {"shared.weight": torch.ones(2)})

    assert open_checkpoint(folder).headers.keys() == WEIGHTS.keys()
    assert open_checkpoint(folder / "text").headers.keys() == {"shared.weight"}


def test_a_wrong_file_for_the_transformer_is_told_where_it_belongs(folder):
    path = saved(folder / "vae.safetensors", {"decoder.middle.0.residual.0.gamma": torch.ones(4)})

    with pytest.raises(CheckpointError, match="is not a Wan transformer but a vae file"):
        load_transformer(path)
