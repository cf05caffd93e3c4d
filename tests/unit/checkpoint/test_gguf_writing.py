"""GGUF files that quantize writes: read back by the package gguf and by our loader."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from safetensors.torch import save_file

from lightx2v_core.assemble import load_text_encoder, load_transformer
from lightx2v_core.checkpoint.convert import quantise_file
from lightx2v_core.checkpoint.gguf_writing import GGUF_SCHEMES, WRITTEN_TYPES
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.cli import main
from lightx2v_core.errors import CapabilityError, CheckpointError
from lightx2v_core.presets import DEMO_FILES, DEMO_FOLDER
from lightx2v_core.quant.ggml import GgmlLinear
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.model import WanModel
from tests.conftest import fill, relative_error, tiny_inputs
from tests.layouts import plain_demo

CONFIG = WanConfig(dim=256, ffn_dim=512, num_layers=1, text_dim=64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 file under ComfyUI's names, with metadata of ours and of somebody else."""
    path = tmp_path_factory.mktemp("source") / "wan2.1_t2v_lightx2v_4step.safetensors"
    tensors = {k: v.to(torch.bfloat16) for k, v in fill(WanModel(CONFIG)).state_dict().items()}
    prefixed = {f"model.diffusion_model.{k}": v for k, v in tensors.items()}
    save_file(prefixed, path, {"lightx2v.release": "distill", "format": "pt"})
    return path


def package_numbers(tensor: gguf.ReaderTensor) -> torch.Tensor:
    numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(numbers.copy()).reshape(tuple(int(n) for n in tensor.shape[::-1]))


def test_the_schemes_are_the_types_that_the_package_can_write():
    writable = {"F32", "F16"}
    for kind in gguf.quants._type_traits:
        try:
            gguf.quants.quantize(np.ones((1, 256), np.float32), kind)
        except NotImplementedError:
            continue
        writable.add(kind.name)

    assert set(WRITTEN_TYPES) == writable


@pytest.mark.parametrize("scheme", GGUF_SCHEMES)
def test_the_package_and_our_loader_read_the_same_numbers(source, tmp_path, scheme):
    quantise_file(source, tmp_path / "q.gguf", scheme)

    stored = open_checkpoint(source)
    ours = load_transformer(tmp_path / "q.gguf").model
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    prefix = "model.diffusion_model."
    assert {prefix + name for name in read} == stored.headers.keys()
    for name, parameter in ours.state_dict().items():
        module = ours.get_submodule(name.rpartition(".")[0])
        blocks = isinstance(module, GgmlLinear) and name.endswith("weight")
        loaded = module.dequantise(torch.float32) if blocks else parameter.float()
        assert torch.equal(loaded, package_numbers(read[name])), name
        if not (name.startswith("blocks.") and name.endswith("weight") and loaded.ndim == 2):
            exact = stored.tensors({"x": prefix + name})["x"]
            assert torch.equal(loaded, exact.float()), f"{name} is not to be rounded"


def test_the_layout_is_that_of_comfyui_gguf(source, tmp_path):
    quantise_file(source, tmp_path / "q.gguf", "gguf-Q4_0")

    reader = gguf.GGUFReader(tmp_path / "q.gguf")

    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    patch = next(t for t in reader.tensors if t.name == "patch_embedding.weight")
    assert reader.fields["general.architecture"].contents() == "wan"
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    assert reader.fields["lightx2v.release"].contents() == "distill"
    assert "format" not in reader.fields
    assert (types["patch_embedding.weight"], patch.shape.tolist()) == ("F32", [2, 2, 1, 16, 256])
    wanted = {
        "blocks.0.self_attn.q.weight": "Q4_0",
        "blocks.0.ffn.2.weight": "Q4_0",
        "blocks.0.self_attn.norm_q.weight": "F32",
        "blocks.0.self_attn.q.bias": "F32",
        "blocks.0.modulation": "F32",
        "head.modulation": "F32",
        "head.head.weight": "BF16",
        "time_projection.1.weight": "BF16",
        "text_embedding.0.weight": "BF16",
    }
    assert {name: types[name] for name in wanted} == wanted


