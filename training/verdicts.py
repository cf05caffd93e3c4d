"""What each misuse costs: paired differences to the model as trained, in all three measures.

Score in points, Fréchet distance and diversity as differences; 95 % intervals from resampling
prompts with all their seeds (percentile bootstrap, https://doi.org/10.1214/aos/1176344552). A
resampled Fréchet distance is biased upwards, by as much in both rows of a pair.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Generator

from .intervals import LEVEL, SEED, Interval
from .measures import Reference
from .misuse import warning_of
from .questions import RealClips
from .reporting import Made
from .samplers import Row

RESAMPLES = 1000
MEASURES = ("score", "Fréchet distance", "diversity")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Differences of one row to the first. `worse` names the measures whose interval excludes
    zero on the bad side: a lower score, a larger distance, a lower diversity."""

    warning: str
    name: str
    clips: int
    score: Interval
    frechet: Interval
    diversity: Interval
    worse: tuple[str, ...]


def compare(row: Row, made: Made, trained: Made, reference: Reference) -> Verdict:
    def score(picks: torch.Tensor, of: Made) -> float:
        return 100 * float(of.scores["all"][picks].double().mean())

    def frechet(picks: torch.Tensor, of: Made) -> float:
        return reference.distance(of.features_PSD[picks].flatten(0, 1))

    def diversity(picks: torch.Tensor, of: Made) -> float:
        return reference.spread(of.features_PSD[picks])

    prompts = made.features_PSD.shape[0]
    intervals = [_paired(f, prompts, made, trained) for f in (score, frechet, diversity)]
    bad = (intervals[0].high < 0, intervals[1].low > 0, intervals[2].high < 0)
    worse = tuple(name for name, is_bad in zip(MEASURES, bad, strict=True) if is_bad)
    return Verdict(warning_of(row.name), row.name, made.clips, *intervals, worse)


def _paired(
    measure: Callable[[torch.Tensor, Made], float], prompts: int, made: Made, trained: Made
) -> Interval:
    rng = Generator().manual_seed(SEED)
    everything = torch.arange(prompts)
    value = measure(everything, made) - measure(everything, trained)
    draws = []
    for _ in range(RESAMPLES):
        picks = torch.randint(prompts, (prompts,), generator=rng)
        draws.append(measure(picks, made) - measure(picks, trained))
    tail = (1 - LEVEL) / 2
    bounds = torch.tensor((tail, 1 - tail), dtype=torch.float64)
    low, high = torch.quantile(torch.tensor(draws, dtype=torch.float64), bounds).tolist()
    return Interval(value, low, high)


def write_verdicts(
    folder: Path, device: str, results: Sequence[tuple[Row, Made]], real: RealClips
) -> None:
    """misuse.json and misuse.md."""
    (_, trained), *others = results
    verdicts = [compare(row, made, trained, real.reference) for row, made in others]
    content = {
        "device": device,
        "as_trained": {
            "clips": trained.clips,
            "score": 100 * float(trained.scores["all"].double().mean()),
            "frechet": real.reference.distance(trained.features_PSD.flatten(0, 1)),
            "diversity": real.reference.spread(trained.features_PSD),
        },
        "rows": [asdict(verdict) for verdict in verdicts],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / "misuse.json").write_text(text + "\n", "utf-8")
    head = ["setting", "clips", "score", "Fréchet distance", "diversity", "worse in"]
    rows = [[v.name, str(v.clips), *_cells(v), ", ".join(v.worse) or "–"] for v in verdicts]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    (folder / "misuse.md").write_text("\n".join(lines) + "\n", "utf-8")


def _cells(verdict: Verdict) -> list[str]:
    digits = ((verdict.score, 1), (verdict.frechet, 2), (verdict.diversity, 3))
    return [
        f"{i.value:+.{d}f} [{i.low:+.{d}f}, {i.high:+.{d}f}]" if math.isfinite(i.value) else "–"
        for i, d in digits
    ]
