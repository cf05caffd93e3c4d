"""8-bit matmuls: which row a card takes, and each row against the product of its codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightx2v_core.device import Card, describe_card
from lightx2v_core.errors import CapabilityError
from lightx2v_core.ops import matmul, rows
from lightx2v_core.ops.matmul import ROWS, Weight, select_matmul
from lightx2v_core.ops.rows import LIMITS, quantise_rows
from tests.conftest import relative_error

TORCH = (2, 13)
CARDS = {
    "8.6": Card("cuda", (8, 6), TORCH),
    "8.9": Card("cuda", (8, 9), TORCH),
    "9.0": Card("cuda", (9, 0), TORCH),
    "10.0": Card("cuda", (10, 0), TORCH),
    "12.0": Card("cuda", (12, 0), TORCH),
    "8.9 on Windows": Card("cuda", (8, 9), TORCH, windows=True),
    "12.0 with an older PyTorch": Card("cuda", (12, 0), (2, 8)),
    "8.9 with an older PyTorch": Card("cuda", (8, 9), (2, 6)),
    "7.0": Card("cuda", (7, 0), TORCH),
    "ROCm": Card("rocm", (9, 4), TORCH),
    "MPS": Card("mps", (0, 0), TORCH),
    "CPU": Card("cpu", (0, 0), TORCH),
}
FP8, E5M2, INT8 = (Weight(codes, 5120, 13824) for codes in ("float8_e4m3fn", "float8_e5m2", "int8"))
# What "auto" takes for fp8, e5m2 and int8 weights.
TAKEN = {
    "8.6": ("dequantise", "dequantise", "int8"),
    "8.9": ("fp8-row", "fp8-tensor", "int8"),
    "9.0": ("fp8-row", "fp8-tensor", "int8"),
    "10.0": ("fp8-row", "fp8-tensor", "int8"),
    "12.0": ("fp8-row", "fp8-tensor", "int8"),
    "8.9 on Windows": ("fp8-tensor", "fp8-tensor", "int8"),
    "12.0 with an older PyTorch": ("fp8-tensor", "fp8-tensor", "int8"),
    "8.9 with an older PyTorch": ("fp8-tensor", "fp8-tensor", "int8"),
    "7.0": ("dequantise", "dequantise", "dequantise"),
    "ROCm": ("dequantise", "dequantise", "dequantise"),
    "CPU": ("dequantise", "dequantise", "dequantise"),
}


@pytest.fixture(autouse=True)
def without_kitchen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "find_spec", lambda package: None)


@pytest.mark.parametrize("card", TAKEN)
def test_auto_takes_the_fastest_row_that_a_card_has(card):
    chosen = [select_matmul("auto", CARDS[card], w, torch.bfloat16) for w in (FP8, E5M2, INT8)]

    assert tuple(choice.row for choice in chosen) == TAKEN[card]
    for choice in chosen:
        assert bool(choice.why) == (choice.row == "dequantise"), "a slower choice says why"


def test_auto_says_what_the_card_lacks():
    choice = select_matmul("auto", CARDS["8.6"], FP8, torch.bfloat16)

    assert choice.why == "fp8-row: it needs compute capability 8.9 and this is 8.6"


def test_an_apple_gpu_dequantises_integers_and_refuses_float8_in_words():
    taken = [
        select_matmul("auto", CARDS["MPS"], w._replace(codes=codes), torch.float16).row
        for w, codes in ((INT8, "int8"), (INT8, "nvfp4"))
    ]

    assert taken == ["dequantise", "dequantise"]
    for weight in (FP8, E5M2, FP8._replace(codes="mxfp8")):
        with pytest.raises(CapabilityError, match="no float8 on Apple GPUs; use an int8, bf16"):
            select_matmul("auto", CARDS["MPS"], weight, torch.float16)


def test_auto_is_exact_where_the_rest_is_float32():
    assert select_matmul("auto", CARDS["9.0"], FP8, torch.float32).row == "dequantise"


@pytest.mark.parametrize("codes", ["nvfp4", "mxfp8", "gguf-Q4_K"])
def test_packed_formats_are_dequantised(codes):
    weight = Weight(codes, 5120, 5120)

    assert select_matmul("auto", CARDS["12.0"], weight, torch.bfloat16).row == "dequantise"
    with pytest.raises(CapabilityError, match=f"multiplies float8_e4m3fn codes and .* are {codes}"):
        select_matmul("fp8-row", CARDS["12.0"], weight, torch.bfloat16)


def test_shapes_that_a_kernel_does_not_take_are_dequantised():
    narrow = Weight("float8_e4m3fn", 5120, 100)

    choice = select_matmul("auto", CARDS["9.0"], narrow, torch.bfloat16)

    assert choice.row == "dequantise"
    assert "must be multiples of 16 and these are 5120 and 100" in choice.why


@pytest.mark.parametrize(
    ("name", "card", "weight", "words"),
    [
        ("fp8-row", "8.6", FP8, "it needs compute capability 8.9 and this is 8.6; use auto"),
        ("fp8-row", "8.9 on Windows", FP8, "for Windows is built without row-wise scaling"),
        ("fp8-row", "12.0 with an older PyTorch", FP8, "needs PyTorch 2.9 on this card .* is 2.8"),
        ("fp8-row", "9.0", INT8, "it multiplies float8_e4m3fn codes and these are int8"),
        ("fp8-tensor", "9.0", INT8, "float8_e4m3fn or float8_e5m2 codes and these are int8"),
        ("fp8-tensor", "CPU", FP8, "on a CPU PyTorch runs it in a loop that takes seconds"),
        ("int8", "MPS", INT8, "PyTorch has no 8-bit matmul on mps"),
        ("int8", "ROCm", INT8, "it has not been tried on AMD cards"),
        ("int8", "9.0", Weight("int8", 36, 64), "multiples of 8 and these are 36 and 64"),
        ("kitchen-int8", "9.0", INT8, "the comfy-kitchen package is not installed"),
        ("magic", "9.0", INT8, "matmul 'magic' is unknown; use auto, measured, fp8-row"),
    ],
)
def test_a_named_row_is_refused_with_its_reason_and_not_replaced(name, card, weight, words):
    with pytest.raises(CapabilityError, match=words):
        select_matmul(name, CARDS[card], weight, torch.bfloat16)


@pytest.mark.parametrize("name", ["fp8-row", "dequantise"])
def test_a_named_row_is_honoured_where_auto_would_take_another(name):
    assert select_matmul(name, CARDS["CPU"], FP8, torch.float32) == (name, "")


def test_comfy_kitchen_is_taken_by_name_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(matmul, "find_spec", lambda package: object())

    assert select_matmul("kitchen-int8", CARDS["8.6"], INT8, torch.bfloat16).row == "kitchen-int8"
    assert select_matmul("auto", CARDS["8.6"], INT8, torch.bfloat16).row == "int8"


def test_the_card_of_this_process_is_described():
    card = describe_card("cpu")

    assert card.kind == "cpu"
    assert f"{card.torch[0]}.{card.torch[1]}." in torch.__version__


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_and_scale(weight: Tensor, dtype: torch.dtype, by_row: bool) -> tuple[Tensor, Tensor]:
    limit = 57344.0 if dtype == torch.float8_e5m2 else LIMITS[dtype]
    largest = weight.abs().amax(dim=1, keepdim=True) if by_row else weight.abs().amax()
    scale = (largest / limit).reshape(-1, 1)
    divided = weight / scale
    return (divided.round() if dtype == torch.int8 else divided).to(dtype), scale


# (row, codes it multiplies)
MULTIPLIED = [
    ("fp8-row", torch.float8_e4m3fn),
    ("fp8-tensor", torch.float8_e4m3fn),
    ("fp8-tensor", torch.float8_e5m2),
    ("int8", torch.int8),
]
# Of a row against its own codes multiplied in float64: the sums are in float32 or exact, then the
# result is rounded to the dtype of the input, up to three times.
OWN_ERRORS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# Against plain activations: these are rounded to 3 bits of mantissa, or to 127 steps of a token.
ACTIVATION_ERRORS = {"fp8-row": 0.03, "fp8-tensor": 0.03, "int8": 0.01}


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("dtype", OWN_ERRORS)
@pytest.mark.parametrize(("name", "codes_dtype"), MULTIPLIED)
def test_a_row_equals_its_codes_multiplied_in_float64(name, codes_dtype, dtype, by_row):
    codes, scale = codes_and_scale(randn(48, 256), codes_dtype, by_row)
    x, bias = randn(21, 256, seed=2).to(dtype), randn(48, seed=3).to(dtype)
    x_codes, x_scale = quantise_rows(x, torch.int8 if name == "int8" else torch.float8_e4m3fn)
    weight = codes.double() * scale.double()

    y = ROWS[name].multiply(x, codes, scale, bias)

    exact = (x_codes.double() * x_scale.double()) @ weight.t() + bias.double()
    assert (y.dtype, tuple(y.shape)) == (dtype, (21, 48))
    assert relative_error(y, exact) < OWN_ERRORS[dtype]
    plain = x.double() @ weight.t() + bias.double()
    assert 1e-3 < relative_error(y, plain) < ACTIVATION_ERRORS[name], relative_error(y, plain)


@pytest.mark.parametrize("name", ["fp8-row", "fp8-tensor", "int8"])
def test_tokens_in_several_chunks_equal_tokens_in_one(name, monkeypatch):
    dtype = torch.int8 if name == "int8" else torch.float8_e4m3fn
    codes, scale = codes_and_scale(randn(32, 64), dtype, by_row=True)
    x = randn(300, 64, seed=2)
    whole = ROWS[name].multiply(x, codes, scale, None)

    for module in (matmul, rows):
        monkeypatch.setattr(module, "CHUNK", 128 * 64)
    in_parts = ROWS[name].multiply(x, codes, scale, None)

    assert torch.equal(in_parts, whole)


@pytest.mark.parametrize("name", ["fp8-row", "fp8-tensor", "int8"])
def test_tokens_of_zeros_stay_the_bias(name):
    dtype = torch.int8 if name == "int8" else torch.float8_e4m3fn
    codes, scale = codes_and_scale(randn(32, 64), dtype, by_row=True)
    bias = randn(32, seed=5)

    y = ROWS[name].multiply(torch.zeros(3, 64), codes, scale, bias)

    assert torch.equal(y, bias.expand(3, -1))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_the_largest_value_of_a_token_keeps_its_value(dtype):
    x = randn(64, 96).to(torch.bfloat16)
    x[:, 5] = 300.0 * torch.linspace(0.5, 1.0, 64)

    codes, scale = quantise_rows(x, dtype)

    found = codes.float().abs().amax(dim=1, keepdim=True)
    assert (found == LIMITS[dtype]).all()
    torch.testing.assert_close(found * scale, x.float().abs().amax(1, True), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["fp8-row", "fp8-tensor", "int8"])
def test_an_input_that_is_not_finite_does_not_pass_for_a_number(name):
    dtype = torch.int8 if name == "int8" else torch.float8_e4m3fn
    codes, scale = codes_and_scale(randn(32, 64), dtype, by_row=True)
    x = randn(4, 64)
    x[1, 3], x[2, 7] = float("inf"), float("nan")

    y = ROWS[name].multiply(x, codes, scale, None)

    assert not torch.isfinite(y[1:3]).any()
    assert torch.isfinite(y[[0, 3]]).all()
