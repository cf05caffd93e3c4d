"""What each misuse costs: paired differences to the model as trained, in all three measures.

Score in points, Fréchet distance and diversity as differences; 95 % intervals from resampling
prompts with all their seeds (percentile bootstrap, https://doi.org/10.1214/aos/1176344552). A
resampled Fréchet distance is biased upwards, by as much in both rows of a pair.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from .intervals import LEVEL, SEED, Interval
from .measures import Reference, symmetric_root
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


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """What of a row's clips the measures need, prompt by prompt, so that any weights of the P
    prompts give them at once; float64."""

    score_P: Tensor  # percent
    spread_P: Tensor
    features_PD: Tensor  # sums over the prompt's clips, standardised
    products_PDD: Tensor
    seeds: int

    @classmethod
    def of(cls, made: Made, reference: Reference) -> Sums:
        x = reference.standardised(made.features_PSD)
        spreads = [reference.spread(prompt[None]) for prompt in made.features_PSD]
        return cls(
            100 * made.scores["all"].double().mean(dim=1),
            torch.tensor(spreads, dtype=torch.float64),
            x.sum(dim=1),
            torch.einsum("psd,pse->pde", x, x),
            x.shape[1],
        )

    def measures(self, weights_RP: Tensor, reference: Reference) -> Tensor:
        """R x 3, in the order of MEASURES; weights say how often each prompt counts."""
        clips = self.seeds * weights_RP.sum(dim=1)
        means = (weights_RP @ torch.stack((self.score_P, self.spread_P), dim=1)).T
        score, spread = means / weights_RP.sum(dim=1)
        mean_RD = weights_RP @ self.features_PD / clips[:, None]
        second = (weights_RP @ self.products_PDD.flatten(1)).unflatten(
            1, self.products_PDD.shape[1:]
        )
        outer = torch.einsum("rd,re->rde", mean_RD, mean_RD)
        covariance = (second - clips[:, None, None] * outer) / (clips - 1)[:, None, None]
        real = torch.cov(reference.real_ND.T)
        root = symmetric_root(real)
        mixed = root @ covariance @ root
        roots = torch.linalg.eigvalsh((mixed + mixed.mT) / 2).clamp_min(0).sqrt().sum(dim=1)
        traces = covariance.diagonal(dim1=1, dim2=2).sum(dim=1) + real.trace()
        shift = (mean_RD - reference.real_ND.mean(dim=0)).square().sum(dim=1)
        frechet = (shift + traces - 2 * roots).clamp_min(0)
        return torch.stack((score, frechet, spread), dim=1)


def compare(row: Row, made: Sums, trained: Sums, clips: int, reference: Reference) -> Verdict:
    prompts = len(made.score_P)
    rng = Generator().manual_seed(SEED)
    picks = torch.randint(prompts, (RESAMPLES, prompts), generator=rng)
    drawn = torch.zeros(RESAMPLES, prompts, dtype=torch.float64)
    drawn.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
    once = torch.ones(1, prompts, dtype=torch.float64)
    value, draws = (
        made.measures(weights, reference) - trained.measures(weights, reference)
        for weights in (once, drawn)
    )
    tail = (1 - LEVEL) / 2
    bounds = torch.tensor((tail, 1 - tail), dtype=torch.float64)
    columns = torch.cat((value, torch.quantile(draws, bounds, dim=0))).T.tolist()
    intervals = [Interval(*column) for column in columns]
    bad = (intervals[0].high < 0, intervals[1].low > 0, intervals[2].high < 0)
    worse = tuple(name for name, is_bad in zip(MEASURES, bad, strict=True) if is_bad)
    return Verdict(warning_of(row.name), row.name, clips, *intervals, worse)


def write_verdicts(
    folder: Path, device: str, results: Sequence[tuple[Row, Made]], real: RealClips
) -> None:
    """misuse.json and misuse.md."""
    (_, trained), *others = results
    sums = Sums.of(trained, real.reference)
    verdicts = [
        compare(row, Sums.of(made, real.reference), sums, made.clips, real.reference)
        for row, made in others
    ]
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
        interval.told("+", places) if math.isfinite(interval.value) else "–"
        for interval, places in digits
    ]
