"""Time budgets, the journal of losses and its curves, and averages of weights."""

from __future__ import annotations

import copy
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

CURVE_SIZE = (420, 240)


class Clock:
    """A stage's minutes. Training ends `reserve` seconds early, so that the stage can finish."""

    def __init__(self, minutes: float, reserve: float = 0.0) -> None:
        self.started = time.monotonic()
        self.seconds = max(60.0 * minutes - min(reserve, 12.0 * minutes), 0.01)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def fraction(self) -> float:
        """0 at the start, 1 when the time is up."""
        return min(self.elapsed / self.seconds, 1.0)

    @property
    def is_over(self) -> bool:
        return self.elapsed >= self.seconds


class Journal:
    """One JSON line per report, in `journal.jsonl`; some of them on the screen."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal.jsonl"
        self.started = time.monotonic()

    def note(self, stage: str, **values: float | int | str) -> None:
        """Write and print."""
        record = {"stage": stage, "at": round(time.monotonic() - self.started, 1), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        words = " ".join(f"{name} {_short(value)}" for name, value in values.items())
        print(f"[{record['at']:6.1f}] {stage}: {words}", flush=True)

    def draw(self, path: Path) -> None:
        """All loss curves as one picture, losses on a log scale over seconds."""
        curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
        if not self.path.is_file():
            return
        for line in self.path.read_text("utf-8").splitlines():
            record = json.loads(line)
            if record.get("loss", 0) > 0:
                curves[record["stage"]].append((record["at"], record["loss"]))
        if curves:
            draw_curves(curves, path)


def _short(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_curves(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """One panel per named list of (x, positive y)."""
    from PIL import Image, ImageDraw

    width, height = CURVE_SIZE
    picture = Image.new("RGB", (width, height * len(curves)), "white")
    pen = ImageDraw.Draw(picture)
    for row, (name, points) in enumerate(curves.items()):
        top = row * height
        xs, ys = [x for x, _ in points], [math.log(y) for _, y in points]
        (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))
        spans = (max(x1 - x0, 1e-9), max(y1 - y0, 1e-9))
        line = [
            (
                30 + (x - x0) / spans[0] * (width - 50),
                top + height - 30 - (y - y0) / spans[1] * (height - 60),
            )
            for x, y in zip(xs, ys, strict=True)
        ]
        pen.rectangle((30, top + 30, width - 20, top + height - 30), outline="grey")
        if len(line) > 1:
            pen.line(line, fill="blue", width=2)
        label = f"{name}: loss {math.exp(ys[0]):.4g} to {math.exp(ys[-1]):.4g}, {x1 - x0:.0f} s"
        pen.text((30, top + 10), label, fill="black")
    picture.save(path)


def cosine(fraction: float, step: int, warmup: int) -> float:
    """Share of the learning rate: a linear start by steps, a cosine end by time."""
    return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fraction)))


class Average:
    """An exponential moving average of a module's parameters, held in a copy of it."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay
        self._ours = list(self.module.parameters())
        self._theirs = list(module.parameters())
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Early averages forget faster, so that the random start does not linger."""
        self._updates += 1
        decay = min(self.decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self._ours, self._theirs, 1 - decay)


def release_memory(device: torch.device) -> None:
    """What the last stage cached is given back before the next begins."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_finite(value: Tensor) -> bool:
    return math.isfinite(float(value))
