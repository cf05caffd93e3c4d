"""One forward of the 14B image-to-video denoiser, beside other programs' in the same run.

    python -m benchmarks.forward --tiers 16bit 8bit --peer comfyui=PATH --out forward.jsonl
    python -m benchmarks.forward --size 1280x720x81 --attention auto sdpa --matmul fp8-row int8
    python -m benchmarks.forward --peer lightx2v=PATH --peer diffusers --setting bf16-fa3 \\
        lightx2v:fp8-torchao-fa3-compile diffusers:bf16-cudnn
    python -m benchmarks.forward --tiers 8bit --profile

Random weights of the real shapes, made on the card from a seed, so that everyone multiplies the
same numbers. First a line for each setting of each peer (case `forward_peer`), then ours:
`forward_16bit` and `forward_8bit` with their ratio to the fastest 16-bit peer of this run,
`forward_8bit_vs_8bit` with the ratio to the fastest 8-bit one; `_720p` and other sizes are in the
case's name. `stock_ratio` leaves out peers that were given a package they do not ask for
(FlashAttention 3 through ComfyUI's hook). What failed says so in `blocked_by`.

The error is against the float32 forward of the same weights, of all blocks, on a clip of
`--error-size`: the whole one would take half a minute in float32. `--profile` adds a line with the
card's time by class of kernel. `--tiny` tries everything with a small model, on a CPU too.
"""

from __future__ import annotations

import argparse
import gc
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from lightx2v_core.assemble import load_transformer
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.device import select_device
from lightx2v_core.errors import LightX2VError
from lightx2v_core.memory.plan import video_tokens
from lightx2v_core.quant.quantise import KEEP, ON_LOAD
from lightx2v_core.wan.config import WanConfig

from .lines import (
    Line,
    about,
    add_out,
    allocated_bytes,
    emit,
    median_seconds,
    peak_bytes,
    relative_error,
    reset_peak,
    wait_for,
)
from .peers import PEERS, Contender, Forward, Weights, contenders
from .random_files import I2V_14B, TINY
from .random_models import as_checkpoint, quantised, random_inputs, random_weights

GIB = 2**30
SIZES = {"480p": VideoSize(832, 480, 81), "720p": VideoSize(1280, 720, 81)}
OURS = "ours"
# What a setting of somebody else's program may end in, and the run goes on; see `failures`.
FAILURES = (
    LightX2VError,
    RuntimeError,
    ImportError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    LookupError,
    OSError,
)
# The first class whose pattern is in a kernel's name.
KERNELS = {
    "attention": r"sdpa|fmha|attn|attention|flash",
    "quantise": r"quant|to_fp8|fp8_rows",
    "norm": r"norm|rms",
    "matmul": r"gemm|nvjet|cutlass|wgmma|matmul|_mm_|xmma|cublas",
    "copy": r"memcpy|memset|copy|\bcat|Cat",
    "elementwise": r"elementwise|reduce|triton",
}


@dataclass(frozen=True)
class Course:
    """What everyone is timed on."""

    config: WanConfig
    size: VideoSize
    error_size: VideoSize
    device: torch.device
    repeats: int
    warm_ups: int = 2
    profile: bool = False

    def weights(self) -> Weights:
        return random_weights(self.config, self.device)

    def case(self, name: str) -> str:
        """`name`, with the size behind it where that is not the usual one."""
        known = next((word for word, size in SIZES.items() if size == self.size), None)
        if known == "480p":
            return name
        size = self.size
        return f"{name}_{known or f'{size.width}x{size.height}x{size.frames}'}"

    def facts(self) -> Line:
        return {
            "size": [self.size.width, self.size.height, self.size.frames],
            "tokens": video_tokens(self.size),
            "blocks": self.config.num_layers,
            "dim": self.config.dim,
            "error_tokens": video_tokens(self.error_size),
            **about(self.device),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    device = select_device(options.device)
    config = TINY if options.tiny else I2V_14B
    course = Course(
        replace(config, num_layers=options.blocks or config.num_layers),
        options.size,
        options.error_size,
        device,
        options.repeats,
        options.warm_ups,
        options.profile,
    )
    theirs = [found for peer in options.peer for found in contenders(peer)]
    theirs = [peer for peer in theirs if is_wanted(peer, options.setting)]
    emit(race(course, theirs, ours(options, device)), options.out)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="See the docstring of this file."
    )
    add = parser.add_argument
    add("--tiers", nargs="*", choices=("16bit", "8bit"), default=["16bit", "8bit"], help="of ours")
    add("--attention", nargs="+", default=["auto"], help="of our 8-bit tier, each is timed")
    add("--attention-16bit", nargs="+", default=["auto"], help="of our 16-bit tier, each is timed")
    add("--matmul", nargs="+", default=["auto"], help="of our 8-bit tier, each is timed")
    add("--scheme", choices=tuple(ON_LOAD), default="fp8", help="of our 8-bit tier")
    add("--peer", action="append", default=[], help=PEERS + "; several times")
    add("--setting", nargs="*", help="of the peers, or WHO:SETTING; default: all not compiled")
    add("--size", type=read_size, default=SIZES["480p"], help="480p, 720p or WIDTHxHEIGHTxFRAMES")
    add("--error-size", type=read_size, default=VideoSize(832, 480, 5))
    add("--blocks", type=int, help="fewer than the model has, for a quick comparison")
    add("--repeats", type=int, default=5)
    add("--warm-ups", type=int, default=2)
    add("--device", default="auto")
    add("--profile", action="store_true", help="time by class of kernel, of ours")
    add("--tiny", action="store_true", help="a small model, to try the script")
    add_out(parser)
    return parser


