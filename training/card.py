"""Tables of the demo's card, from what was measured, between the comments that name them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .intervals import Interval

# Attributes of a table of scores, in its order.
ATTRIBUTES = {
    "color": "colour",
    "shape": "shape",
    "direction": "direction",
    "texture": "texture",
    "count": "number of objects",
    "order": "who is in front",
}
PICTURE = "first frame kept (PSNR)"
SHIPPED = "student, 4 steps"
SAMPLERS = {
    "teacher, 48 steps": "teacher, 48 steps, guided",
    "teacher, 4 steps": "teacher, 4 steps, no CFG",
    SHIPPED: "shipped, 4 steps, no CFG",
}
DISTILLED = "distilled, 4 steps"


def write_card(folder: Path, name: str, table: str) -> None:
    """Print `table`, and put it into the card between the comments that name it."""
    print(table)
    card = folder / "README.md"
    text = card.read_text("utf-8") if card.is_file() else ""
    start, end = f"<!-- {name}: training.ship -->\n", f"<!-- end of {name} -->"
    before, found, rest = text.partition(start)
    if found:
        _, found, after = rest.partition(end)
        assert found, f"{card} lacks the comment that ends {name}"
        card.write_text(f"{before}{start}\n{table}\n\n{end}{after}", "utf-8")


def table_of_scores(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """What the stage `package` measured, percent right of each attribute that was asked."""
    rows = [
        (f"{task.upper()} {title}", metrics[f"{task} {sampler}"], sampler == SHIPPED)
        for task in ("t2v", "i2v")
        for sampler, title in SAMPLERS.items()
        if f"{task} {sampler}" in metrics
    ]
    names = [name for name in ATTRIBUTES if any(name in scores for _, scores, _ in rows)]
    lines = [as_row(["Sampler", *(ATTRIBUTES[name] for name in names), PICTURE])]
    lines.append("|" + "---|" * (len(names) + 2))
    for title, scores, is_shipped in rows:
        cells = [title, *(f"{scores[name]:.0f}" if name in scores else "" for name in names)]
        if "first_frame" in scores:
            cells.append(f"{scores['first_frame']:.0f} ({scores['first_frame_psnr']:.1f} dB)")
        bold = [f"**{cell}**" if cell and is_shipped else cell for cell in cells]
        lines.append(as_row([*bold, *[""] * (len(names) + 2 - len(bold))]))
    return "\n".join(lines)


def tables_of_samplers(path: Path) -> dict[str, str]:
    """`samplers`, the main rows of a table.json of training.table, and `settings`, those of the
    distilled text-to-video model; each held against the first of its task."""
    rows = json.loads(path.read_text("utf-8"))["rows"]
    settings = [row for row in rows if row["name"].startswith("distilled, ")]
    main = [row for row in rows if row not in settings or row["name"] == DISTILLED]
    head = ["Sampler", "score", "against the first row", "Fréchet", "diversity", "ms", "faster"]
    lines = [as_row(head), "|" + "---|" * len(head)]
    for row in main:
        times = f"{row['milliseconds_a_clip']:.3g}", f"{row['speedup']:.3g}"
        lines.append(as_row([f"{row['task'].upper()} {row['name']}", *measured(row), *times]))
    head = ["Setting", "score", "against the base in 50 steps", "Fréchet", "diversity"]
    others = [as_row(head), "|" + "---|" * len(head)]
    for row in settings:
        name = row["name"].removeprefix("distilled, ").removesuffix(", 4 steps")
        title = "as trained" if row["name"] == DISTILLED else name
        if row["task"] == "t2v":
            others.append(as_row([title, *measured(row)]))
    return {"samplers": "\n".join(lines), "settings": "\n".join(others)}


def measured(row: Mapping) -> list[str]:
    """Score, difference, and the ratios to the first row; nothing where there is nothing."""
    difference = row["difference"]
    told = [Interval(**row["score"]).told()]
    told.append("" if difference is None else Interval(**difference).told("+"))
    for name in ("frechet_ratio", "diversity"):
        told.append("" if row[name] is None else f"{row[name]:.2f}")
    return told


def as_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
