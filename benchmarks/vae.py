"""The VAE: decoding, encoding, and encoding a picture with grey frames behind it.

usage: python -m benchmarks.vae --device cuda --sizes 832x480 1280x720 --out vae.jsonl
           [--peer comfyui=PATH] [--peer diffusers] [--peer lightx2v=PATH]

A line holds case, seconds (median), plain_seconds and ratio to the plain layers in the same run
(what runs without tensor cores), peak_gib beside the weights, relative_error to float32 on a small
clip for the fast and the plain layers, size, card, torch, commit; with a peer also peer,
peer_version, peer_seconds, peer_relative_error and ratio_to_peer. Weights and data are random:
neither decides the time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from lightx2v_core.datatypes import VideoSize
from lightx2v_core.device import select_device
from lightx2v_core.wan.vae import VaeConfig, WanVae, denormalise

from .lines import Line, about, add_out, emit, median_seconds, relative_error
from .peers import PEERS
from .vae_peers import Peer, open_peers

CASES = ("vae_decode", "vae_encode", "vae_encode_padded")
CHECKED = VideoSize(128, 128, 33)  # the clip that errors are taken of


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vae", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--width", type=int, default=96, help="of the VAE; 24 is lightvaew2_1")
    parser.add_argument("--sizes", nargs="+", default=["832x480", "1280x720"])
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--latents-per-chunk", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", action="append", default=[], metavar="PEER", help=PEERS)
    add_out(parser)
    options = parser.parse_args(arguments)
    emit(run(options), options.out)
    return 0


@torch.inference_mode()
def run(options: argparse.Namespace) -> Iterator[Line]:
    device, dtype = select_device(options.device), getattr(torch, options.dtype)
    config = VaeConfig(options.width, options.width)
    exact = random_vae(config).to(device)
    vae = random_vae(config).to(device, dtype)
    weights = exact.state_dict()
    peers = [p for name in options.peer for p in open_peers(name, weights, config, device, dtype)]
    errors = {case: _errors(case, vae, exact, peers) for case in CASES}
    del exact, weights
    facts: Line = {"dtype": options.dtype, "latents_per_chunk": options.latents_per_chunk}
    facts |= about(device)
    for text in options.sizes:
        width, height = (int(side) for side in text.split("x"))
        size = VideoSize(width, height, options.frames)
        for case in CASES:
            x = example(case, size, device, dtype)
            own, theirs = errors[case]
            line = _measure(case, vae, x, options) | own
            line |= {"size": [width, height, options.frames]}
            yield line | facts
            for peer in peers:
                beside = _beside(case, peer, x, line, options.repeats)
                yield line | facts | beside | {"peer_relative_error": theirs[peer.name]}


def _measure(case: str, vae: WanVae, x: Tensor, options: argparse.Namespace) -> Line:
    chunk = {"latents_per_chunk": options.latents_per_chunk}
    call = vae.decode if case == "vae_decode" else vae.encode
    seconds = median_seconds(lambda: call(x, **chunk), x.device, options.repeats)
    peak = bytes_beside(lambda: call(x, **chunk), x.device)
    vae.plain_layers = True
    # Noise in place of equal frames: each of those would be computed once here too.
    whole = torch.rand_like(x) if case == "vae_encode_padded" else x
    plain = median_seconds(lambda: call(whole), x.device, options.repeats)
    vae.plain_layers = False
    ratio = {"plain_seconds": plain, "ratio": seconds / plain}
    return {"case": case, "seconds": seconds, **ratio, "peak_gib": peak / 2**30}


def _beside(case: str, peer: Peer, x: Tensor, line: Line, repeats: int) -> Line:
    seconds = median_seconds(partial(_theirs, case, peer, x), x.device, repeats)
    ours = line["seconds"]
    assert isinstance(ours, float), "our own line has its seconds"
    about: Line = {"peer": peer.name, "peer_version": peer.version, "attention": "PyTorch SDPA"}
    return about | {"peer_seconds": seconds, "ratio_to_peer": ours / seconds}


def _theirs(case: str, peer: Peer, x: Tensor) -> Tensor:
    """What a peer makes of our input: its latents are raw."""
    return peer.decode(denormalise(x).to(x.dtype)) if case == "vae_decode" else peer.encode(x)


def _errors(
    case: str, vae: WanVae, exact: WanVae, peers: Sequence[Peer]
) -> tuple[Line, dict[str, float]]:
    """Ours by fast and plain layers, and of each peer, to `exact` in float32."""
    x = example(case, CHECKED, vae.conv1.weight.device, vae.conv1.weight.dtype)
    work = "decode" if case == "vae_decode" else "encode"
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = getattr(exact, work)(x.float())
    line: Line = {}
    for name, vae.plain_layers in (("plain_relative_error", True), ("relative_error", False)):
        line[name] = relative_error(getattr(vae, work)(x), expected)
    if case != "vae_decode":
        raw = denormalise(expected)
        return line, {peer.name: relative_error(_theirs(case, peer, x), raw) for peer in peers}
    # Pixels: some peers leave it to whoever calls them to cut them to their range.
    made = {peer.name: _theirs(case, peer, x).clamp(-1, 1) for peer in peers}
    return line, {name: relative_error(pixels, expected) for name, pixels in made.items()}


def example(case: str, size: VideoSize, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What `case` works on: a latent, noise, or a picture and grey frames."""
    generator = torch.Generator(device).manual_seed(0)
    if case == "vae_decode":
        return torch.randn(size.latent_shape(), generator=generator, device=device).to(dtype)
    shape = (1, 3, size.frames, size.height, size.width)
    pixels = torch.rand(shape, generator=generator, device=device).mul_(2.0).sub_(1.0).to(dtype)
    if case == "vae_encode_padded":
        pixels[:, :, 1:] = 0.0
    return pixels


def random_vae(config: VaeConfig) -> WanVae:
    """Deviations that keep activations near one through the depth."""
    vae, generator = WanVae(config).requires_grad_(False), torch.Generator().manual_seed(0)
    for name, weight in vae.named_parameters():
        if not name.endswith("gamma"):
            spread = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.02
            weight.normal_(0.0, spread, generator=generator)
    return vae


def bytes_beside(work: Callable[[], object], device: torch.device) -> int:
    """The most that `work` allocates beside what there is; 0 where nobody counts."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


if __name__ == "__main__":
    raise SystemExit(main())
