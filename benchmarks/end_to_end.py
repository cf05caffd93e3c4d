"""Picture and prompt to frames on the host, through the pipeline: every stage, warm, with its peak.

    python -m benchmarks.end_to_end --folder DIR --scheme fp8 --peer comfyui=PATH --out lines.jsonl

Writes every file of a 14B image-to-video model with random weights (30 GB in fp8: transformer,
UMT5-XXL, CLIP ViT-H, VAE), loads them as a user would, and makes `--videos` videos, each of another
prompt and picture, after one that warms up. Case `end_to_end` holds the median of whole videos and
of each stage, what loading and the first video took, and the peak of the warm ones. The mp4 is not
written. With a peer a second line has its own parts, timed in the same run and added up: four
forwards at the fastest of the settings given by `--setting`, its VAE's encode of the padded clip
and its decode; its text and CLIP encoders are left out, in its favour. `--tiny` tries it, on a CPU
too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lightx2v_core.datatypes import VideoSize
from lightx2v_core.device import select_device
from lightx2v_core.pipeline import GenerateRequest, Pipeline, Result
from lightx2v_core.wan.vae import VaeConfig

from .forward import GIB, Course, read_size, time_one
from .lines import Line, about, add_out, emit, median_seconds, reset_peak, wait_for
from .peers import comfy_vae, contenders
from .random_files import I2V_14B, TINY
from .random_parts import CLIP_H, TEXT_XXL, Family, write_parts

WORDS = "a red fox runs over the hill and the sea shines at night while a small dog sleeps"
FAMILY = Family(I2V_14B, TEXT_XXL, CLIP_H, VaeConfig())
TINY_FAMILY = Family(
    replace(TINY, num_layers=1),
    {"dim": 64, "heads": 4, "ffn_dim": 48, "layers": 1, "vocab": 300},
    {"dim": 1280, "layers": 2, "patch": 112, "tokens": 257, "head": 16},
    VaeConfig(8, 8),
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    line = measure(options)
    emit([line], options.out)  # before the peer, which may fail or take too long
    if options.peer:
        device, family = select_device(options.device), TINY_FAMILY if options.tiny else FAMILY
        found = beside(options, family, float(str(line["seconds"])), device)
        emit([line | found], options.out)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, help="where the files are written for a while")
    add("--keep", action="store_true", help="leave the files in --folder, and take what is there")
    add("--scheme", choices=("bf16", "fp8", "int8"), default="fp8")
    add("--attention", default="auto")
    add("--matmul", default="auto")
    add("--size", type=read_size, default=read_size("480p"), help="480p, 720p or like 832x480x81")
    add("--videos", type=int, default=3, help="that are timed, after one that is not")
    add("--vram-gb", type=float, help="at most this much of the card for the whole run")
    add("--device", default="auto")
    add("--peer", help="comfyui=PATH")
    add("--setting", nargs="+", default=["bf16-sdpa"], help="of the peer, the fastest counts")
    add("--tiny", action="store_true", help="small models, to try the script")
    add_out(parser)
    return parser


def measure(options: argparse.Namespace) -> Line:
    """Our line."""
    device = select_device(options.device)
    family = TINY_FAMILY if options.tiny else FAMILY
    made = tempfile.TemporaryDirectory(dir=options.folder, prefix="lightx2v-")
    with nullcontext(options.folder) if options.keep else made as folder:
        parts = write_parts(Path(folder), family, options.scheme, device, sync=False)
        started = time.perf_counter()
        vram = None if options.vram_gb is None else int(options.vram_gb * 1e9)
        pipeline = Pipeline(parts, device, options.attention, vram, matmul=options.matmul)
        loading = time.perf_counter() - started
        videos = [make(pipeline, options.size, number) for number in range(options.videos + 1)]
        summary, placed = pipeline.experts[0].summary, videos[0][1].memory
        pipeline.turns.release(0)
        del pipeline
    first, *warm = videos
    size = options.size
    line: Line = {
        "case": "end_to_end",
        "who": "ours",
        "setting": f"{options.scheme}-{options.attention}-{options.matmul}",
        "seconds": statistics.median(seconds for seconds, _ in warm),
        "stages": {
            name: round(statistics.median(result.seconds[name] for _, result in warm), 4)
            for name in first[1].seconds
        },
        "steps": first[1].plan.steps,
        "peak_gib": round(max(result.peak_bytes for _, result in warm) / GIB, 2),
        "peak_gb": round(max(result.peak_bytes for _, result in warm) / 1e9, 2),
        "loading_seconds": round(loading, 2),
        "first_video_seconds": round(first[0], 2),
        # In order, the first that warms up too.
        "videos": [
            {name: round(spent, 3) for name, spent in result.seconds.items()}
            for _, result in videos
        ],
        "model": summary,
        "placed": list(placed),
        "attention": options.attention,
        "scheme": options.scheme,
        "vram_gb": options.vram_gb,
        "size": [size.width, size.height, size.frames],
    }
    return line | about(device)


def make(pipeline: Pipeline, size: VideoSize, number: int) -> tuple[float, Result]:
    """(seconds of the whole request, its result) for a picture and a prompt of this number."""
    generator = torch.Generator().manual_seed(number)
    image = torch.rand(3, size.height, size.width, generator=generator) * 2 - 1
    request = GenerateRequest(f"{number} times {WORDS}", image=image, size=size, seed=number)
    wait_for(pipeline.device)
    started = time.perf_counter()
    result = pipeline.generate(request)
    return time.perf_counter() - started, result


def beside(
    options: argparse.Namespace, family: Family, seconds: float, device: torch.device
) -> Line:
    """The peer's parts at the fastest of its settings, and the ratio to their sum."""
    peers = [c for c in contenders(options.peer) if c.setting in options.setting]
    course = Course(family.transformer, options.size, options.size, device, 3, 1)
    timed = {peer.setting: time_one(course, peer) for peer in peers}
    seconds_of = {name: float(str(t["seconds"])) for name, t in timed.items() if "seconds" in t}
    if not seconds_of:
        return {"peer_blocked_by": {name: t["blocked_by"] for name, t in timed.items()}}
    reset_peak(device)
    encode, decode = time_vae(comfy_vae(family.vae, device), options.size, device)
    best = min(seconds_of, key=seconds_of.__getitem__)
    peer = next(peer for peer in peers if peer.setting == best)
    total = 4 * seconds_of[best] + encode + decode
    return {
        "peer": f"{peer.who} {best}, sum of parts",
        "peer_version": peer.version,
        "peer_seconds": total,
        "peer_parts": {"forward": seconds_of[best], "encode": encode, "decode": decode},
        "peer_forwards": timed,
        "ratio": seconds / total,
    }


def time_vae(vae: torch.nn.Module, size: VideoSize, device: torch.device) -> tuple[float, float]:
    """(encode of the padded clip, decode), with pixels that come from and go to the host."""
    clip = torch.full((1, 3, size.frames, size.height, size.width), 0.5)
    clip[:, :, 0] = torch.rand(clip[:, :, 0].shape)
    latent = torch.randn(size.latent_shape()).to(device, torch.bfloat16)

    def encode() -> Tensor:
        return vae.encode(clip.to(device).bfloat16())

    return (
        median_seconds(encode, device, 3, 1),
        median_seconds(lambda: vae.decode(latent).float().cpu(), device, 3, 1),
    )


if __name__ == "__main__":
    raise SystemExit(main())
