"""A folder of demo files: its scores, and the world that it was trained on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lightx2v_core.presets import DEMO_FOLDER

from .worlds import SPLITS, WORLDS, World

METRICS = "metrics.json"


def read_metrics(folder: Path) -> dict:
    """What `package` or `ship` wrote there; empty where neither did."""
    path = folder / METRICS
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def world_of(folder: Path = DEMO_FOLDER, named: str | None = None) -> World:
    """The world `named`, else that of the family in `folder`, which is the shipped one."""
    name = named or read_metrics(folder).get("world")
    if name is None:
        raise SystemExit(
            f"{folder / METRICS} does not say of which world the family is; say --world"
        )
    return WORLDS[name]


def add_world(parser: argparse.ArgumentParser, *, with_split: bool = False) -> None:
    """Arguments of a command that asks a family prompts."""
    told = "of the prompts; that of the family where its metrics.json says so"
    parser.add_argument("--world", choices=WORLDS, help=told)
    if with_split:
        told = "of the world's captions; held-out where it holds any out of training"
        parser.add_argument("--split", choices=SPLITS, help=told)
