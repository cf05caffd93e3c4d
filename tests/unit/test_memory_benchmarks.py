"""Benchmarks of memory, tiny on a CPU, and what README says of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from benchmarks import card_guide, loading, random_files, whole_run
from benchmarks.lines import read_lines
from lightx2v_core.checkpoint.detect import detect
from lightx2v_core.checkpoint.source import open_checkpoint

ROOT = Path(__file__).parents[2]


def test_two_experts_are_told_under_a_budget_of_card_and_ram_beside_resident(tmp_path):
    out, folder = tmp_path / "lines.jsonl", tmp_path / "files"
    arguments = ["--tiny", "--two-experts", "--device", "cpu", "--size", "32x32x5"]
    held = ["--vram-gb", "0.6", "--ram-gb", "16", "--no-group"]

    whole_run.main([*arguments, *held, "--folder", str(folder), "--keep", "--out", str(out)])

    first, alone, line = read_lines(out)
    assert "ratio" not in alone and alone["streamed"] == line["streamed"]
    assert (first["settled"], alone["settled"], line["settled"]) == (False, True, True)
    assert [len(each["streamed"]["videos"]) for each in (first, alone)] == [1, 2]
    assert 0 < first["ram_samples"] <= alone["ram_samples"]
    assert (line["case"], line["experts"], line["ram_held_by"]) == ("whole_run", 2, "planner")
    assert line["equal"] is True and line["within_ram"] is True
    assert 0 < line["streamed"]["ram_peak"] < 16e9
    assert len(line["streamed"]["placed"]) == 2 and line["ratio"] > 0
    assert len(list(folder.glob("wan2.2*noise*"))) == 2, "kept for the next call"


def test_each_video_under_a_budget_is_told_at_once_and_the_card_guide_waits_for_the_settled(
    tmp_path,
):
    out = tmp_path / "lines.jsonl"
    arguments = ["--tiny", "--device", "cpu", "--size", "32x32x5", "--vram-gb", "0.6"]

    whole_run.main([*arguments, "--folder", str(tmp_path), "--out", str(out)])

    first, line = read_lines(out)
    assert (first["settled"], line["settled"]) == (False, True)
    assert first["equal"] is line["equal"] is True and line["ratio"] > 0
    told = line["streamed"]
    assert abs(told["seconds"] - told["videos"][1]["seconds"]) < 1e-3, "of the second video"
    assert card_guide.read_rows([first]) == []
    assert [row.whole for row in card_guide.read_rows([line, first])] == [line]


def test_a_random_file_has_no_two_blocks_alike(tmp_path, capsys):
    for scheme in ("fp8", "nvfp4", "gguf-Q4_0"):
        random_files.main(["--tiny", "--scheme", scheme, "--folder", str(tmp_path)])

        path = Path(capsys.readouterr().out.strip())
        checkpoint = open_checkpoint(path)
        names = [f"blocks.{block}.ffn.0.weight" for block in range(6)]
        stored = checkpoint.tensors({name: name for name in names}, packed=names)
        assert len({tensor.view(torch.uint8).numpy().tobytes() for tensor in stored.values()}) == 6
        assert detect(checkpoint).scheme.startswith(scheme)


def test_the_card_guide_takes_the_last_line_of_each_budget_and_kind(tmp_path, capsys):
    def line(case: str, budget: float, peak: float, **more: object) -> dict:
        run: dict = {"peak_allocated": peak * 1e9, "pinned": 9e9, "seconds_per_step": 2.0}
        run["seconds"] = 10.04
        told = "resident 6/40 blocks, 1 GB card"
        run |= {"placed": [f"transformer: {told}"]} if case == "whole_run" else {"line": told}
        made = {"case": case, "scheme": "fp8", "budget_gb": budget, "streamed": run, "ratio": 1.01}
        return made | {"equal": True, "size": [832, 480, 81]} | more

    rows = [line("memory", 8.0, 7.7), line("whole_run", 8.0, 7.1), line("whole_run", 8.0, 7.2)]
    rows += [line("memory", 8.0, 7.9), line("memory", 12.0, 9.0, size=[1280, 720, 81])]
    rows += [line("whole_run", 8.0, 1.0, ram_gb=16.0), {"case": "other"}]
    path, readme = tmp_path / "lines.jsonl", tmp_path / "README.md"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    readme.write_text(f"a\n{card_guide.BEGIN}\nold\n{card_guide.END}\nb\n")

    card_guide.main([str(path), "--plot", str(tmp_path / "a.png"), "--readme", str(readme)])

    steps = "6 of 40 | 9.0 GB | 2.00 s | 1.010x"
    made = [
        f"| 8 GB | fp8 | 7.9 GB | {steps} | 7.2 GB | 10.0 |",
        f"| 12 GB | fp8, 1280x720 | 9.0 GB | {steps} |  |  |",
    ]
    assert capsys.readouterr().out.splitlines()[2:] == made
    assert made[0] in readme.read_text() and "old" not in readme.read_text()
    with Image.open(tmp_path / "a.png") as drawn:
        assert {(0x20, 0x60, 0xC0), (0xC0, 0x60, 0x20)} <= {c for _, c in drawn.getcolors(9999)}


def test_readme_holds_the_table_of_the_lines_in_this_repository():
    results, readme = ROOT / "benchmarks/results", (ROOT / "README.md").read_text(encoding="utf-8")
    files = (results / "memory.jsonl", results / "whole_run.jsonl")

    rows = card_guide.read_rows(line for file in files for line in read_lines(file))

    assert card_guide.within(readme, card_guide.table(rows)) == readme
    assert {row.name for row in rows} >= {"fp8", "bf16", "GGUF Q4_0"}


def test_the_ram_of_loading_a_text_encoder_is_told_for_files_as_they_are_published(tmp_path):
    out = tmp_path / "lines.jsonl"
    chosen = ["--schemes", "umt5-fp16", "umt5-fp8"]

    loading.main(["--tiny", *chosen, "--folder", str(tmp_path), "--out", str(out)])

    half, eighth = read_lines(out)
    assert [half["scheme"], eighth["scheme"]] == chosen[1:]
    assert half["file_bytes"] > half["weights"] > eighth["weights"] > 0
    assert list(tmp_path.iterdir()) == [out], "the files are gone"
