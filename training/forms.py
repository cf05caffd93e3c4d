"""The shipped forms of a family beside the files that they were made from, by the judge.

The same prompts and noise for both; each reads its text through its own text encoder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .intervals import Interval, paired_interval
from .reporting import Made
from .samplers import Row, all_rows, missing_files
from .table import make_parser, prepare, run_row, share_threads

CFG = 3.0


def judge_forms(
    source: Path, shipped: Path, prompts: int, device: torch.device, words: Sequence[str] = ()
) -> list[dict]:
    """A line for every main sampler that both folders have the files of; printed as they come.
    `words` are further arguments of training.table."""
    rows = [
        row
        for row in all_rows(shipped, CFG)
        if row.is_main and not missing_files(row, source) and not missing_files(row, shipped)
    ]
    workers, lines = share_threads(device), []
    benches = {}
    with tempfile.TemporaryDirectory() as place:
        for name, folder in (("source", source), ("shipped", shipped)):
            options = make_parser().parse_args(["--folder", str(folder), "--out", place, *words])
            options.workers = workers
            benches[name] = prepare(options, device, (prompts, 1))
        for row in rows:
            made = {
                name: run_row(bench, row, bench.questions[row.task])[0]
                for name, bench in benches.items()
            }
            distances = {
                name: bench.real.reference.distance(made[name].features_PSD.flatten(0, 1))
                for name, bench in benches.items()
            }
            lines.append(line_of(row, made, distances))
            print(as_row(lines[-1]), flush=True)
    return lines


def table_of_forms(lines: list[dict]) -> str:
    head = (
        f"| Sampler, {lines[0]['prompts']} prompts | fp16 | shipped | difference [95 %] "
        "| Fréchet, fp16 and shipped |"
    )
    return "\n".join([head, "|---|---|---|---|---|", *map(as_row, lines)])


def line_of(row: Row, made: dict[str, Made], distances: dict[str, float]) -> dict:
    scores = {name: one.scores["all"] for name, one in made.items()}
    paired = paired_interval(scores["shipped"], scores["source"]).scaled(100)
    return {
        "sampler": f"{row.task} {row.name}",
        "prompts": made["source"].clips,
        "source": round(100 * float(scores["source"].mean()), 2),
        "shipped": round(100 * float(scores["shipped"].mean()), 2),
        "difference": [round(value, 2) for value in (paired.value, paired.low, paired.high)],
        "frechet": [round(distances[name], 2) for name in ("source", "shipped")],
    }


def as_row(line: dict) -> str:
    source, shipped = line["frechet"]
    return (
        f"| {line['sampler']} | {line['source']:.1f} | {line['shipped']:.1f} | "
        f"{Interval(*line['difference']).told('+')} | {source:.2f}, {shipped:.2f} |"
    )