def test_rows_that_are_no_whole_blocks_stay_as_they_are(tmp_path):
    weights = fill(WanModel(WanConfig(dim=128, ffn_dim=256, num_layers=1, text_dim=64)))
    save_file(weights.state_dict(), tmp_path / "wan.safetensors")

    quantise_file(tmp_path / "wan.safetensors", tmp_path / "q.gguf", "gguf-TQ2_0")

    headers = open_checkpoint(tmp_path / "q.gguf").headers
    assert GGML_QUANT_SIZES[gguf.GGMLQuantizationType.TQ2_0][0] == 256
    assert headers["blocks.0.ffn.2.weight"].dtype == "TQ2_0"
    assert headers["blocks.0.ffn.0.weight"].dtype == "F32"
    assert torch.isfinite(
        load_transformer(tmp_path / "q.gguf").model(**tiny_inputs(weights.config, 1))
    ).all()


@pytest.mark.parametrize(
    ("value", "words"),
    [(float("nan"), "holds numbers that are not finite"), (1e5, r"holds 1e\+05, beyond what F16")],
)
def test_numbers_the_type_cannot_hold_are_refused_and_nothing_is_left(tmp_path, value, words):
    tensors = fill(WanModel(CONFIG)).state_dict()
    tensors["blocks.0.ffn.0.weight"][3, 5] = value
    save_file(tensors, tmp_path / "wan.safetensors")

    with pytest.raises(CheckpointError, match=rf"blocks\.0\.ffn\.0\.weight {words}"):
        quantise_file(tmp_path / "wan.safetensors", tmp_path / "new" / "q.gguf", "gguf-F16")

    assert list((tmp_path / "new").iterdir()) == []


def test_a_source_that_is_partly_quantised_is_refused(tmp_path):
    tensors = fill(WanModel(CONFIG)).state_dict()
    name = "blocks.0.self_attn.v.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "wan.safetensors")

    with pytest.raises(CheckpointError, match="fp8-cast.*give a Wan transformer in fp32"):
        quantise_file(tmp_path / "wan.safetensors", tmp_path / "q.gguf", "gguf-Q8_0")


def test_without_the_package_writing_says_what_to_install(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)

    with pytest.raises(CapabilityError, match="writing a GGUF file needs .*pip install gguf"):
        quantise_file(source, tmp_path / "new" / "q.gguf", "gguf-Q8_0")

    assert list((tmp_path / "new").iterdir()) == []


def test_a_package_too_old_for_a_type_is_named(source, tmp_path, monkeypatch):
    class Older:
        F32, F16, BF16 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16"))

    monkeypatch.setattr(gguf, "GGMLQuantizationType", Older)

    with pytest.raises(CapabilityError, match="does not know the type MXFP4; update it"):
        quantise_file(source, tmp_path / "q.gguf", "gguf-MXFP4")


def test_the_command_writes_gguf_and_tells_the_size(source, tmp_path, capsys):
    code = main(["quantize", str(source), str(tmp_path / "q.gguf"), "--scheme", "gguf-Q8_0"])

    assert code == 0
    assert "q.gguf: gguf-Q8_0, 0.00 GB" in capsys.readouterr().out


# Forward of the demo, one step from noise, against its fp16 source. A number in Q8_0 is off by up
# to 1/254 of the largest in its block of 32 (2.1 % of the output, measured), in Q4_0 by up to 1/16
# (31 %): fifteen times as much, as the steps are about. The bounds leave half as much again.
@pytest.mark.parametrize(
    ("scheme", "least", "most", "smaller"),
    [("gguf-Q8_0", 0.005, 0.032, 0.65), ("gguf-Q4_0", 0.08, 0.47, 0.42)],
)
def test_the_demo_in_gguf_runs_close_to_its_source(tmp_path, scheme, least, most, smaller):
    quantise_file(plain_demo("t2v"), tmp_path / "q.gguf", scheme)
    plain, loaded = load_transformer(plain_demo("t2v")), load_transformer(tmp_path / "q.gguf")
    text = load_text_encoder(DEMO_FOLDER / DEMO_FILES["text"], dtype=torch.float32)
    inputs = {
        "x_BCTHW": torch.randn(1, 16, 3, 16, 16, generator=torch.Generator().manual_seed(3)),
        "timestep_B": torch.tensor([833.3333]),
        "text_BSE": text.encode(["a striped cyan square moving down quickly on a dark background"]),
        "clip_BSE": None,
    }

    with torch.inference_mode():
        error = relative_error(loaded.model(**inputs), plain.model(**inputs))

    assert (loaded.info.scheme, loaded.info.release, loaded.info.family) == (
        scheme,
        "demo",
        "wan2.1",
    )
    assert (tmp_path / "q.gguf").stat().st_size < smaller * plain_demo("t2v").stat().st_size
    assert least < error < most, f"{error:.4f}"
