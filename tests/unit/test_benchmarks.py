"""Benchmarks run on a CPU too, where their lines say what they hold."""

from __future__ import annotations

import json

import torch

from benchmarks import attention, block, glue, linears, loading


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


def test_what_lies_between_matmuls_gives_a_line_for_each_case_and_form(tmp_path, capsys):
    out = tmp_path / "lines.jsonl"

    code = glue.main(
        [
            "--device",
            "cpu",
            "--tokens",
            "40",
            "--widths",
            "64",
            "128",
            "--repeats",
            "1",
            "--out",
            str(out),
        ]
    )

    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0 and capsys.readouterr().out == out.read_text()
    cases = {(line["case"].removeprefix("glue-"), line["form"]) for line in lines}
    both = {"modulated-norm", "norm3", "gate-residual-norm", "gelu"}
    expected = {(case, form) for case in both for form in ("bf16", "fp8", "int8")}
    assert cases == expected | {("rows", "fp8"), ("rows", "int8"), ("gate-residual", "fp32")}
    for line in lines:
        assert line["width"] == (128 if line["case"] == "glue-gelu" else 64)
        assert line["relative_error"] == 0.0, "on a CPU both are plain PyTorch"
        assert "needs an NVIDIA GPU" in line["kernels"]
        assert line["ratio"] == line["seconds"] / line["plain_seconds"]


def test_a_block_and_a_forward_are_timed_and_the_block_has_an_error(tmp_path):
    out = tmp_path / "lines.jsonl"

    code = block.main(
        [
            "--device",
            "cpu",
            "--tiny",
            "--latent",
            "1",
            "4",
            "4",
            "--repeats",
            "1",
            "--blocks",
            "2",
            "--out",
            str(out),
        ]
    )

    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0
    assert [(line["case"], line["scheme"]) for line in lines] == [
        (case, scheme) for scheme in ("bf16", "fp8") for case in ("block", "forward")
    ]
    assert all(line["tokens"] == 4 and line["seconds"] > 0 for line in lines)
    errors = [line["relative_error"] for line in lines if line["case"] == "block"]
    assert 1e-4 < errors[0] < 0.01 < errors[1] < 0.05
