"""A 14B image-to-video transformer under a memory budget, beside the same one fully resident.

    python -m benchmarks.memory --scheme fp8 --budget-gb 8 12 --height 480 --width 832 \\
        --frames 81 --out memory.jsonl

Writes a file of the real shapes with random weights, runs four steps streamed under each budget and
once resident, in one process, and appends a JSON line for each budget. `--tiny` does the same with
a small model, on a CPU too.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lightx2v_core.assemble import LoadedTransformer, load_transformer
from lightx2v_core.checkpoint.convert import SCHEMES
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.memory.plan import (
    Job,
    card_room,
    forward_bytes,
    place_within,
    video_tokens,
)
from lightx2v_core.presets import PRESETS, make_plan
from lightx2v_core.sampling.loop import make_noise, sample
from lightx2v_core.wan.config import WanConfig

from .lines import Line, about, emit
from .random_files import I2V_14B, TINY, write_random

SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Run:
    """What one pass of four steps took."""

    seconds_per_step: float
    first_step_seconds: float
    peak_allocated: int
    rss_anon_peak: int
    pinned: int
    line: str


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    size = VideoSize(options.width, options.height, options.frames)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="lightx2v-") as folder:
        path = write_random(Path(folder), options.scheme, TINY if options.tiny else I2V_14B)
        # Resident first, so that each budget has its line as soon as it has run.
        resident, expected = measure(path, device, size, None, options.steps)
        return max(
            compare(options, (resident, expected), path, device, budget)
            for budget in options.budget_gb
        )


def compare(
    options: argparse.Namespace,
    resident: tuple[Run, Tensor],
    path: Path,
    device: torch.device,
    budget_gb: float,
) -> int:
    """The line of one budget, and 0 where it was kept and nothing changed."""
    size = VideoSize(options.width, options.height, options.frames)
    whole, expected = resident
    run, latent = measure(path, device, size, budget_gb * 1e9, options.steps)
    line: Line = {
        "case": "memory",
        "scheme": options.scheme,
        "size": [size.width, size.height, size.frames],
        "budget_gb": budget_gb,
        "streamed": asdict(run),
        "resident": asdict(whole),
        "ratio": run.seconds_per_step / whole.seconds_per_step,
        "within_budget": run.peak_allocated <= budget_gb * 1e9,
        "equal": bool(torch.equal(latent, expected)),
    }
    emit([line | about(device)], options.out)
    return 0 if line["equal"] and line["within_budget"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", choices=("bf16", *SCHEMES), default="fp8")
    parser.add_argument("--budget-gb", type=float, nargs="+", default=[8.0])
    parser.add_argument("--steps", type=int, default=4, help="fewer take less time; at least 2")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where the model file is written for a while")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    return parser


def measure(
    path: Path, device: torch.device, size: VideoSize, limit: float | None, steps: int = 4
) -> tuple[Run, Tensor]:
    """Four steps under `limit` bytes (None: everything resident), and the latent they lead to."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with AnonymousMemory() as memory:
        loaded = load_transformer(path, dtype, device=device)
        config, engine = loaded.model.config, loaded.residency
        inputs = _inputs(config, size, device)
        activations = forward_bytes(loaded.model, video_tokens(size), device)
        room = None if limit is None else card_room(device, limit)
        place_within(engine, device, room, Job("transformer", activations))
        latent, times = _sample(loaded, inputs, size, steps)
        line, pinned = engine.describe(), engine.pinned_bytes
        engine.release()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    rest = times[1:]
    run = Run(sum(rest) / len(rest), times[0], peak, memory.peak, pinned, line)
    return run, latent.cpu()


def _inputs(config: WanConfig, size: VideoSize, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    _, _, T, H, W = size.latent_shape()
    shapes = {
        "condition": (1, config.in_dim - config.out_dim, T, H, W),
        "text": (1, 512, config.text_dim),
        "clip": (1, config.clip_tokens, 1280),
    }
    made = {k: torch.randn(v, generator=generator) for k, v in shapes.items()}
    return {k: v.to(device) for k, v in made.items()}


def _sample(
    loaded: LoadedTransformer, inputs: dict[str, Tensor], size: VideoSize, steps: int
) -> tuple[Tensor, list[float]]:
    plan, device = make_plan(PRESETS["distill-4step"]), inputs["text"].device
    plan = replace(plan, sigmas=plan.sigmas[: steps + 1])
    times: list[float] = []

    def denoise(x: Tensor, sigma: float, _step: int) -> Tensor:
        started = time.perf_counter()
        entry = torch.cat((x, inputs["condition"]), dim=1)
        timestep = torch.tensor([1000.0 * sigma], device=device)
        velocity = loaded.model(entry, timestep, inputs["text"], inputs["clip"])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
        return velocity

    generator = torch.Generator().manual_seed(3)
    noise = make_noise(size.latent_shape(), generator).to(device)
    return sample(denoise, noise, plan, generator), times


class AnonymousMemory:
    """The most anonymous RAM of this process while it is open, in bytes; 0 off Linux.

    Page-locked weights are anonymous too, so the figure holds both.
    """

    def __init__(self) -> None:
        self.peak = 0
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
            self.peak = max(self.peak, rss_anon())
            if self._stop.wait(SAMPLE_SECONDS):
                return


def rss_anon() -> int:
    """Anonymous RAM of this process now, in bytes; 0 off Linux."""
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found.group(1)) * 1024 if found else 0


if __name__ == "__main__":
    sys.exit(main())
