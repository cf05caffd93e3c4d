"""Matmuls chosen by time: timed once for each shape, remembered, and never trusted blindly."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from lightx2v_core.device import Card
from lightx2v_core.errors import CapabilityError
from lightx2v_core.ops import matmul
from lightx2v_core.ops.matmul import Weight
from lightx2v_core.quant import measured, multiply
from lightx2v_core.quant.linear import QuantisedLinear

CUDA, BF16 = torch.device("cuda"), torch.bfloat16
CARD = Card("cuda", (9, 0), (2, 13))
FP8, INT8 = Weight("float8_e4m3fn", 5120, 13824), Weight("int8", 5120, 5120)
TIMES = {
    "fp8-row": 3e-3,
    "fp8-tensor": 2e-3,
    "dequantise": 4e-3,
    "int8": 9e-3,
    "kitchen-int8": 8e-3,
}


@pytest.fixture(autouse=True)
def timed(monkeypatch):
    """Shapes that were timed; the card's name and PyTorch as they are asked for."""
    seen: list[Weight] = []

    def time_rows(weight, rows, device, dtype):
        seen.append(weight)
        return {row: TIMES[row] for row in rows}

    monkeypatch.setattr(measured, "time_rows", time_rows)
    monkeypatch.setattr(matmul, "find_spec", lambda package: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card A")
    return seen


def test_the_row_that_took_least_time_is_taken_and_told(tmp_path):
    choice = measured.fastest(FP8, CARD, CUDA, BF16, tmp_path)

    assert choice.row == "fp8-tensor"
    assert choice.why == "ms for 8192 tokens: fp8-row 3.00, fp8-tensor 2.00, dequantise 4.00"


def test_a_shape_is_timed_once_for_each_card_torch_and_dtype(tmp_path, timed, monkeypatch):
    def ask(weight=FP8, dtype=BF16):
        return measured.fastest(weight, CARD, CUDA, dtype, tmp_path).row

    first = [ask(), ask(), ask(INT8), ask(INT8), ask(dtype=torch.float16)]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card B")
    ask()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    ask()

    assert first == ["fp8-tensor", "fp8-tensor", "dequantise", "dequantise", "fp8-tensor"]
    assert timed == [FP8, INT8, FP8, FP8, FP8]
    keys = json.loads((tmp_path / measured.FILE).read_text()).keys()
    assert "Card B, torch 9.9.9, bfloat16, float8_e4m3fn 13824 x 5120" in keys
    assert len(keys) == 5


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"a": 1}', '{"a": {"b": -1}}', "\0\1", '{"a": null}']
)
def test_a_damaged_file_is_named_in_the_log_and_made_anew(text, tmp_path, timed, caplog):
    (tmp_path / measured.FILE).write_text(text)

    with caplog.at_level(logging.WARNING):
        row = measured.fastest(FP8, CARD, CUDA, BF16, tmp_path).row
        again = measured.fastest(FP8, CARD, CUDA, BF16, tmp_path).row

    assert (row, again, len(timed)) == ("fp8-tensor", "fp8-tensor", 1)
    assert f"{tmp_path / measured.FILE} is ignored and made anew" in caplog.text


def test_times_of_other_rows_than_run_here_are_not_used(tmp_path, timed, monkeypatch):
    measured.fastest(INT8, CARD, CUDA, BF16, tmp_path)
    monkeypatch.setattr(matmul, "find_spec", lambda package: object())

    assert measured.fastest(INT8, CARD, CUDA, BF16, tmp_path).row == "dequantise"
    assert len(timed) == 2, "a row that was installed since is timed too"


def test_a_folder_that_cannot_be_written_costs_a_warning_and_no_folder_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")

    rows = [
        measured.fastest(FP8, CARD, CUDA, BF16, folder).row for folder in (tmp_path / "file", None)
    ]

    assert rows == ["fp8-tensor", "fp8-tensor"]
    assert "matmul times are not kept in" in caplog.text


@pytest.mark.parametrize("codes", ["nvfp4", "gguf-Q4_K"])
def test_what_one_row_alone_multiplies_is_not_timed(codes, timed):
    choice = measured.fastest(Weight(codes, 5120, 5120), CARD, CUDA, BF16, None)

    assert choice == ("dequantise", "nothing else runs here")
    assert not timed


def test_a_model_takes_the_measured_row_in_every_linear(tmp_path, monkeypatch):
    monkeypatch.setattr(multiply, "describe_card", lambda device: CARD)
    model = torch.nn.Sequential(QuantisedLinear(64, 64, torch.float8_e4m3fn, (64, 1)))

    told = multiply.set_matmul(model, "measured", "cuda", BF16, tmp_path)

    assert model[0].multiply is matmul.ROWS["fp8-tensor"].multiply
    assert model[0].rows_dtype == torch.float8_e4m3fn
    assert told.startswith("fp8-tensor (ms for 8192 tokens: ")
    assert (tmp_path / measured.FILE).exists()


@pytest.mark.parametrize("folder", ["kept", None])
def test_equal_linears_of_a_model_are_timed_once(folder, timed, tmp_path, monkeypatch):
    monkeypatch.setattr(multiply, "describe_card", lambda device: CARD)
    layers = [QuantisedLinear(64, 64, torch.float8_e4m3fn, (64, 1)) for _ in range(3)]
    wide = QuantisedLinear(64, 128, torch.float8_e4m3fn, (128, 1))
    cache = tmp_path if folder else None

    multiply.set_matmul(torch.nn.Sequential(*layers, wide), "measured", "cuda", BF16, cache)

    assert len(timed) == 2


def test_measuring_is_refused_where_there_is_no_card():
    with pytest.raises(CapabilityError, match="times kernels on a CUDA card and this is cpu; use"):
        measured.fastest(FP8, Card("cpu"), torch.device("cpu"), BF16, None)
