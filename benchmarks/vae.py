"""The VAE: decoding, encoding, and encoding a picture with grey frames behind it.

usage: python -m benchmarks.vae --device cuda --sizes 832x480 1280x720 --out vae.jsonl
           [--peer comfyui=PATH] [--peer diffusers]

A line holds case, seconds (median), plain_seconds and ratio to the plain layers in the same run
(what runs without tensor cores), peak_gib beside the weights, relative_error to float32 on a small
clip for the fast and the plain layers, size, card, torch, commit; with a peer also peer,
peer_version, peer_seconds and ratio_to_peer. Weights and data are random: neither decides the time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from lightx2v_core.checkpoint.layouts import vae_to_diffusers
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.device import select_device
from lightx2v_core.wan.vae import VaeConfig, WanVae, denormalise

from .lines import Line, about, add_out, emit, median_seconds

CASES = ("vae_decode", "vae_encode", "vae_encode_padded")
CHECKED = VideoSize(128, 128, 33)  # the clip that errors are taken of
Run = Callable[[Tensor], Tensor]


class Peer:
    """Someone else's VAE with our weights; encodes and decodes raw means."""

    def __init__(self, name: str, version: str, encode: Run, decode: Run) -> None:
        self.name, self.version, self.encode, self.decode = name, version, encode, decode


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vae", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--width", type=int, default=96, help="of the VAE; 24 is lightvaew2_1")
    parser.add_argument("--sizes", nargs="+", default=["832x480", "1280x720"])
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--latents-per-chunk", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", action="append", default=[], metavar="comfyui=PATH|diffusers")
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
    peers = [open_peer(name, exact.state_dict(), config, device, dtype) for name in options.peer]
    errors = dict(_errors(vae, exact))
    del exact
    facts: Line = {"dtype": options.dtype, "latents_per_chunk": options.latents_per_chunk}
    facts |= about(device)
    for text in options.sizes:
        width, height = (int(side) for side in text.split("x"))
        size = VideoSize(width, height, options.frames)
        for case in CASES:
            x = example(case, size, device, dtype)
            line = _measure(case, vae, x, options) | errors[case]
            line |= {"size": [width, height, options.frames]}
            yield line | facts
            for peer in peers:
                yield line | facts | _beside(case, peer, x, line, options.repeats)


def _measure(case: str, vae: WanVae, x: Tensor, options: argparse.Namespace) -> Line:
    chunk = {"latents_per_chunk": options.latents_per_chunk}
    call = vae.decode if case == "vae_decode" else vae.encode
    seconds = median_seconds(lambda: call(x, **chunk), x.device, options.repeats)
    peak = peak_bytes(lambda: call(x, **chunk), x.device)
    vae.plain_layers = True
    # Noise in place of equal frames: each of those would be computed once here too.
    whole = torch.rand_like(x) if case == "vae_encode_padded" else x
    plain = median_seconds(lambda: call(whole), x.device, options.repeats)
    vae.plain_layers = False
    ratio = {"plain_seconds": plain, "ratio": seconds / plain}
    return {"case": case, "seconds": seconds, **ratio, "peak_gib": peak / 2**30}


def _beside(case: str, peer: Peer, x: Tensor, line: Line, repeats: int) -> Line:
    given = denormalise(x).to(x.dtype) if case == "vae_decode" else x
    call = peer.decode if case == "vae_decode" else peer.encode
    seconds, ours = median_seconds(lambda: call(given), x.device, repeats), line["seconds"]
    assert isinstance(ours, float), "our own line has its seconds"
    about: Line = {"peer": peer.name, "peer_version": peer.version, "attention": "PyTorch SDPA"}
    return about | {"peer_seconds": seconds, "ratio_to_peer": ours / seconds}


def _errors(vae: WanVae, exact: WanVae) -> Iterator[tuple[str, Line]]:
    device, dtype = vae.conv1.weight.device, vae.conv1.weight.dtype
    for case in CASES:
        x = example(case, CHECKED, device, dtype)
        work = "decode" if case == "vae_decode" else "encode"
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            expected = getattr(exact, work)(x.float())
        line: Line = {}
        for name, vae.plain_layers in (("plain_relative_error", True), ("relative_error", False)):
            result = getattr(vae, work)(x)
            line[name] = float((result - expected).norm() / expected.norm())
        yield case, line


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


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most that `work` allocates beside what there is; 0 where nobody counts."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def open_peer(
    name: str,
    weights: dict[str, Tensor],
    config: VaeConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Peer:
    """`diffusers`, or `comfyui=PATH` of a checkout whose packages are installed."""
    if name == "diffusers":
        import diffusers

        base = {"base_dim": config.encoder_dim, "decoder_base_dim": config.decoder_dim}
        theirs = diffusers.AutoencoderKLWan(**base).requires_grad_(False)
        theirs.load_state_dict({vae_to_diffusers(k): v for k, v in weights.items()})
        theirs = theirs.to(device, dtype).eval()
        return Peer(
            name,
            version("diffusers"),
            lambda x: theirs.encode(x).latent_dist.mean,
            lambda raw: theirs.decode(raw).sample,
        )
    kind, _, path = name.partition("=")
    if kind != "comfyui" or not path:
        raise SystemExit(f"--peer {name} is unknown; use comfyui=PATH or diffusers")
    theirs = comfyui_vae(Path(path), config, device).to(device, dtype)
    theirs.load_state_dict(weights)
    return Peer(kind, comfyui_version(Path(path)), theirs.encode, theirs.decode)


def comfyui_vae(path: Path, config: VaeConfig, device: torch.device) -> nn.Module:
    """ComfyUI's own module, as its loader builds it."""
    sys.path.insert(0, str(path))
    arguments = sys.argv
    sys.argv = [arguments[0], *(["--cpu"] if device.type == "cpu" else [])]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.ldm.wan.vae as peer

    sys.argv = arguments
    shape = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
    shape |= {"temperal_downsample": [False, True, True], "dropout": 0.0}
    return peer.WanVAE(dim=config.encoder_dim, z_dim=config.z_dim, **shape).requires_grad_(False)


def comfyui_version(path: Path) -> str:
    file = path / "comfyui_version.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return text.partition('__version__ = "')[2].partition('"')[0] or "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
