"""What commands show while they run and after. Prints nothing itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .request import OnProgress, Result

STAGE_NAMES = {"text": "prompt", "image": "start image", "sampling": "sampling", "decode": "decode"}
# Of each stage, where it starts on the bar and its share, in percent.
SHARES = {"text": (0.0, 2.0), "image": (2.0, 8.0), "sampling": (10.0, 70.0), "decode": (80.0, 20.0)}


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """One bar over the stages; each stage has its share of the whole."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
    )
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("loading", total=100.0)

        def on_progress(stage: str, done: int, total: int) -> None:
            start, share = SHARES[stage]
            label = f"step {done}/{total}" if stage == "sampling" else STAGE_NAMES[stage]
            progress.update(task, completed=start + share * done / total, description=label)

        yield on_progress


def result_lines(result: Result, path: Path) -> list[str]:
    """Where the weights were, and what the video at `path` took."""
    stages = ", ".join(f"{STAGE_NAMES[k]} {v:.1f} s" for k, v in result.seconds.items())
    per_step = result.seconds["sampling"] / result.plan.steps
    peak = f", peak {result.peak_bytes / 1e9:.1f} GB" if result.peak_bytes else ""
    return [
        *result.memory,
        f"{path}: {len(result.frames)} frames; {stages}; {per_step:.2f} s/step{peak}",
    ]


def version() -> str:
    """The pack's version, which only pyproject.toml holds."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    return found.group(1) if found else "unknown"
