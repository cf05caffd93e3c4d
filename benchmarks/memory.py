"""A 14B image-to-video transformer under memory budgets, beside the same one fully resident.

    python -m benchmarks.memory --scheme fp8 --budget-gb 8 12 --height 480 --width 832 \\
        --frames 81 --out memory.jsonl

Writes a file of the real shapes with random weights (or takes `--file`), runs a few steps with
everything resident and then under each budget, in one process, and appends a JSON line for each
budget. `benchmarks.whole_run` does the same for whole videos. `--tiny` tries it, on a CPU too.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lightx2v_core.assemble import LoadedTransformer, load_transformer
from lightx2v_core.checkpoint.convert import SCHEMES
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.device import select_device
from lightx2v_core.memory.plan import (
    Job,
    card_room,
    forward_bytes,
    place_within,
    video_tokens,
)
from lightx2v_core.presets import PRESETS, make_plan
from lightx2v_core.sampling.loop import make_noise, sample

from .lines import Line, about, add_out, cap, emit, peak_bytes, reset_peak, wait_for
from .random_files import I2V_14B, TINY, write_random
from .random_models import random_inputs

SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Run:
    """What one pass of a few steps took."""

    seconds_per_step: float  # without the first, which reads and page-locks
    first_step_seconds: float
    peak_allocated: int
    peak_reserved: int  # what PyTorch's allocator kept, gaps included
    ram_peak: int  # see `ram_held`
    pinned: int
    line: str


@dataclass(frozen=True)
class Subject:
    """A model, the size of its video, and how it is run."""

    loaded: LoadedTransformer
    size: VideoSize
    device: torch.device
    steps: int
    capped: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device = select_device(options.device)
    if options.steps < 2:
        raise SystemExit(f"--steps {options.steps} leaves none to time: the first one loads")
    size = VideoSize(options.width, options.height, options.frames)
    with ExitStack() as stack:
        path, config = options.file, TINY if options.tiny else I2V_14B
        if path is None:
            made = tempfile.TemporaryDirectory(dir=options.folder, prefix="lightx2v-")
            path = write_random(Path(stack.enter_context(made)), options.scheme, config)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        loaded = load_transformer(path, dtype, device=device)
        subject = Subject(loaded, size, device, options.steps, options.cap)
        # Resident first, so that each budget has its line as soon as it has run.
        resident = measure(subject, None)
        return max(compare(options, subject, resident, budget) for budget in options.budget_gb)


def compare(
    options: argparse.Namespace,
    subject: Subject,
    resident: tuple[Run, Tensor],
    budget_gb: float,
) -> int:
    """The line of one budget, and 0 where it was kept and nothing changed."""
    size, (whole, expected) = subject.size, resident
    run, latent = measure(subject, budget_gb * 1e9)
    line: Line = {
        "case": "memory",
        "scheme": options.scheme,
        "size": [size.width, size.height, size.frames],
        "budget_gb": budget_gb,
        "steps": subject.steps,
        "capped": subject.capped,
        "streamed": asdict(run),
        "resident": asdict(whole),
        "ratio": run.seconds_per_step / whole.seconds_per_step,
        "within_budget": run.peak_allocated <= budget_gb * 1e9,
        "equal": bool(torch.equal(latent, expected)),
    }
    emit([line | about(subject.device)], options.out)
    return 0 if line["equal"] and line["within_budget"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", choices=("bf16", *SCHEMES), default="fp8")
    parser.add_argument("--budget-gb", type=float, nargs="+", default=[8.0])
    parser.add_argument("--steps", type=int, default=4, help="fewer take less time; at least 2")
    parser.add_argument(
        "--cap",
        action="store_true",
        help="PyTorch gets no more of the card than the budget, gaps included",
    )
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--file", type=Path, help="of this scheme, in place of a random one")
    parser.add_argument("--folder", type=Path, help="where the model file is written for a while")
    add_out(parser)
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    return parser


def measure(subject: Subject, limit: float | None) -> tuple[Run, Tensor]:
    """The steps under `limit` bytes (None: everything resident), and the latent they lead to."""
    device, engine = subject.device, subject.loaded.residency
    reset_peak(device)
    cap(device, limit if subject.capped else None)
    with AnonymousMemory() as memory:
        activations = forward_bytes(subject.loaded.model, video_tokens(subject.size), device)
        room = None if limit is None else card_room(device, limit)
        place_within(engine, device, room, Job("transformer", activations))
        latent, times = _sample(subject)
        line, pinned = engine.describe(), engine.pinned_bytes
        reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
        engine.release()
    cap(device, None)
    rest = times[1:]
    seconds, peak = sum(rest) / len(rest), peak_bytes(device)
    run = Run(seconds, times[0], peak, reserved, memory.peak, pinned, line)
    return run, latent.cpu()


def _sample(subject: Subject) -> tuple[Tensor, list[float]]:
    plan, device = make_plan(PRESETS["distill-4step"]), subject.device
    plan = replace(plan, sigmas=plan.sigmas[: subject.steps + 1])
    config = subject.loaded.model.config
    whole, _, text, clip = random_inputs(config, subject.size, device)
    condition = whole[:, config.out_dim :]
    times: list[float] = []

    def denoise(x: Tensor, sigma: float, _step: int) -> Tensor:
        started = time.perf_counter()
        entry = torch.cat((x, condition), dim=1)
        timestep = torch.tensor([1000.0 * sigma], device=device)
        velocity = subject.loaded.model(entry, timestep, text, clip)
        wait_for(device)
        times.append(time.perf_counter() - started)
        return velocity

    generator = torch.Generator().manual_seed(3)
    noise = make_noise(subject.size.latent_shape(), generator).to(device)
    return sample(denoise, noise, plan, generator), times


class AnonymousMemory:
    """The most RAM that this process held while it is open, in bytes, looked at every 50 ms; 0 off
    Linux. See `ram_held`."""

    def __init__(self) -> None:
        self.peak = self.samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AnonymousMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak, self.samples = max(self.peak, ram_held()), self.samples + 1
            if self._stop.wait(SAMPLE_SECONDS):
                return


def ram_held() -> int:
    """RssAnon, which holds our page-locked weights (they are anonymous memory that CUDA locks),
    and what PyTorch's own page-locked allocator has from the driver, which need not be in it."""
    stats = getattr(torch.cuda, "host_memory_stats", dict)()
    return rss_anon() + int(stats.get("allocated_bytes.current", 0))


def rss_anon() -> int:
    """Anonymous RAM of this process now, in bytes; 0 off Linux."""
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found.group(1)) * 1024 if found else 0


if __name__ == "__main__":
    sys.exit(main())
