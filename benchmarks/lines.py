"""What every benchmark shares: timing, the facts that each line carries, and writing lines."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

Line = dict[str, object]
WARM_UPS = 2


@torch.inference_mode()
def median_seconds(
    work: Callable[[], object], device: torch.device, repeats: int, warm_ups: int = WARM_UPS
) -> float:
    """Of `repeats` runs after `warm_ups`; on CUDA by events."""
    for _ in range(warm_ups):
        work()
    if device.type != "cuda":
        return statistics.median(_clock(work) for _ in range(repeats))
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def _clock(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float32."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def card_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def about(device: torch.device) -> Line:
    """Where and with what a line was measured."""
    return {"card": card_name(device), "torch": torch.__version__, "commit": commit()}


def commit() -> str:
    """What GIT_COMMIT says (a copy may not know), or of this checkout, or "unknown"."""
    return os.environ.get("GIT_COMMIT") or git_commit(Path(__file__).parent)


def git_commit(folder: Path) -> str:
    """Of the checkout that `folder` is in, or "unknown"."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def peak_bytes(device: torch.device) -> int:
    """The most that PyTorch had allocated since `reset_peak`; 0 off CUDA."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def allocated_bytes(device: torch.device) -> int:
    """What PyTorch has allocated now; 0 off CUDA."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far, and give cached memory back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def cap(device: torch.device, nbytes: float | None) -> None:
    """PyTorch may hold no more than this of the card, gaps included: as on a card of that size,
    cached memory is given back before anything fails. None lifts it."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_per_process_memory_fraction(min((nbytes or total) / total, 1.0), index)


def wait_for(device: torch.device) -> None:
    """Until everything queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append the lines here too")


def emit(lines: Iterable[Line], out: Path | None) -> None:
    """Print each line as it comes, and append it to `out`."""
    for line in lines:
        text = json.dumps(line)
        print(text, flush=True)
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(text + "\n")


def read_lines(path: Path) -> Iterator[Line]:
    """Of a JSON-lines file; empty lines are skipped."""
    for text in path.read_text(encoding="utf-8").splitlines():
        if text.strip():
            yield json.loads(text)
