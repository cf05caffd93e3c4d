"""A named matmul in a whole model: near dequantising, with LoRA exact on top of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightx2v_core.assemble import load_transformer
from lightx2v_core.checkpoint.convert import quantise_file
from lightx2v_core.device import Card
from lightx2v_core.errors import CapabilityError
from lightx2v_core.lora.branches import Branch
from lightx2v_core.ops.matmul import ROWS
from lightx2v_core.quant import multiply
from lightx2v_core.quant.linear import QuantisedLinear
from tests.conftest import relative_error, tiny_inputs, tiny_model

# Rounding the activations of every linear in two blocks; the weights are the same.
NEAR = {"fp8-row": 0.05, "int8": 0.02}
SCHEMES = {"fp8-row": "fp8", "int8": "int8"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("schemes")
    save_file(tiny_model().state_dict(), folder / "full.safetensors")
    for scheme in SCHEMES.values():
        quantise_file(folder / "full.safetensors", folder / f"{scheme}.safetensors", scheme)
    return {s: folder / f"{s}.safetensors" for s in ("full", *SCHEMES.values())}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("row", SCHEMES)
def test_a_named_row_multiplies_in_every_linear_and_stays_near_dequantising(files, row):
    plain = load_transformer(files[SCHEMES[row]])
    fast = load_transformer(files[SCHEMES[row]], matmul=row)

    linears = [m for m in fast.model.modules() if isinstance(m, QuantisedLinear)]
    assert len(linears) == 20
    assert all(linear.multiply is ROWS[row].multiply for linear in linears)
    assert f"matmul: {row}" in fast.summary
    inputs = tiny_inputs(plain.model.config, batch=1)
    with torch.inference_mode():
        error = relative_error(fast.model(**inputs), plain.model(**inputs))
    assert 1e-4 < error < NEAR[row], f"{error:.4f}"


@pytest.mark.parametrize("row", [*SCHEMES, "dequantise"])
def test_a_lora_on_a_row_adds_its_own_product_exactly(files, row):
    linear = load_transformer(files[SCHEMES.get(row, "fp8")], matmul=row).model.blocks[1].ffn[0]
    x, branch = randn(2, 9, 256), Branch(0.1 * randn(4, 256), 0.1 * randn(512, 4), 0.7)
    before = linear(x)

    linear.branches = (branch,)

    assert torch.equal(linear(x), before + branch(x))
    assert relative_error(linear(x), before) > 1e-3


def test_dequantising_stays_the_default_on_a_cpu_and_says_why(files):
    loaded = load_transformer(files["fp8"])

    assert loaded.model.blocks[0].ffn[0].multiply is None
    assert "matmul: dequantise (8 bits are multiplied on CUDA cards" in loaded.summary


def test_auto_on_a_card_puts_the_row_it_has(files, monkeypatch):
    monkeypatch.setattr(multiply, "describe_card", lambda device: Card("cuda", (8, 9), (2, 13)))
    model = load_transformer(files["int8"]).model

    told = multiply.set_matmul(model, "auto", "cuda", torch.bfloat16)

    assert told == "int8"
    assert model.blocks[0].ffn[0].multiply is ROWS["int8"].multiply


def test_linears_that_a_row_cannot_take_are_counted_with_the_reason(files, monkeypatch):
    monkeypatch.setattr(multiply, "describe_card", lambda device: Card("cuda", (9, 0), (2, 13)))
    model = load_transformer(files["fp8"]).model
    model.blocks[0].ffn[0].out_features = 500

    told = multiply.set_matmul(model, "auto", "cuda", torch.bfloat16)

    assert told == (
        "fp8-row in 19 linears, dequantise in 1 linears "
        "(fp8-row: its sides must be multiples of 16 and these are 256 and 500)"
    )


@pytest.mark.parametrize(
    ("file", "name", "words"),
    [
        ("full", "fp8-row", "'fp8-row' multiplies 8-bit weights and this model has none"),
        ("int8", "fp8-row", "it multiplies float8_e4m3fn codes and these are int8"),
        ("fp8", "magic", "matmul 'magic' is unknown"),
        ("full", "magic", "matmul 'magic' is unknown"),
    ],
)
def test_a_row_that_cannot_multiply_the_file_is_refused(files, file, name, words):
    with pytest.raises(CapabilityError, match=words):
        load_transformer(files[file], matmul=name)


@pytest.mark.parametrize("name", ["auto", "measured", "dequantise"])
def test_a_full_file_has_nothing_to_multiply_in_8_bits(files, name):
    assert "matmul" not in load_transformer(files["full"], matmul=name).summary
