"""The table as numbers, as text and as two pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from lightx2v_core.datatypes import SamplerPlan

from .intervals import LEVEL, Interval, mean_interval, paired_interval
from .measures import FREE
from .plots import Point, draw_bars, draw_points
from .questions import RealClips
from .samplers import Row

NOTES = """
On {device}; {asked}; noises of each prompt: {seeds}, the same for every sampler. Attributes in
percent.
Intervals resample prompts; differences are paired. Fréchet: squared distance of Gaussians on judge
features, in deviations of rendered clips (floor: {floor}); comparable between rows of equally many
clips. Diversity: mean distance between seeds of a prompt in {free}, 1 being two renders of its
caption; a given first frame leaves little of that open. x first: against the first row of the task
on the same prompts."""


@dataclass(frozen=True, slots=True)
class About:
    """What holds for all rows."""

    device: str
    asked: str  # how many prompts of which world
    seeds: int


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """What one sampler made, clip by clip: P prompts, S seeds, D features."""

    scores: dict[str, Tensor]  # P S each, 0 to 1; NaN where nothing was asked
    features_PSD: Tensor
    first_frame_PS: Tensor | None
    seconds: float = 0.0  # of the denoiser, all clips
    plan: SamplerPlan | None = None

    @property
    def clips(self) -> int:
        return self.features_PSD.shape[0] * self.features_PSD.shape[1]

    def first(self, prompts: int) -> Made:
        """Of the first prompts; seconds in proportion."""
        share = prompts / self.features_PSD.shape[0]
        return Made(
            {name: values[:prompts] for name, values in self.scores.items()},
            self.features_PSD[:prompts],
            None if self.first_frame_PS is None else self.first_frame_PS[:prompts],
            self.seconds * share,
            self.plan,
        )


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table. Ratios are to the first row of the task on the same prompts."""

    task: str
    name: str
    plan: str
    clips: int
    attributes: dict[str, float]
    score: Interval
    difference: Interval | None
    frechet: float
    frechet_ratio: float
    diversity: float  # 1 is the world's own
    diversity_ratio: float
    denoiser_seconds: float
    milliseconds_a_clip: float
    speedup: float
    first_frame_psnr: float | None


def summarise(results: Sequence[tuple[Row, Made]], real: RealClips) -> list[Line]:
    """The first row of each task is what the others are compared with."""
    firsts: dict[str, Made] = {}
    lines = []
    for row, made in results:
        is_first = row.task not in firsts
        reference = firsts.setdefault(row.task, made).first(made.features_PSD.shape[0])
        lines.append(_line(row, made, None if is_first else reference, real))
    return lines


def _line(row: Row, made: Made, reference: Made | None, real: RealClips) -> Line:
    other = reference or made
    frechet, diversity = _frechet(made, real), _diversity(made, real)
    difference = None
    if reference is not None:
        difference = paired_interval(made.scores["all"], reference.scores["all"]).scaled(100)
    each, other_each = made.seconds / made.clips, other.seconds / other.clips
    psnr = None if made.first_frame_PS is None else float(made.first_frame_PS.mean())
    return Line(
        task=row.task,
        name=row.name,
        plan=made.plan.rule if made.plan else "",
        clips=made.clips,
        attributes={
            name: 100 * float(values.nanmean())
            for name, values in made.scores.items()
            if name != "all" and not values.isnan().all()
        },
        score=mean_interval(made.scores["all"]).scaled(100),
        difference=difference,
        frechet=frechet,
        frechet_ratio=_ratio(frechet, _frechet(other, real)),
        diversity=diversity,
        diversity_ratio=_ratio(diversity, _diversity(other, real)),
        denoiser_seconds=made.seconds,
        milliseconds_a_clip=1000 * each,
        speedup=_ratio(other_each, each),
        first_frame_psnr=psnr,
    )


def _frechet(made: Made, real: RealClips) -> float:
    return real.reference.distance(made.features_PSD.flatten(0, 1))


def _diversity(made: Made, real: RealClips) -> float:
    return _ratio(real.reference.spread(made.features_PSD), real.spread(len(made.features_PSD)))


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference else math.nan


def report(folder: Path, about: About, lines: Sequence[Line], floors: Mapping[str, float]) -> None:
    """table.md, table.json, scores.png and bars.png."""
    rows = [asdict(line) for line in lines]
    content = {**asdict(about), "frechet_floors": dict(floors), "rows": rows}
    # JSON has no NaN.
    text = json.dumps(_without_nan(content), indent=1, allow_nan=False)
    (folder / "table.json").write_text(text + "\n", "utf-8")
    (folder / "table.md").write_text(as_markdown(about, lines, floors), "utf-8")
    points = [
        Point(f"{line.task} {line.name}", line.milliseconds_a_clip, line.score) for line in lines
    ]
    draw_points(points, folder / "scores.png", "denoiser ms per clip", "attribute score")
    draw_bars(points, folder / "bars.png", "attribute score")


def _without_nan(value: object) -> object:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return value


def as_markdown(about: About, lines: Sequence[Line], floors: Mapping[str, float]) -> str:
    names = list(dict.fromkeys(name for line in lines for name in line.attributes))
    head = [
        "sampler",
        "clips",
        f"attribute score [{LEVEL:.0%}]",
        "minus first row",
        *names,
        "Fréchet (x first)",
        "diversity (x first)",
        "denoiser ms a clip (x faster)",
        "first frame dB",
    ]
    table = [head, ["---"] * len(head), *(_cells(line, names) for line in lines)]
    rows = ["| " + " | ".join(cells) + " |" for cells in table]
    floor = ", ".join(f"{value:.2f} {name}" for name, value in floors.items())
    notes = NOTES.format(**asdict(about), free=", ".join(FREE), floor=floor)
    return "\n".join(rows) + "\n" + notes + "\n"


def _cells(line: Line, names: Sequence[str]) -> list[str]:
    psnr = line.first_frame_psnr
    return [
        f"{line.task}: {line.name}",
        str(line.clips),
        line.score.told(),
        "first" if line.difference is None else line.difference.told("+"),
        *(_number(line.attributes.get(name, math.nan), 1) for name in names),
        f"{_number(line.frechet, 2)} ({_number(line.frechet_ratio, 2)})",
        f"{_number(line.diversity, 2)} ({_number(line.diversity_ratio, 2)})",
        f"{line.milliseconds_a_clip:.3g} ({line.speedup:.1f})",
        "" if psnr is None else f"{psnr:.1f}",
    ]


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"
