"""README's card guide: the table and the picture of what was measured under budgets.

    python -m benchmarks.card_guide benchmarks/results/memory.jsonl \\
        benchmarks/results/whole_run.jsonl --plot benchmarks/results/budgets.png

Of lines that `benchmarks.memory` (steps alone) and `benchmarks.whole_run` (prompt and picture to
frames) wrote, the last of each budget and kind. Prints the table in Markdown; `--readme` puts it
between README's two markers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from .lines import Line, read_lines
from .plot import COLORS, GRID, INK, MARGIN, WIDTH

PANEL = 300  # pixels of height
BEGIN, END = "<!-- card guide -->", "<!-- end of card guide -->"
NAMES = {"gguf-Q4_0": "GGUF Q4_0"}
ORDER = ("fp8", "int8", "gguf-Q4_0", "bf16")
HEAD = (
    "| Budget | Model | Most allocated | Blocks there | Page-locked | A step | To resident "
    "| Whole video: most allocated | Seconds |",
    "|---|---|---|---|---|---|---|---|---|",
)
NONE = ""
Run = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One budget of one kind of model: the last line of its steps, and of its whole videos."""

    name: str
    budget: float
    steps: Line | None
    whole: Line | None

    @property
    def cells(self) -> tuple[str, ...]:
        first = (f"{self.budget:g} GB", self.name)
        return (*first, *_step_cells(self.steps or self.whole), *_video_cells(self.whole))

    @property
    def ratio(self) -> float:
        return float(str((self.steps or self.whole or {})["ratio"]))

    @property
    def peak(self) -> float:
        """GB in steps and in whole videos."""
        lines = [line for line in (self.steps, self.whole) if line is not None]
        return max(_run(line)["peak_allocated"] for line in lines) / 1e9


def _run(line: Line) -> Run:
    run: Run = line["streamed"]  # pyright: ignore[reportAssignmentType]
    return run


def _step_cells(line: Line | None) -> tuple[str, ...]:
    assert line is not None, "a row has one of the two"
    run, ratio = _run(line), float(str(line["ratio"]))
    placed = run["line"] if "line" in run else run["placed"][-1]
    blocks = str(placed).partition("resident ")[2].partition(" ")[0].replace("/", " of ")
    differs = "" if line["equal"] else ", differs"
    return (
        f"{run['peak_allocated'] / 1e9:.1f} GB",
        blocks,
        f"{run['pinned'] / 1e9:.1f} GB",
        f"{run['seconds_per_step']:.2f} s",
        f"{ratio:.3f}x{differs}",
    )


def _video_cells(line: Line | None) -> tuple[str, ...]:
    if line is None:
        return (NONE, NONE)
    run = _run(line)
    return (f"{run['peak_allocated'] / 1e9:.1f} GB", f"{run['seconds']:.1f}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lines", type=Path, nargs="+", metavar="FILE.jsonl")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--readme", type=Path, metavar="README.md")
    options = parser.parse_args(arguments)
    rows = read_rows(chain.from_iterable(map(read_lines, options.lines)))
    print(table(rows))
    if options.plot:
        draw(rows, options.plot)
    if options.readme:
        text = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(within(text, table(rows)), encoding="utf-8")
    return 0


def read_rows(lines: Iterable[Line]) -> list[Row]:
    """By model, then by budget."""
    found: dict[tuple[str, float], dict[str, Line]] = {}
    for line in lines:
        is_whole = line.get("case") == "whole_run" and line.get("settled", True)
        if (line.get("case") == "memory" or is_whole) and not line.get("ram_gb"):
            key = (_name(line), float(str(line["budget_gb"])))
            found.setdefault(key, {})[str(line["case"])] = line
    rows = [
        Row(name, budget, kinds.get("memory"), kinds.get("whole_run"))
        for (name, budget), kinds in found.items()
    ]
    return sorted(rows, key=lambda row: (_place(row.name), row.budget))


def _name(line: Line) -> str:
    name = NAMES.get(str(line["scheme"]), str(line["scheme"]))
    width, height, _ = line["size"]  # pyright: ignore[reportGeneralTypeIssues]
    experts = ", two experts" if line.get("experts") == 2 else ""
    return name + experts + ("" if (width, height) == (832, 480) else f", {width}x{height}")


