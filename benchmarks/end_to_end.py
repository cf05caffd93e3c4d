"""Picture and prompt to frames on the host, through the pipeline: every stage, warm, with its peak.

    python -m benchmarks.end_to_end --folder DIR --scheme fp8 --peer comfyui=PATH --out lines.jsonl

Writes every file of a 14B image-to-video model with random weights (30 GB in fp8: transformer,
UMT5-XXL, CLIP ViT-H, VAE), loads them as a user would, and makes `--videos` videos, each of another
prompt and picture. Case `end_to_end` holds all of them, and as `seconds` and `stages` the median of
those from the third on (`warm_from`): what everybody has who makes more than two. Beside it, what
loading and the first video took, the peak of the warm ones, and the seconds without text and
without CLIP. The mp4 is not written.

With a peer there is another line for each `--setting`, with the peer's parts, timed in the same run
and added up: four forwards, its VAE's encode of the padded clip and its decode. It encodes neither
text nor CLIP's features, so `ratio`, of our whole video, is in its favour; `ratio_same_parts` is of
ours without those. `--tiny` tries it, on a CPU too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from lightx2v_core.datatypes import VideoSize
from lightx2v_core.device import select_device
from lightx2v_core.pipeline import GenerateRequest, Pipeline, Result
from lightx2v_core.wan.vae import VaeConfig

from .forward import GIB, Course, read_size, time_one
from .lines import Line, about, add_out, emit, median_seconds, reset_peak, wait_for
from .peers import PEERS, contenders
from .random_files import TINY
from .random_parts import FAMILY, Family, write_parts
from .vae import random_vae
from .vae_peers import Peer, open_peers

WARM_FROM = 3  # by then nothing is read, page-locked or tuned for the first time
PEER_HAS = "four forwards, VAE encode, VAE decode; no text encoder, no CLIP"
WORDS = "a red fox runs over the hill and the sea shines at night while a small dog sleeps"
TINY_FAMILY = Family(
    replace(TINY, num_layers=1),
    {"dim": 64, "heads": 4, "ffn_dim": 48, "layers": 1, "vocab": 300},
    {"dim": 1280, "layers": 2, "patch": 112, "tokens": 257, "head": 16},
    VaeConfig(8, 8),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.keep and options.folder is None:
        parser.error("--keep needs the --folder that is kept")
    line = measure(options)
    emit([line], options.out)  # before the peer, which may fail or take too long
    if options.peer:
        device, family = select_device(options.device), TINY_FAMILY if options.tiny else FAMILY
        for found in beside(options, family, line, device):
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
    add("--videos", type=int, default=4, help="in all; timed from the third on, or the last")
    add("--vram-gb", type=float, help="at most this much of the card for the whole run")
    add("--device", default="auto")
    add("--peer", help=PEERS)
    add("--setting", nargs="+", default=["bf16-sdpa"], help="of the peer, a line each")
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
        size = options.size
        videos = [make(pipeline, size, number) for number in range(options.videos)]
        summary, placed = pipeline.experts[0].summary, videos[0][1].memory
        clip = time_clip(pipeline, size)
        pipeline.turns.release(0)
        del pipeline
    first, warm_from = videos[0], min(WARM_FROM, len(videos))
    warm = videos[warm_from - 1 :]
    seconds = statistics.median(taken for taken, _ in warm)
    text = statistics.median(result.seconds["text"] for _, result in warm)
    line: Line = {
        "case": "end_to_end",
        "who": "ours",
        "setting": f"{options.scheme}-{options.attention}-{options.matmul}",
        "seconds": seconds,
        "warm_from": warm_from,
        "seconds_without_text": seconds - text,
        "seconds_without_text_and_clip": seconds - text - clip,
        "clip_seconds": round(clip, 4),
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
            {"seconds": round(taken, 3), "peak_gb": round(result.peak_bytes / 1e9, 2)}
            | {name: round(spent, 3) for name, spent in result.seconds.items()}
            for taken, result in videos
        ],
        "model": summary,
        "placed": list(placed),
        "attention": options.attention,
        "scheme": options.scheme,
        "vram_gb": options.vram_gb,
        "size": [size.width, size.height, size.frames],
    }
    return line | about(device)


def ask(size: VideoSize, number: int) -> GenerateRequest:
    """A picture and a prompt of this number."""
    generator = torch.Generator().manual_seed(number)
    image = torch.rand(3, size.height, size.width, generator=generator) * 2 - 1
    return GenerateRequest(f"{number} times {WORDS}", image=image, size=size, seed=number)


def time_clip(pipeline: Pipeline, size: VideoSize) -> float:
    """Seconds of CLIP in a video: its weights to the card and the features of one picture."""
    request = ask(size, 0)
    return median_seconds(lambda: pipeline.clip_features(request, size), pipeline.device, 3, 1)


def make(pipeline: Pipeline, size: VideoSize, number: int) -> tuple[float, Result]:
    """(seconds of the whole request, its result) for a picture and a prompt of this number."""
    request = ask(size, number)
    wait_for(pipeline.device)
    started = time.perf_counter()
    result = pipeline.generate(request)
    return time.perf_counter() - started, result


def beside(
    options: argparse.Namespace, family: Family, line: Line, device: torch.device
) -> Iterator[Line]:
    """For each setting of the peer, as soon as it is timed: its parts, and the ratios to their
    sum, of all settings so far in `ratios`."""
    peers = [c for c in contenders(options.peer) if c.setting in options.setting]
    peers.sort(key=lambda peer: options.setting.index(peer.setting))
    for missing in set(options.setting) - {peer.setting for peer in peers}:
        yield {"peer_setting": missing, "peer_blocked_by": "this peer has no such setting here"}
    course = Course(family.transformer, options.size, options.size, device, 3, 1)
    encode, decode = time_vae(options.peer, family.vae, options.size, device)
    ours = [float(str(line[name])) for name in ("seconds", "seconds_without_text_and_clip")]
    ratios: dict[str, float] = {}
    for peer in peers:
        reset_peak(device)
        timed = time_one(course, peer)
        told: Line = {
            "peer": f"{peer.who} {peer.setting}, sum of parts",
            "peer_setting": peer.setting,
            "peer_version": peer.version,
            "peer_stock": peer.stock,
            "peer_forward": timed,
        }
        if "seconds" in timed:
            forward = float(str(timed["seconds"]))
            total = 4 * forward + encode + decode
            ratios[peer.setting] = ours[0] / total
            told["peer_has"] = PEER_HAS
            told["peer_seconds"] = total
            told["peer_parts"] = {"forward": forward, "encode": encode, "decode": decode}
            told["ratio"], told["ratio_same_parts"] = ours[0] / total, ours[1] / total
        yield told | {"ratios": dict(ratios)}


def time_vae(
    peer: str, config: VaeConfig, size: VideoSize, device: torch.device
) -> tuple[float, float]:
    """(encode of the padded clip, decode) of a peer's VAE in bfloat16, with pixels that come from
    and go to the host; of a peer that has several ways the faster one."""
    clip = torch.full((1, 3, size.frames, size.height, size.width), 0.5)
    clip[:, :, 0] = torch.rand(clip[:, :, 0].shape)
    latent = torch.randn(size.latent_shape()).to(device, torch.bfloat16)

    def seconds_of(theirs: Peer) -> tuple[float, float]:
        return (
            median_seconds(lambda: theirs.encode(clip.to(device).bfloat16()), device, 3, 1),
            median_seconds(lambda: theirs.decode(latent).float().cpu(), device, 3, 1),
        )

    weights = random_vae(config).state_dict()
    ways = [seconds_of(vae) for vae in open_peers(peer, weights, config, device, torch.bfloat16)]
    encodes, decodes = zip(*ways, strict=True)
    return min(encodes), min(decodes)


if __name__ == "__main__":
    raise SystemExit(main())
