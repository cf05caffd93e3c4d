"""The benchmark of formats: rows for all that can be written, and a table without blanks."""

from __future__ import annotations

import json

import pytest

from benchmarks import formats
from benchmarks.format_files import SOURCE, forms
from lightx2v_core.checkpoint.convert import SCHEMES
from lightx2v_core.quant.ggml import BLOCK_TYPES
from lightx2v_core.quant.schemes import LINEARS


def test_every_scheme_that_is_written_or_read_has_a_row():
    rows = forms()

    assert set(SCHEMES) <= set(rows)
    assert next(iter(rows)) == SOURCE
    assert {f"gguf-{kind}" for kind in BLOCK_TYPES} <= set(rows)
    # int8 by rows, fp8 by rows and plain GGUF types go by the name that detection gives them.
    plain = {"gguf-F32", "gguf-F16", "gguf-BF16"}
    assert set(LINEARS) - plain <= {row.scheme for row in rows.values()}


def test_a_format_is_measured_against_its_source_and_one_without_its_tool_says_what_it_needs(
    tmp_path, capsys
):
    out, chosen = tmp_path / "formats.jsonl", ["fp16", "gguf-F16", "fp8", "gguf-Q4_K"]

    code = formats.main(["--out", str(out), "--prompts", "1", "--schemes", *chosen])

    lines = {line["format"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert code == 0 and list(lines) == chosen
    fp8, exact = lines["fp8"], lines["gguf-F16"]
    assert fp8["detected"] and exact["detected"]
    assert (fp8["scheme"], fp8["packed_linears"], fp8["linears"]) == ("fp8-row", 50, 50)
    assert exact["forward_error"] == exact["lora_error"] == 0.0 < fp8["forward_error"] < 0.1
    assert fp8["lora_matched"] == 50 and fp8["lora_removed"]
    assert fp8["lora_size"] == pytest.approx(1, abs=0.02)
    assert fp8["lora_error_unpacked"] < 1e-3 < fp8["lora_error"]
    assert exact["difference"] == [0.0, 0.0, 0.0] and exact["score"] == lines["fp16"]["score"]
    assert "--ggml" in lines["gguf-Q4_K"]["blocked_by"]
    table = out.with_suffix(".md").read_text().splitlines()
    assert len(table) == 2 + len(chosen)
    assert {row.count("|") for row in table} == {11}
    assert not any("|  |" in row for row in table)
    assert table[-1] in capsys.readouterr().out
