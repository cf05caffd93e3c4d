"""GGUF against a second reader: that of diffusers."""

from __future__ import annotations

import gguf
import pytest
import torch
from diffusers.models.model_loading_utils import load_gguf_checkpoint
from diffusers.quantizers.gguf.utils import dequantize_functions
from safetensors.torch import save_file

from lightx2v_core.assemble import load_transformer
from lightx2v_core.checkpoint.convert import quantise_file
from lightx2v_core.quant.ggml import BLOCK_TYPES, GgmlLinear, dequantise_blocks
from tests.conftest import tiny_model
from tests.ggml_blocks import random_blocks

TYPES = [kind.name for kind in dequantize_functions if kind.name in BLOCK_TYPES]


def numbers_of_diffusers(blocks: torch.Tensor, name: str) -> torch.Tensor:
    """In float32; its own entry computes in float16."""
    kind, dequantise = BLOCK_TYPES[name], dequantize_functions[gguf.GGMLQuantizationType[name]]
    rows = blocks.reshape(-1, kind.nbytes)
    return dequantise(rows, kind.elements, kind.nbytes, torch.float32)


@pytest.mark.parametrize("name", TYPES)
def test_block_types_become_the_numbers_diffusers_computes(name):
    blocks = torch.from_numpy(random_blocks(name, 200))

    ours = dequantise_blocks(blocks, name, (200, BLOCK_TYPES[name].elements))

    assert torch.equal(ours, numbers_of_diffusers(blocks, name).reshape(ours.shape))


@pytest.mark.parametrize("scheme", ["gguf-Q8_0", "gguf-Q4_1"])
def test_diffusers_reads_the_files_we_write(tmp_path, scheme):
    save_file(tiny_model().state_dict(), tmp_path / "wan.safetensors")

    quantise_file(tmp_path / "wan.safetensors", tmp_path / "q.gguf", scheme)

    theirs = load_gguf_checkpoint(str(tmp_path / "q.gguf"))
    ours = load_transformer(tmp_path / "q.gguf").model
    assert theirs.keys() == ours.state_dict().keys()
    for name, module in ours.named_modules():
        if isinstance(module, GgmlLinear):
            stored = theirs[f"{name}.weight"]
            expected = numbers_of_diffusers(stored.as_tensor(), stored.quant_type.name)
            assert torch.equal(module.dequantise(torch.float32).flatten(), expected.flatten()), name
