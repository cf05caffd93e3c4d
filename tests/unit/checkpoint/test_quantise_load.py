"""Linears turned into codes while a file is loaded: what `quantize` would have written."""

from __future__ import annotations

import ctypes
import platform
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightx2v_core.assemble import load_transformer
from lightx2v_core.checkpoint.convert import quantise_file
from lightx2v_core.errors import CheckpointError, RequestError
from lightx2v_core.quant.linear import holds_codes
from lightx2v_core.quant.quantise import WrittenScheme
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.model import WanModel
from tests.conftest import tiny_inputs, tiny_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def full(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    path = folder / "wan2.1_t2v.safetensors"
    tensors = tiny_model().state_dict()
    save_file({f"model.diffusion_model.{k}": v.to(dtype) for k, v in tensors.items()}, path)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_it_equals_loading_the_file_that_quantize_writes_bit_for_bit(tmp_path, scheme, dtype):
    source, target = full(tmp_path, dtype), tmp_path / "q.safetensors"
    quantise_file(source, target, scheme)
    written = load_transformer(target, dtype=torch.bfloat16).model

    loaded = load_transformer(source, dtype=torch.bfloat16, quantisation=scheme).model

    state = loaded.state_dict()
    assert state.keys() == written.state_dict().keys()
    for name, tensor in written.state_dict().items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name].float(), tensor.float()), name
    inputs = tiny_inputs(loaded.config, batch=1)
    if dtype == torch.bfloat16:
        with torch.inference_mode():
            assert torch.equal(loaded(**inputs), written(**inputs))


def test_the_summary_tells_both_sizes_and_the_matmul(tmp_path):
    loaded = load_transformer(full(tmp_path), quantisation="int8", matmul="int8")

    size = f"{loaded.residency.total_bytes / 1e9:.2f} GB"
    assert f"; quantised to int8: {size}; matmul: int8" in loaded.summary
    assert loaded.residency.total_bytes < loaded.info.bytes
    assert loaded.info.scheme == "bf16", "the file stays what it is"


def test_keep_changes_nothing(tmp_path):
    kept = load_transformer(full(tmp_path), dtype=torch.bfloat16, quantisation="keep")

    assert kept.model.blocks[0].ffn[0].weight.dtype == torch.bfloat16


def test_a_file_of_codes_is_not_quantised_again(tmp_path):
    quantise_file(full(tmp_path), tmp_path / "q.safetensors", "fp8")

    with pytest.raises(CheckpointError, match="quantised as fp8-row already and int8 is made from"):
        load_transformer(tmp_path / "q.safetensors", quantisation="int8")


def test_an_unknown_choice_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(RequestError, match="'fp4' is unknown; use keep, fp8, int8"):
        load_transformer(full(tmp_path), quantisation="fp4")


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, without what the allocator keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs Linux with glibc")
def test_no_second_copy_of_the_weights_is_held(tmp_path, monkeypatch):
    config = WanConfig(dim=512, ffn_dim=8192, num_layers=2, text_dim=16)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in WanModel(config).state_dict().items()}
    weights = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "full.safetensors")
    linears = sum(v.nbytes for k, v in weights.items() if k.startswith("blocks") and v.ndim == 2)
    largest = max(v.nbytes for v in weights.values())
    del weights
    seen, quantise = [], WrittenScheme.quantise

    def measured(self: WrittenScheme, weight: torch.Tensor) -> tuple:
        made = quantise(self, weight)
        seen.append(anonymous_bytes() - before)
        return made

    monkeypatch.setattr(WrittenScheme, "quantise", measured)
    load_transformer(tmp_path / "full.safetensors")  # whatever a first load leaves behind
    before = anonymous_bytes()

    loaded = load_transformer(tmp_path / "full.safetensors", quantisation="int8")

    assert loaded.model.blocks[1].ffn[2].weight.dtype == torch.int8
    assert linears > 80e6
    assert max(seen) < linears / 4 + largest, f"{max(seen) / 1e6:.0f} MB"


@pytest.mark.parametrize(("quantisation", "codes"), [("keep", False), ("fp8", True)])
def test_memory_is_planned_by_what_the_linears_hold_not_by_what_the_file_holds(
    tmp_path, quantisation, codes
):
    loaded = load_transformer(full(tmp_path), quantisation=quantisation)

    assert loaded.info.scheme == "bf16"
    assert holds_codes(loaded.model) == codes
