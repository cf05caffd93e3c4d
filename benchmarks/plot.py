"""A picture of benchmark lines: a bar for each, or a curve of seconds over one of their numbers.

    python -m benchmarks.plot lines.jsonl bars.png
    python -m benchmarks.plot scale.jsonl scale.png --over tokens --by series --floor floor_seconds

Bars are seconds, ours dark and others light, with the ratio to the peer behind them. Curves are on
log axes, one for each value of `--by`; `--floor` draws a line's own floor (what the arithmetic
alone would take) dashed under it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .lines import Line, read_lines
from .regress import describe

WIDTH, HEIGHT, MARGIN = 900, 560, 70
BAR, LABELS = 24, 400  # pixels of a bar with its gap, and left of all bars
INK, GRID, OURS, THEIRS = "#202020", "#d8d8d8", "#2060c0", "#b8b8b8"
COLORS = ("#2060c0", "#c06020", "#208040", "#8040a0", "#a02040", "#607080")


@dataclass(frozen=True, slots=True)
class Curve:
    """Points in order of x, and the floor below each (None: none)."""

    name: str
    points: list[tuple[float, float, float | None]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lines", type=Path)
    parser.add_argument("picture", type=Path, metavar="FILE.png")
    parser.add_argument("--over", help="a number in every line: curves in place of bars")
    parser.add_argument("--by", default="case", help="what tells curves apart")
    parser.add_argument("--floor", help="the name of a number to draw below each curve")
    options = parser.parse_args(arguments)
    lines = [line for line in read_lines(options.lines) if "seconds" in line]
    if not lines:
        raise SystemExit(f"{options.lines} holds no line with seconds")
    if options.over:
        draw_curves(
            curves(lines, options.over, options.by, options.floor), options.picture, options.over
        )
    else:
        draw_bars(lines, options.picture)
    print(options.picture)
    return 0


def draw_bars(lines: Sequence[Line], path: Path) -> None:
    """Seconds of each line from zero on."""
    from PIL import Image, ImageDraw

    height = 2 * MARGIN + BAR * len(lines)
    picture = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(picture)
    longest = max(_number(line, "seconds") for line in lines)
    scale = (WIDTH - LABELS - 2 * MARGIN) / longest
    for index, line in enumerate(lines):
        top, seconds = MARGIN + index * BAR, _number(line, "seconds")
        color = THEIRS if line.get("who", "ours") != "ours" else OURS
        pen.text((10, top + 4), describe(line).split(" on ")[0][:64], fill=INK)
        pen.rectangle((LABELS, top + 2, LABELS + seconds * scale, top + BAR - 4), fill=color)
        ratio = f", {_number(line, 'ratio'):.2f} x {line['peer']}" if "peer" in line else ""
        text = f"{seconds:.3g} s{ratio}"
        fits = seconds * scale > pen.textlength(text) + 12
        place = LABELS + 6 if fits else LABELS + seconds * scale + 6
        pen.text((place, top + 5), text, fill="white" if fits and color == OURS else INK)
    cards = sorted({str(line.get("card")) for line in lines})
    pen.text((10, height - MARGIN // 2), f"seconds, {', '.join(cards)}", fill=INK)
    picture.save(path)


def curves(lines: Sequence[Line], over: str, by: str, floor: str | None) -> list[Curve]:
    """One for each value of `by`, in order of first appearance."""
    found: dict[str, list[tuple[float, float, float | None]]] = {}
    for line in lines:
        below = _number(line, floor) if floor and floor in line else None
        point = (_number(line, over), _number(line, "seconds"), below)
        found.setdefault(str(line.get(by, "")), []).append(point)
    return [Curve(name, sorted(points)) for name, points in found.items()]


def draw_curves(drawn: Sequence[Curve], path: Path, x_name: str) -> None:
    """Seconds over `x_name`, both on log axes."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    points = [point for curve in drawn for point in curve.points]
    xs = [x for x, _, _ in points]
    ys = [y for _, y, below in points for y in (y, below) if y]
    left, right, bottom, top = (math.log10(end) for end in (min(xs), max(xs), min(ys), max(ys)))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - left) / max(right - left, 1e-9)
        up = (math.log10(y) - bottom) / max(top - bottom, 1e-9)
        return (
            MARGIN + across * (WIDTH - 4 * MARGIN),
            HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN),
        )

    for tick in _ticks(left, right):
        x, y = place(tick, 10**bottom)
        pen.line((x, MARGIN, x, y), fill=GRID)
        pen.text((x - 10, y + 6), f"{tick:g}", fill=INK)
    for tick in _ticks(bottom, top):
        x, y = place(10**left, tick)
        pen.line((x, y, WIDTH - 3 * MARGIN, y), fill=GRID)
        pen.text((x - 50, y - 6), f"{tick:g} s", fill=INK)
    pen.text((WIDTH // 2 - 80, HEIGHT - 30), x_name, fill=INK)
    for curve, color in zip(drawn, COLORS * len(drawn), strict=False):
        _draw_curve(pen, curve, color, place)
    picture.save(path)


def _draw_curve(pen: Any, curve: Curve, color: str, place: Any) -> None:  # noqa: ANN401
    spots = [place(x, y) for x, y, _ in curve.points]
    pen.line(spots, fill=color, width=2)
    for x, y in spots:
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=color)
    pen.text((spots[-1][0] + 8, spots[-1][1] - 6), curve.name, fill=color)
    floors = [place(x, below) for x, _, below in curve.points if below]
    for (x1, y1), (x2, y2) in pairwise(floors):
        for part in range(0, 20, 2):
            a, b = part / 20, (part + 1) / 20
            ends = (x1 + (x2 - x1) * a, y1 + (y2 - y1) * a, x1 + (x2 - x1) * b, y1 + (y2 - y1) * b)
            pen.line(ends, fill=color)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two logarithms."""
    every = (
        step * 10.0**power
        for power in range(math.floor(low), math.ceil(high) + 1)
        for step in (1, 2, 5)
    )
    return [tick for tick in every if low - 1e-9 <= math.log10(tick) <= high + 1e-9]


def _number(line: Line, name: str) -> float:
    return float(str(line[name]))


if __name__ == "__main__":
    raise SystemExit(main())