def is_wanted(peer: Contender, settings: Sequence[str] | None) -> bool:
    """Whether its setting was asked for, alone or as WHO:SETTING; None asks for all but compiled
    ones."""
    if settings is None:
        return "compile" not in peer.setting
    return peer.setting in settings or f"{peer.who}:{peer.setting}" in settings


def read_size(text: str) -> VideoSize:
    """480p, 720p, or 832x480x81; raises argparse's error for anything else."""
    if text in SIZES:
        return SIZES[text]
    if not re.fullmatch(r"\d+x\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 480p, 720p or like 832x480x81")
    return VideoSize(*map(int, text.split("x"))).snapped()


def ours(options: argparse.Namespace, device: torch.device) -> list[Contender]:
    """What was asked of our own tiers, as contenders."""
    made = []
    if "16bit" in options.tiers:
        made += [_our("16bit", KEEP, row, "auto", device) for row in options.attention_16bit]
    if "8bit" in options.tiers:
        made += [
            _our("8bit", options.scheme, attention, matmul, device)
            for attention in options.attention
            for matmul in options.matmul
        ]
    return made


def _our(tier: str, scheme: str, attention: str, matmul: str, device: torch.device) -> Contender:
    load = partial(load_ours, scheme, attention, matmul, device)
    setting = f"{scheme}-{attention}-{matmul}" if scheme != KEEP else f"bf16-{attention}"
    stored = "bf16" if scheme == KEEP else ON_LOAD[scheme]
    return Contender(OURS, setting, str(about(device)["commit"]), tier, attention, stored, load)


def load_ours(
    scheme: str,
    attention: str,
    matmul: str,
    device: torch.device,
    config: WanConfig,
    weights: Weights,
) -> Forward:
    """As a user's file would be loaded, everything on the card."""
    del config  # read from the shapes
    stored = weights if scheme == KEEP else quantised(weights, scheme)
    checkpoint = as_checkpoint(stored)
    loaded = load_transformer(checkpoint, torch.bfloat16, attention, device, matmul=matmul)
    loaded.residency.place(device)
    return loaded.model


def race(course: Course, theirs: Sequence[Contender], mine: Sequence[Contender]) -> Iterator[Line]:
    """The lines of every contender, peers first, then ours with the ratio to the fastest."""
    exact = exact_velocity(course)
    best: dict[str, Line] = {}  # by tier; and by tier and "stock" among the peers' own settings
    for peer in theirs:
        line = {"case": course.case("forward_peer"), **peer.facts()}
        line |= time_one(course, peer, exact)
        for place in (peer.tier, f"{peer.tier} stock")[: 1 + peer.stock]:
            if "seconds" in line and _seconds(line) < _seconds(best.get(place)):
                best[place] = line
        yield line | course.facts()
    for our in mine:
        measured = {**our.facts(), **time_one(course, our, exact)}
        yield _beside(course.case(f"forward_{our.tier}"), measured, best, "16bit") | course.facts()
        if our.tier == "8bit" and "8bit" in best:
            case = course.case("forward_8bit_vs_8bit")
            yield _beside(case, measured, best, "8bit") | course.facts()
        if course.profile and "seconds" in measured:
            case = course.case(f"profile_{our.tier}")
            yield {"case": case, **our.facts(), **profile(course, our), **course.facts()}