def _place(name: str) -> tuple[int, str]:
    scheme = next((s for s in ORDER if name.startswith(NAMES.get(s, s))), "")
    return (ORDER.index(scheme) if scheme else len(ORDER), name)


def table(rows: Sequence[Row]) -> str:
    return "\n".join([*HEAD, *(f"| {' | '.join(row.cells)} |" for row in rows)])


def within(text: str, made: str) -> str:
    """`text` with `made` between its markers."""
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise SystemExit(f"there is no {BEGIN} and {END} to write between")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Above the time of a step to resident, below the most allocated with the budget dashed."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (WIDTH, 2 * PANEL + MARGIN), "white")
    pen = ImageDraw.Draw(picture)
    names = list(dict.fromkeys(row.name for row in rows))
    budgets = sorted({row.budget for row in rows})
    most = max(1.12, *(row.ratio + 0.02 for row in rows))
    least = min(0.96, *(row.ratio - 0.02 for row in rows))
    above = _Panel(pen, MARGIN // 2, (budgets[0], budgets[-1]), (least, most))
    below = _Panel(pen, MARGIN // 2 + PANEL, (budgets[0], budgets[-1]), (0.0, budgets[-1]))
    above.title("a step under the budget / a step with everything resident, same run")
    below.title("most allocated, GB (dashed: the budget)")
    for ratio in (1.0, 1.05, 1.1):
        above.level(ratio, f"{ratio:.2f}x")
    for budget in budgets:
        above.upright(budget)
        below.upright(budget)
        below.level(budget, f"{budget:g}")
    below.dashed(budgets)
    for name, color in zip(names, COLORS * len(names), strict=False):
        own = [row for row in rows if row.name == name]
        above.curve([(row.budget, row.ratio) for row in own], color)
        below.curve([(row.budget, row.peak) for row in own], color)
    for index, (name, color) in enumerate(zip(names, COLORS * len(names), strict=False)):
        pen.text((WIDTH - 3 * MARGIN + 40, MARGIN + 18 * index), name, fill=color)
    pen.text((WIDTH // 2 - 130, 2 * PANEL + MARGIN // 2), "budget of card memory, GB", fill=INK)
    picture.save(path)


class _Panel:
    """Axes of one half: budgets to the right, both axes linear."""

    def __init__(
        self,
        pen: Any,  # noqa: ANN401 - an ImageDraw, imported where it is needed
        top: int,
        across: tuple[float, float],
        up: tuple[float, float],
    ) -> None:
        self._pen, self._top, self._across, self._up = pen, top, across, up

    def place(self, x: float, y: float) -> tuple[float, float]:
        left, right = self._across
        low, high = self._up
        width, height = WIDTH - 4 * MARGIN, PANEL - MARGIN
        return (
            MARGIN + (x - left) / max(right - left, 1e-9) * width,
            self._top + 30 + (high - y) / (high - low) * height,
        )

    def title(self, text: str) -> None:
        self._pen.text((MARGIN, self._top), text, fill=INK)

    def level(self, y: float, text: str) -> None:
        start, end = self.place(self._across[0], y), self.place(self._across[1], y)
        self._pen.line((*start, *end), fill=GRID)
        self._pen.text((start[0] - 45, start[1] - 6), text, fill=INK)

    def upright(self, x: float) -> None:
        start, end = self.place(x, self._up[0]), self.place(x, self._up[1])
        self._pen.line((*start, *end), fill=GRID)
        self._pen.text((start[0] - 6, start[1] + 4), f"{x:g}", fill=INK)

    def dashed(self, budgets: Sequence[float]) -> None:
        (x1, y1), (x2, y2) = (self.place(b, b) for b in (budgets[0], budgets[-1]))
        for part in range(0, 60, 2):
            a, b = part / 60, (part + 1) / 60
            ends = (x1 + (x2 - x1) * a, y1 + (y2 - y1) * a, x1 + (x2 - x1) * b, y1 + (y2 - y1) * b)
            self._pen.line(ends, fill=INK)

    def curve(self, points: Sequence[tuple[float, float]], color: str) -> None:
        spots = [self.place(x, y) for x, y in points]
        self._pen.line(spots, fill=color, width=2)
        for x, y in spots:
            self._pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=color)


if __name__ == "__main__":
    raise SystemExit(main())
