"""From the start of a process to the first denoiser step, weights read from a disk that is cold.

    python -m benchmarks.cold_start --folder DIR --scheme fp8 --out cold_start.jsonl

Writes a file of the real I2V 14B shapes (16.7 GB in fp8), reads it raw without the system's cache
(several threads, O_DIRECT where the file system has it), then starts a process that loads it and
runs one step at `--size`, the file dropped from the cache again. The line holds the stages in
seconds since that process was started, `floor_seconds` (the file at the raw speed) and `ratio`,
the time to the first step over that floor. `--plain` adds a process that reads nothing ahead and
touches the mapping page after page, as version 0.1 did. `--tiny` tries it, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

STARTED = time.monotonic()  # before PyTorch is imported
DIRECT_PIECE = 16 * 2**20
DIRECT_THREADS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    if options.child is not None:
        print(json.dumps(load_and_step(options)))
        return 0
    from .lines import emit

    emit(measure(options), options.out)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, help="where the file is written for a while: the disk measured")
    add("--file", type=Path, help="keep the file under this name, or take the one that is there")
    add("--scheme", choices=("bf16", "fp8", "int8"), default="fp8")
    add("--size", default="480p", help="480p, 720p or WIDTHxHEIGHTxFRAMES")
    add("--blocks", type=int, help="fewer than the model has: a smaller file")
    add("--device", default="auto")
    add("--attention", default="auto")
    add("--plain", action="store_true", help="also without reading ahead or in parallel")
    add("--tiny", action="store_true", help="a small model, to try the script")
    add("--out", type=Path, metavar="FILE.jsonl", help="append the lines here too")
    add("--child", type=Path, help=argparse.SUPPRESS)
    add("--started", type=float, default=STARTED, help=argparse.SUPPRESS)
    return parser


def measure(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One line for each way of loading."""
    from lightx2v_core.device import select_device

    from .lines import about

    device = select_device(options.device)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="lightx2v-") as folder:
        path = options.file or Path(folder) / "wan2.1_i2v_random.safetensors"
        if not path.is_file():
            write_model(path, options)
        nbytes = path.stat().st_size
        is_direct, raw_seconds = read_raw(path)
        for plain in (False, True) if options.plain else (False,):
            drop_cache(path)
            stages = run_child(path, options, plain)
            yield {
                "case": "cold_start",
                "setting": "plain" if plain else "parallel",
                "seconds": stages["weights_there"],
                "ratio": stages["weights_there"] / raw_seconds,
                "floor_seconds": raw_seconds,
                "disk_gb_per_second": nbytes / raw_seconds / 1e9,
                "direct": is_direct,
                "file_bytes": nbytes,
                "scheme": options.scheme,
                "attention": options.attention,
                **stages,
                **about(device),
            }


def write_model(path: Path, options: argparse.Namespace) -> None:
    """Made where it will run, since a card draws numbers faster; then written and synced."""
    import torch

    from lightx2v_core.device import select_device

    from .random_files import I2V_14B, TINY
    from .random_models import quantised, random_weights, write_file

    device = select_device(options.device)
    config = TINY if options.tiny else I2V_14B
    config = replace(config, num_layers=options.blocks or config.num_layers)
    tensors = random_weights(config, device)
    if options.scheme != "bf16":
        tensors = quantised(tensors, options.scheme)
    write_file(tensors, path)
    tensors.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def drop_cache(path: Path) -> None:
    """Ask the system to forget the file's pages (Linux; they are clean, since it was synced)."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_raw(path: Path) -> tuple[bool, float]:
    """(whether the system's cache was passed by, seconds) for the whole file, by many threads."""
    drop_cache(path)
    nbytes = path.stat().st_size
    starts = list(range(0, nbytes, DIRECT_PIECE))
    flags = os.O_RDONLY | getattr(os, "O_DIRECT", 0)
    try:
        os.close(os.open(path, flags))
    except OSError:
        flags = os.O_RDONLY

    def read(mine: list[int]) -> None:
        memory = mmap.mmap(-1, DIRECT_PIECE)  # aligned to pages, as O_DIRECT needs
        descriptor = os.open(path, flags)
        try:
            for start in mine:
                os.preadv(descriptor, [memory], start)
        finally:
            os.close(descriptor)

    started = time.perf_counter()
    with ThreadPoolExecutor(DIRECT_THREADS) as pool:
        list(pool.map(read, [starts[i::DIRECT_THREADS] for i in range(DIRECT_THREADS)]))
    return flags != os.O_RDONLY, time.perf_counter() - started


def run_child(path: Path, options: argparse.Namespace, plain: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.cold_start", "--child", str(path)]
    command += ["--size", options.size, "--device", options.device]
    command += ["--attention", options.attention, *(["--plain"] if plain else [])]
    command += ["--started", str(time.monotonic())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the process that loads ended with:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def load_and_step(options: argparse.Namespace) -> dict[str, float]:
    """In a process of its own: what the command line does, with the seconds after each stage."""
    stages = {"python": time.monotonic() - options.started}

    def note(name: str) -> None:
        stages[name] = time.monotonic() - options.started

    from lightx2v_core.memory.readahead import read_ahead

    if not options.plain:
        read_ahead([options.child])
    import torch

    from lightx2v_core.assemble import load_transformer
    from lightx2v_core.device import select_device, select_dtype
    from lightx2v_core.memory import residency

    from .forward import read_size
    from .lines import wait_for
    from .random_models import random_inputs

    if options.plain:
        residency.to_device = lambda tensors, device: [tensor.to(device) for tensor in tensors]
    note("imported")
    device = select_device(options.device)
    if device.type == "cuda":
        torch.ones(1, device=device)
    note("device")
    loaded = load_transformer(options.child, select_dtype(device), options.attention, device)
    note("loaded")
    loaded.residency.place(device)
    wait_for(device)
    note("weights_there")
    with torch.inference_mode():
        loaded.model(*random_inputs(loaded.model.config, read_size(options.size), device))
    wait_for(device)
    note("first_step")
    return {name: round(seconds, 3) for name, seconds in stages.items()}


if __name__ == "__main__":
    raise SystemExit(main())