def _seconds(line: Line | None) -> float:
    return math.inf if line is None else float(str(line["seconds"]))


def _beside(case: str, ours: Line, best: Mapping[str, Line], tier: str) -> Line:
    """`ratio` to the fastest peer, and `stock_ratio` to the fastest of the peers' own settings."""
    line = {"case": case, **ours}
    for place, prefix in ((tier, ""), (f"{tier} stock", "stock_")):
        if (peer := best.get(place)) is None:
            continue
        line |= {
            f"{prefix}peer": f"{peer['who']} {peer['setting']}",
            f"{prefix}peer_version": peer["version"],
            f"{prefix}peer_seconds": peer["seconds"],
            f"{prefix}peer_relative_error": peer["relative_error"],
        }
        if "seconds" in ours:
            line[f"{prefix}ratio"] = _seconds(ours) / _seconds(peer)
    return line


@torch.inference_mode()
def exact_velocity(course: Course) -> Tensor:
    """By our model in float32, from the bfloat16 weights."""
    loaded = load_transformer(
        as_checkpoint(course.weights()), torch.bfloat16, "sdpa", course.device
    )
    loaded.model.compute_dtype = torch.float32
    inputs = random_inputs(course.config, course.error_size, course.device)
    with torch.backends.cudnn.flags(allow_tf32=False):
        return loaded.model(*inputs)


@torch.inference_mode()
def time_one(course: Course, contender: Contender, exact: Tensor | None = None) -> Line:
    """Seconds, peak memory and error (where `exact` is given) of one; or why it cannot run."""
    device, held = course.device, allocated_bytes(course.device)  # held: what others left behind
    try:
        forward = contender.load(course.config, course.weights())
        error = None if exact is None else _error(course, forward, exact)
        inputs = random_inputs(course.config, course.size, device)
        reset_peak(device)
        seconds = median_seconds(lambda: forward(*inputs), device, course.repeats, course.warm_ups)
    except failures() as failure:
        text = " ".join(str(failure).split())[:300]
        return {"blocked_by": f"{type(failure).__name__}: {text}"}
    finally:
        forward = None
        torch.compiler.reset()
        gc.collect()  # a model that refers to itself would stay on the card
    return {
        "seconds": seconds,
        "peak_gib": round((peak_bytes(device) - held) / GIB, 2),
        "relative_error": error,
    }


def failures() -> tuple[type[Exception], ...]:
    """FAILURES, and Triton's own where it is installed: they are no RuntimeError."""
    if find_spec("triton") is None:
        return FAILURES
    from triton.errors import TritonError

    return (*FAILURES, TritonError)


def _error(course: Course, forward: Forward, exact: Tensor) -> float:
    small = random_inputs(course.config, course.error_size, course.device)
    # A compiled setting would be compiled for this size too, to the same numbers.
    with torch.compiler.set_stance("force_eager"):
        return relative_error(forward(*small), exact)


@torch.inference_mode()
def profile(course: Course, contender: Contender) -> Line:
    """Milliseconds of one forward on the card by class of kernel, and the ten longest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    forward = contender.load(course.config, course.weights())
    inputs = random_inputs(course.config, course.size, course.device)
    forward(*inputs)
    wait_for(course.device)
    on_card = course.device.type == "cuda"
    with record(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as found:
        forward(*inputs)
        wait_for(course.device)
    by_class: Counter[str] = Counter()
    kernels = []
    for event in found.key_averages():
        spent = (event.self_device_time_total if on_card else event.self_cpu_time_total) / 1000
        by_class[kernel_class(event.key)] += spent
        kernels.append((event.key[:90], round(spent, 2), event.count))
    longest = sorted(kernels, key=lambda kernel: -kernel[1])[:10]
    return {
        "milliseconds": {name: round(spent, 2) for name, spent in by_class.most_common()},
        "longest": longest,
    }


def kernel_class(name: str) -> str:
    """The first of KERNELS whose pattern is in a kernel's name; else other."""
    found = (kind for kind, pattern in KERNELS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, "other")


if __name__ == "__main__":
    raise SystemExit(main())
