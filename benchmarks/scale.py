"""Cost of the denoiser against frames, resolution, batch and steps, beside what arithmetic asks.

    python -m benchmarks.scale --scheme fp8 --blocks 8 --out scale.jsonl --plot scale.png

A line for each point: seconds, tokens, counted operations, and `flop_line_seconds`, what the point
would take at the rate of 480p with 81 frames, so `ratio` above 1 is growth beyond the model's own.
The plot has one curve for each series over its operations, the FLOP line dashed. Random weights;
fewer `--blocks` keep the shape of the curves and are said in the lines. `--tiny` tries it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lightx2v_core.bench import forward_flops
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.device import select_device
from lightx2v_core.memory.plan import video_tokens

from .forward import GIB, load_ours
from .lines import Line, about, add_out, emit, median_seconds, peak_bytes, read_lines, reset_peak
from .peers import Forward
from .plot import curves, draw_curves
from .random_files import I2V_14B, TINY
from .random_models import random_inputs, random_weights

BASE = VideoSize(832, 480, 81)
FRAMES = (17, 33, 49, 65, 81, 121)
SIDES = ((480, 272), (640, 368), (832, 480), (960, 544), (1280, 720))
BATCHES = (1, 2, 4)
STEPS = (1, 2, 4, 8)
SHORT = 17  # frames where batch and steps are varied
SERIES = ("frames", "resolution", "batch", "steps")


@dataclass(frozen=True)
class Point:
    """One measurement."""

    series: str
    size: VideoSize
    batch: int = 1
    steps: int = 1


def points(base: VideoSize, series: Sequence[str]) -> list[Point]:
    """Those of each series around `base`."""
    sides = [
        VideoSize(base.width * w // BASE.width, base.height * h // BASE.height, base.frames)
        for w, h in SIDES
    ]
    short = replace(base, frames=min(SHORT, base.frames))
    every = {
        "frames": [Point("frames", replace(base, frames=count)) for count in FRAMES],
        "resolution": [Point("resolution", size.snapped()) for size in sides],
        "batch": [Point("batch", short, batch=count) for count in BATCHES],
        "steps": [Point("steps", short, steps=count) for count in STEPS],
    }
    return [point for name in series for point in every[name]]


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    emit(measure(options), options.out)
    if options.plot is not None:
        if options.out is None:
            raise SystemExit("--plot draws the lines of --out; give both")
        found = [line for line in read_lines(options.out) if line["case"] == "scale"]
        drawn = curves(found, "petaflop", "series", "flop_line_seconds")
        draw_curves(drawn, options.plot, "PFLOP (dashed: at the rate of 480p, 81 frames)")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--series", nargs="+", choices=SERIES, default=list(SERIES))
    add("--scheme", choices=("keep", "fp8", "int8"), default="fp8", help="keep: bf16")
    add("--attention", default="auto")
    add("--matmul", default="auto")
    add("--blocks", type=int, help="fewer than the model has")
    add("--repeats", type=int, default=3)
    add("--device", default="auto")
    add("--plot", type=Path, metavar="FILE.png")
    add("--tiny", action="store_true", help="a small model and small videos, to try the script")
    add_out(parser)
    return parser


@torch.inference_mode()
def measure(options: argparse.Namespace) -> Iterator[Line]:
    """A line for each point."""
    device = select_device(options.device)
    config = TINY if options.tiny else I2V_14B
    config = replace(config, num_layers=options.blocks or config.num_layers)
    base = VideoSize(64, 48, 81) if options.tiny else BASE
    load = (options.scheme, options.attention, options.matmul, device, config)
    forward = load_ours(*load, random_weights(config, device))

    def seconds_of(point: Point) -> float:
        inputs = random_inputs(config, point.size, device, point.batch)
        return median_seconds(
            lambda: [_step(forward, inputs, n) for n in range(point.steps)],
            device,
            options.repeats,
            1,
        )

    def flops_of(point: Point) -> int:
        return point.steps * forward_flops(config, video_tokens(point.size), point.batch)

    anchor = Point("anchor", base)
    rate = flops_of(anchor) / seconds_of(anchor)
    for point in points(base, options.series):
        reset_peak(device)
        seconds, line = seconds_of(point), flops_of(point) / rate
        size = point.size
        yield {
            "case": "scale",
            "series": point.series,
            "who": "ours",
            "setting": f"{options.scheme}-{options.attention}-{options.matmul}",
            "seconds": seconds,
            "flop_line_seconds": line,
            "ratio": seconds / line,
            "petaflop": flops_of(point) / 1e15,
            "peak_gib": round(peak_bytes(device) / GIB, 2),
            "size": [size.width, size.height, size.frames],
            "tokens": video_tokens(size),
            "batch": point.batch,
            "steps": point.steps,
            "blocks": config.num_layers,
            **about(device),
        }


def _step(forward: Forward, inputs: tuple[torch.Tensor, ...], number: int) -> torch.Tensor:
    """A forward at a time of its own, as every step of a video has."""
    x, timestep, *context = inputs
    return forward(x, timestep - number, *context)


if __name__ == "__main__":
    raise SystemExit(main())
