"""Which world a family is of, and that whoever asks it asks what that world kept from training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.unit.training.small_family import write_family
from training import quick
from training.card import tables_of_samplers
from training.family import METRICS, world_of
from training.quick import main as quick_main
from training.table import make_parser, prepare
from training.world import held_out
from training.worlds import PLAIN, WIDE, World


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"))


def test_the_metrics_of_a_family_name_its_world(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"world": "wide"}')

    assert world_of(tmp_path) is WIDE
    assert world_of(tmp_path, "plain") is PLAIN
    with pytest.raises(SystemExit, match=r"metrics\.json does not say .* say --world"):
        world_of(tmp_path / "elsewhere")


@pytest.mark.parametrize("world", [PLAIN, WIDE], ids=lambda world: world.name)
def test_the_table_asks_what_the_world_keeps_from_training(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    monkeypatch.setattr("training.table.QUICK_REAL_CLIPS", 12)
    asked = ["--smoke", "--folder", str(family), "--out", str(tmp_path), "--tasks", "t2v"]
    options = make_parser().parse_args([*asked, "--world", world.name])
    options.workers = 1

    bench = prepare(options, torch.device("cpu"), (6, 1))

    assert bench.context.world is world
    assert bool(held_out(bench.questions["t2v"].scenes).all()) == world.holds_out


def test_a_look_at_a_family_is_at_its_own_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / METRICS).write_text('{"world": "wide"}')
    seen = []

    def look(folder: Path, task: str, clips: int, size: object, world: World) -> dict:
        seen.append((task, world.name))
        return {}

    monkeypatch.setattr(quick, "look", look)
    monkeypatch.setattr(quick, "save_sheet", lambda *_: None)

    quick_main(["--folder", str(tmp_path), "--sheet", str(tmp_path / "sheet.png")])

    assert seen == [("t2v", "wide"), ("i2v", "wide")]


def test_the_card_has_the_rows_of_a_table_and_apart_from_them_those_of_settings(
    tmp_path: Path,
) -> None:
    def row(task: str, name: str, value: float, shift: float | None) -> dict:
        told = {"value": value, "low": value - 1, "high": value + 1}
        difference = None if shift is None else {"value": shift, "low": -1.25, "high": 0.5}
        ratios = {"frechet_ratio": 0.731, "diversity": None if task == "i2v" else 1.012}
        times = {"milliseconds_a_clip": 0.3331, "speedup": 23.24}
        asked = {"task": task, "name": name}
        return {**asked, "score": told, "difference": difference, **ratios, **times}

    rows = [
        row("t2v", "base, 50 steps, CFG 3", 95.94, None),
        row("t2v", "distilled, 4 steps", 96.14, 0.2),
        row("i2v", "distilled, 4 steps", 90.0, -0.1),
        row("t2v", "distilled, renoise, 4 steps", 95.0, -0.3),
        row("t2v", "distilled, 2 steps", 94.0, -0.9),
    ]
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows}))

    tables = tables_of_samplers(tmp_path / "table.json")

    shown, without = (f" | 0.73 | {diversity} | 0.333 | 23.2 |" for diversity in ("1.01", ""))
    assert tables["samplers"].splitlines()[2:] == [
        f"| T2V base, 50 steps, CFG 3 | 95.9 [94.9, 96.9] | {shown}",
        f"| T2V distilled, 4 steps | 96.1 [95.1, 97.1] | +0.2 [-1.2, +0.5]{shown}",
        f"| I2V distilled, 4 steps | 90.0 [89.0, 91.0] | -0.1 [-1.2, +0.5]{without}",
    ]
    assert [line.split(" | ")[0] for line in tables["settings"].splitlines()[2:]] == [
        "| as trained",
        "| renoise",
        "| 2 steps",
    ]
