"""Block types against the package gguf, bit for bit, and the linears that keep them."""

from __future__ import annotations

import sys

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf.constants import GGML_QUANT_SIZES
from torch import Tensor

from lightx2v_core.errors import CapabilityError
from lightx2v_core.lora.branches import Branch, weight_shapes
from lightx2v_core.quant import ggml, ggml_grids
from lightx2v_core.quant.ggml import BLOCK_TYPES, GRID_TYPES, GgmlLinear, dequantise_blocks
from tests.ggml_blocks import random_blocks


def package_numbers(blocks: np.ndarray, name: str) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name]))


def bits(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.int32)


def test_the_types_are_those_that_the_package_can_dequantise_and_their_sizes_are_its_own():
    theirs = {kind.name for kind in gguf.quants._type_traits} - {"BF16"}

    assert set(BLOCK_TYPES) == theirs
    for name, kind in BLOCK_TYPES.items():
        sizes = GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert (kind.elements, kind.nbytes) == sizes


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_random_blocks_become_the_numbers_of_the_package_bit_for_bit(name):
    blocks = random_blocks(name, 400)

    ours = dequantise_blocks(torch.from_numpy(blocks), name, (400, BLOCK_TYPES[name].elements))

    expected = package_numbers(blocks, name)
    assert torch.isfinite(expected).all()
    assert expected.unique().numel() > 50
    assert torch.equal(bits(ours), bits(expected))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_any_bytes_at_all_become_the_numbers_of_the_package(name):
    shape = (400, BLOCK_TYPES[name].nbytes)
    blocks = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)

    ours = dequantise_blocks(torch.from_numpy(blocks), name, (400, BLOCK_TYPES[name].elements))

    with np.errstate(all="ignore"):
        expected = package_numbers(blocks, name)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded_once(dtype):
    blocks = torch.from_numpy(random_blocks("Q6_K", 64))

    rounded = dequantise_blocks(blocks, "Q6_K", (64, 256), dtype)

    assert torch.equal(rounded, dequantise_blocks(blocks, "Q6_K", (64, 256)).to(dtype))


def test_working_in_pieces_changes_nothing(monkeypatch):
    blocks = torch.from_numpy(random_blocks("IQ3_S", 65))
    whole = dequantise_blocks(blocks, "IQ3_S", (65, 256))

    monkeypatch.setattr(ggml, "CHUNK", 4096)

    assert torch.equal(dequantise_blocks(blocks, "IQ3_S", (65, 256)), whole)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_need_not_be_aligned(name):
    kind = BLOCK_TYPES[name]
    blocks = torch.from_numpy(random_blocks(name, 8)).flatten()
    moved = torch.cat((blocks.new_zeros(1), blocks))[1:]

    numbers = dequantise_blocks(moved, name, (8, kind.elements))

    assert torch.equal(numbers, dequantise_blocks(blocks, name, (8, kind.elements)))


def filled(name: str, bias: bool = True) -> GgmlLinear:
    linear = GgmlLinear(512, 96, name, bias)
    blocks = random_blocks(name, 96 * 512 // BLOCK_TYPES[name].elements)
    linear.weight = torch.from_numpy(blocks).reshape(linear.weight.shape)
    if bias:
        linear.bias.copy_(torch.linspace(-1, 1, 96))
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_multiplies_with_its_dequantised_weight(has_bias, dtype):
    linear = filled("Q4_K", has_bias)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(2)).to(dtype)

    y = linear(x)

    weight = dequantise_blocks(linear.weight, "Q4_K", (96, 512)).to(dtype)
    assert torch.equal(y, F.linear(x, weight, linear.bias.to(dtype) if has_bias else None))


def test_branches_add_to_the_output_and_the_blocks_stay_as_they_are():
    linear, x = filled("Q5_0"), torch.randn(3, 512, generator=torch.Generator().manual_seed(2))
    before, bare = linear.weight.clone(), linear(x)
    branch = Branch(torch.randn(4, 512), torch.randn(96, 4), 0.5)

    linear.branches = (branch,)

    assert torch.equal(linear(x), bare + branch(x))
    assert torch.equal(linear.weight, before)


def test_a_lora_sees_the_shape_that_the_blocks_stand_for():
    model = torch.nn.ModuleDict({"a": filled("Q8_0"), "b": torch.nn.Linear(3, 2)})

    shapes = weight_shapes(model)

    assert shapes == {"a.weight": (96, 512), "a.bias": (96,), "b.weight": (2, 3), "b.bias": (2,)}


def test_gradients_pass_through_a_table_first_used_in_inference_mode():
    ggml_grids.grid.cache_clear()
    linear = filled("IQ2_S")
    x = torch.randn(2, 512, requires_grad=True)
    with torch.inference_mode():
        linear(x)

    linear(x).sum().backward()

    torch.testing.assert_close(x.grad[0], linear.dequantise(torch.float32).sum(0))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_only_the_types_with_grids_need_the_package(monkeypatch, name):
    ggml_grids.grid.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)

    if name in GRID_TYPES:
        with pytest.raises(CapabilityError, match=f"in {name} needs .* gguf.*pip install gguf"):
            GgmlLinear(512, 96, name)
    else:
        assert filled(name)(torch.ones(1, 512)).shape == (1, 96)
