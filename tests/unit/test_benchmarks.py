"""Benchmarks run on a CPU too, where their lines say what they hold."""

from __future__ import annotations

import json

import torch

from benchmarks import attention, linears, loading


def test_every_case_gives_a_line_with_its_figures_or_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(linears, "SHAPES", ((64, 128),))
    out = tmp_path / "lines.jsonl"

    code = linears.main(["--device", "cpu", "--tokens", "40", "--repeats", "1", "--out", str(out)])

    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0
    assert capsys.readouterr().out == out.read_text()
    assert len(lines) == 1 + len(linears.CASES)
    assert lines[0]["case"] == "linear-bf16" and lines[0]["ratio"] == 1.0
    for line in lines:
        assert (line["tokens"], line["in_features"], line["out_features"]) == (40, 64, 128)
        assert line["torch"] == torch.__version__ and line["card"] == "cpu"
        measured = "seconds" in line and line["seconds"] > 0
        assert measured != bool(line.get("blocked_by")), line
    errors = {line["case"]: line["relative_error"] for line in lines if "seconds" in line}
    assert errors["linear-bf16"] < 0.01 < errors["linear-fp8-row"] < 0.05
    assert errors["linear-int8"] < 0.02


def test_loading_tells_the_ram_of_quantising_and_of_loading(tmp_path, capsys):
    out = tmp_path / "lines.jsonl"

    code = loading.main(
        ["--tiny", "--schemes", "fp8", "--folder", str(tmp_path), "--out", str(out)]
    )

    (line,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0
    assert line["scheme"] == "fp8" and line["weights"] < line["file_bytes"]
    assert 0 < line["load_anonymous"] < 2**30
    assert line["quantise_anonymous"] < 2**28
    assert list(tmp_path.iterdir()) == [out], "the large files are removed"


def test_attention_gives_a_line_for_every_row_or_the_reason(tmp_path, capsys):
    out = tmp_path / "lines.jsonl"

    code = attention.main(
        ["--device", "cpu", "--tokens", "70", "--heads", "2", "--repeats", "1", "--out", str(out)]
    )

    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0
    assert capsys.readouterr().out == out.read_text()
    assert {line["case"] for line in lines} >= {"attention_8bit", "attention_16bit", "rms_rotary"}
    assert lines[0]["ratio"] == 1.0, "PyTorch's own attention is what ratios are taken to"
    for line in lines:
        assert (line["tokens"], line["heads"]) == (70, 2)
        assert (line.get("seconds", 0) > 0) != bool(line.get("blocked_by")), line
    errors = [line["relative_error"] for line in lines if "relative_error" in line]
    assert len(errors) == 2 and max(errors) < 1e-5
