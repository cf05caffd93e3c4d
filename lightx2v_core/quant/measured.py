"""The fastest matmul for each shape, timed on the card at hand and remembered in a file.

The order of ops/matmul.py goes by what cards can do. Which of two rows that both run is faster
depends on the card, its drivers and the shape, so `measured` asks the card.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..device import Card
from ..errors import CapabilityError
from ..ops.matmul import ROWS, Choice, Weight
from .linear import QuantisedLinear

log = logging.getLogger(__name__)

FILE = "lightx2v_matmul.json"
TOKENS = 8192  # enough to fill a card; a tenth of a second for all rows of a shape
REPEATS = 5
CODES = {"float8_e4m3fn", "float8_e5m2", "int8"}
Seconds = dict[str, float]  # by row


def fastest(
    weight: Weight, card: Card, device: torch.device, dtype: torch.dtype, folder: Path | None
) -> Choice:
    """The row that took least time for `weight`; timed now unless `folder` holds its times.

    Times are kept by card, PyTorch, dtype, codes and shape; without `folder` they are not kept.
    Raises CapabilityError where nothing is timed: not on a CUDA card.
    """
    if card.kind != "cuda":
        raise CapabilityError(
            f"matmul 'measured' times kernels on a CUDA card and this is {card.kind}; use auto"
        )
    rows = [name for name, row in ROWS.items() if row.blocked_by(card, weight) is None]
    if len(rows) == 1 or weight.codes not in CODES:
        return Choice(rows[-1], "nothing else runs here")
    key = ", ".join(
        (
            torch.cuda.get_device_name(device),
            f"torch {torch.__version__}",
            str(dtype).removeprefix("torch."),
            f"{weight.codes} {weight.out_features} x {weight.in_features}",
        )
    )
    known = _read(folder)
    seconds = known.get(key, {})
    if seconds.keys() != set(rows):
        seconds = known[key] = time_rows(weight, rows, device, dtype)
        log.info("matmul measured: %s: %s", key, seconds)
        _write(folder, known)
    told = ", ".join(f"{name} {1e3 * s:.2f}" for name, s in seconds.items())
    why = f"ms for {TOKENS} tokens: {told}"
    return Choice(min(seconds, key=lambda name: seconds[name]), why)


@torch.inference_mode()
def time_rows(weight: Weight, rows: list[str], device: torch.device, dtype: torch.dtype) -> Seconds:
    """Median seconds of each row for TOKENS tokens, activations quantised within."""
    generator = torch.Generator(device).manual_seed(0)
    codes_dtype: torch.dtype = getattr(torch, weight.codes)
    linear = QuantisedLinear(weight.in_features, weight.out_features, codes_dtype, (1,), bias=False)
    shape = (weight.out_features, weight.in_features)
    # Codes of all sizes: what a product of small ones takes is less, at a card's power limit.
    codes = 30 * torch.randn(shape, generator=generator, device=device)
    linear.weight = codes.to(codes_dtype)
    linear.weight_scale = torch.ones(weight.out_features, 1, device=device)
    x = torch.randn(TOKENS, weight.in_features, generator=generator, device=device).to(dtype)
    seconds = {}
    for name in rows:
        linear.use(ROWS[name])
        seconds[name] = _median_seconds(lambda: linear(x))
    return seconds


def _median_seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[2:])


def _read(folder: Path | None) -> dict[str, Seconds]:
    """What the file holds; a file that cannot be read counts as none, and the log says so."""
    if folder is None or not (path := folder / FILE).exists():
        return {}
    try:
        known = json.loads(path.read_text("utf-8"))
        return {str(key): _seconds(times) for key, times in known.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s is ignored and made anew: %s", path, error)
        return {}


def _seconds(times: Mapping[str, float]) -> Seconds:
    seconds = {str(row): float(time) for row, time in times.items()}
    if not all(time > 0 for time in seconds.values()):
        raise ValueError(f"times that are not positive: {seconds}")
    return seconds


def _write(folder: Path | None, known: dict[str, Seconds]) -> None:
    """In one step, so that a second process never reads half a file."""
    if folder is None:
        return
    path = folder / FILE
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(known, indent=1, sort_keys=True), "utf-8")
        beside.replace(path)
    except OSError as error:
        log.warning("matmul times are not kept in %s: %s", path, error)
