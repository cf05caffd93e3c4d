"""Two plain pictures of scores with their intervals, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .intervals import Interval

WIDTH, HEIGHT, MARGIN = 900, 520, 60
BAR, LABELS = 22, 300  # pixels of a bar with its gap, and left of all bars
COLORS = {"t2v": "#2060c0", "i2v": "#c06020"}
INK, GRID = "#202020", "#d8d8d8"


@dataclass(frozen=True, slots=True)
class Point:
    """A labelled score in percent; labels begin with the task."""

    label: str
    x: float
    score: Interval

    @property
    def color(self) -> str:
        return COLORS.get(self.label.split(" ")[0], INK)


def draw_points(points: Sequence[Point], path: Path, x_name: str, y_name: str) -> None:
    """Scores over x on a log scale."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    logs = [math.log10(max(point.x, 1e-6)) for point in points]
    left, right = math.floor(min(logs)), math.ceil(max(logs) + 1e-9)
    bottom = _floor(points)

    def place(x_log: float, score: float) -> tuple[float, float]:
        across = (x_log - left) / max(right - left, 1)
        up = (score - bottom) / (100 - bottom)
        # Labels stand to the right of their points.
        return MARGIN + across * (WIDTH - 4 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    for power in range(left, right + 1):
        x, _ = place(power, bottom)
        pen.line((x, MARGIN, x, HEIGHT - MARGIN), fill=GRID)
        pen.text((x - 8, HEIGHT - MARGIN + 6), f"{10.0**power:g}", fill=INK)
    for score in _ticks(bottom):
        _, y = place(left, score)
        pen.line((MARGIN, y, WIDTH - 3 * MARGIN, y), fill=GRID)
        pen.text((MARGIN - 30, y - 6), f"{score:g}", fill=INK)
    pen.text((WIDTH // 2 - 60, HEIGHT - 24), x_name, fill=INK)
    pen.text((MARGIN, MARGIN - 24), y_name, fill=INK)
    taken: list[tuple[float, float]] = []
    for x_log, point in sorted(
        zip(logs, points, strict=True), key=lambda pair: -pair[1].score.value
    ):
        x, y = place(x_log, point.score.value)
        ends = [place(x_log, bound)[1] for bound in (point.score.low, point.score.high)]
        pen.line((x, ends[0], x, ends[1]), fill=point.color)
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=point.color)
        label_y = _free_height(x, y - 6, taken)
        pen.text((x + 8, label_y), point.label, fill=point.color)
    picture.save(path)


def _free_height(x: float, y: float, taken: list[tuple[float, float]]) -> float:
    """The nearest height below `y` at which no label near `x` stands yet."""
    while any(abs(x - other_x) < 200 and abs(y - other_y) < 11 for other_x, other_y in taken):
        y += 4
    taken.append((x, y))
    return y


def draw_bars(points: Sequence[Point], path: Path, name: str) -> None:
    """One bar for each score, its interval as a line."""
    from PIL import Image, ImageDraw

    height = 2 * MARGIN + BAR * len(points)
    picture = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(picture)
    bottom = _floor(points)

    def across(score: float) -> float:
        return LABELS + (score - bottom) / (100 - bottom) * (WIDTH - LABELS - MARGIN)

    for score in _ticks(bottom):
        x = across(score)
        pen.line((x, MARGIN, x, height - MARGIN), fill=GRID)
        pen.text((x - 8, height - MARGIN + 6), f"{score:g}", fill=INK)
    pen.text((LABELS, MARGIN - 24), name, fill=INK)
    for index, point in enumerate(points):
        top = MARGIN + index * BAR + 4
        middle = top + (BAR - 8) / 2
        pen.text((8, middle - 6), point.label, fill=INK)
        pen.rectangle((LABELS, top, across(point.score.value), top + BAR - 8), fill=point.color)
        pen.line((across(point.score.low), middle, across(point.score.high), middle), fill=INK)
    picture.save(path)


def _floor(points: Sequence[Point]) -> float:
    """A round number below every interval."""
    return min(max(0.0, 10 * math.floor(min(p.score.low for p in points) / 10)), 90.0)


def _ticks(bottom: float) -> list[float]:
    step = 5 if bottom >= 60 else 10
    return [float(score) for score in range(int(bottom), 101, step)]
