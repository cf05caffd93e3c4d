"""The benchmark of formats: rows for all that can be written, and a table without blanks."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file

from benchmarks import formats
from benchmarks.format_files import SOURCE, forms
from lightx2v_core.checkpoint.convert import SCHEMES
from lightx2v_core.checkpoint.detect import detect
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.quant.ggml import BLOCK_TYPES
from lightx2v_core.quant.schemes import LINEARS
from tests.conftest import tiny_model


def test_every_scheme_that_is_written_or_read_has_a_row():
    rows = forms()

    assert set(SCHEMES) <= set(rows)
    assert next(iter(rows)) == SOURCE
    assert {f"gguf-{kind}" for kind in BLOCK_TYPES} <= set(rows)
    # int8 by rows, fp8 by rows and plain GGUF types go by the name that detection gives them.
    plain = {"gguf-F32", "gguf-F16", "gguf-BF16"}
    assert set(LINEARS) - plain <= {row.scheme for row in rows.values()}


def test_every_file_that_needs_no_other_tool_is_made_and_detected_as_meant(tmp_path):
    weights = {name: tensor.half() for name, tensor in tiny_model().state_dict().items()}
    save_file(weights, tmp_path / "wan2.1_t2v_tiny.safetensors")

    found = {}
    for number, (name, form) in enumerate(forms().items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        if form.writer != "ggml":
            path = form.make(tmp_path / "wan2.1_t2v_tiny.safetensors", folder)
            found[name] = (detect(open_checkpoint(path)).scheme, form.scheme)

    assert len(found) > len(SCHEMES)
    assert {name for name, (actual, expected) in found.items() if actual != expected} == set()


def test_a_format_is_measured_against_its_source_and_one_without_its_tool_says_what_it_needs(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(formats, "LORA_FITS", 1)
    out, chosen = tmp_path / "formats.jsonl", ["gguf-F16", "fp8", "gguf-Q4_K"]

    code = formats.main(["--out", str(out), "--prompts", "1", "--schemes", *chosen])

    lines = {line["format"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert code == 0 and list(lines) == chosen
    fp8, exact = lines["fp8"], lines["gguf-F16"]
    assert fp8["detected"] and exact["detected"]
    assert (fp8["scheme"], fp8["packed_linears"], fp8["linears"]) == ("fp8-row", 50, 50)
    assert exact["forward_error"] == exact["lora_error"] == 0.0 < fp8["forward_error"] < 0.1
    assert fp8["lora_matched"] == 50 and fp8["lora_removed"]
    assert fp8["lora_size"] == pytest.approx(1, abs=0.1)
    assert fp8["lora_error_unpacked"] < 1e-3 < fp8["lora_error"]
    assert exact["difference"] == [0.0, 0.0, 0.0] and len(fp8["difference"]) == 3
    assert "--ggml" in lines["gguf-Q4_K"]["blocked_by"]
    table = out.with_suffix(".md").read_text().splitlines()
    assert len(table) == 2 + len(chosen)
    assert {row.count("|") for row in table} == {11}
    assert not any("|  |" in row for row in table)
    assert table[-1] in capsys.readouterr().out
    assert {line["prompts"] for line in lines.values()} == {1}
