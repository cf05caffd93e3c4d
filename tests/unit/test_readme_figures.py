"""What README and the demo's card quote of the measurements that lie in benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.card import tables_of_samplers
from training.intervals import Interval

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
SAMPLERS = RESULTS / "samplers.json"
README = (ROOT / "README.md").read_text("utf-8")
# As README calls the rows of the table of samplers.
ROWS = {
    "teacher, 50 steps, CFG 3": ("t2v", "base, 50 steps, CFG 3"),
    "teacher, 4 steps, no CFG": ("t2v", "base, 4 steps"),
    "distilled, 4 steps, no CFG": ("t2v", "distilled, 4 steps"),
    "teacher + distillation LoRA, 4 steps": ("t2v", "base + distill LoRA, 4 steps"),
    "teacher + two expert LoRAs, 4 steps": ("t2v", "base + two expert LoRAs, 4 steps"),
    "from a picture: teacher, 50 steps, CFG 3": ("i2v", "base, 50 steps, CFG 3"),
    "from a picture: teacher, 4 steps, no CFG": ("i2v", "base, 4 steps"),
    "from a picture: distilled, 4 steps": ("i2v", "distilled, 4 steps"),
}


def table(path: Path) -> dict[tuple[str, str], dict]:
    rows = json.loads(path.read_text("utf-8"))["rows"]
    return {(row["task"], row["name"]): row for row in rows}


def rows_under(title: str) -> list[list[str]]:
    """Cells of a table of README, without its two first lines and without stars."""
    lines = README[README.index(f"| {title} |") :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def test_the_demo_s_table_is_of_the_measured_samplers():
    measured, quick = table(SAMPLERS), table(RESULTS / "samplers_quick.json")

    told = {name: rest for name, *rest in rows_under("Demo model, 8-bit files")}

    assert list(told) == list(ROWS)
    for name, (score, frechet, variety, time) in told.items():
        row, timed = measured[ROWS[name]], quick[ROWS[name]]
        assert score.replace("**", "") == Interval(**row["score"]).told()
        assert float(frechet) == pytest.approx(row["frechet_ratio"], abs=0.051)
        assert float(variety) == pytest.approx(row["diversity_ratio"], abs=0.0051)
        assert int(time.removeprefix("1/")) == round(timed["speedup"])


def test_the_card_s_tables_are_of_the_measured_samplers():
    card = (ROOT / "lightx2v_core/demo/README.md").read_text("utf-8")

    tables = tables_of_samplers(SAMPLERS)

    assert set(tables) == {"samplers", "settings"}
    for made in tables.values():
        assert made in card


def test_each_format_s_row_is_of_its_line():
    told = [row for row in rows_under("Format | File | Packed") if "[" in row[-1]]
    lines = map(json.loads, (RESULTS / "formats.jsonl").read_text("utf-8").splitlines())
    measured = [cells_of(line) for line in lines if line["format"] != "fp16"]

    assert len(told) > 20
    for name, *cells in told:
        assert cells in measured, name


def cells_of(line: dict) -> list[str]:
    value, low, high = line["difference"]
    return [
        f"{line['file_bytes'] / 1e6:.1f} MB",
        f"{line['packed_linears']} of {line['linears']}",
        f"{100 * line['forward_error']:.2f} %",
        f"{line['lora_size']:.3f}, {100 * line['lora_error']:.1f} % off",
        f"{line['score']:.1f}: {value:+.1f} [{low:+.1f}, {high:+.1f}]",
    ]


def test_each_warned_setting_s_row_is_of_its_line():
    told = (RESULTS / "misuse.md").read_text("utf-8")
    rows = json.loads((RESULTS / "misuse.json").read_text("utf-8"))["rows"]

    for row in rows:
        score, frechet = (signed(row[name], 1) for name in ("score", "frechet"))
        worse = ", ".join(row["worse"]) or "–"
        cells = [row["warning"], row["name"], score, frechet, signed(row["diversity"], 3), worse]
        assert f"| {' | '.join(cells)} |" in told, row["name"]


def signed(interval: dict[str, float], digits: int) -> str:
    value, low, high = (f"{interval[name]:+.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
