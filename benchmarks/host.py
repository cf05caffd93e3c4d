"""Image to video in a real ComfyUI on this machine: our nodes beside ComfyUI's own, same files.

    python -m benchmarks.host --comfyui PATH --models DIR --native --out lines.jsonl

Starts that ComfyUI's server with this pack alone, posts the graph of our shipped 14B workflow
`--runs` times (each with another seed and another prompt, as a user works: only loaders and the
picture stay cached), and with `--native` the same video by ComfyUI's own nodes from the same files.
A line, case `host_end_to_end`, holds the first run, the median of the others, the seconds of each
node, the same without writing the video (`frames_seconds`: random weights make noise, which takes
x264 long), what the nodes say, the most the card held by nvidia-smi, and a hash of each latent, so
that servers started with other flags (`--flags=--lowvram`) can be compared. `--models` is a folder
like ComfyUI's own `models`; random files of a 14B model are written where it has none. `--tiny`
tries it on small ones, with `--device cpu` on a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from lightx2v_core.datatypes import VideoSize
from lightx2v_core.device import select_device
from lightx2v_core.errors import RequestError
from tests.host.live_server import Run, Server

from .contender import comfyui_version
from .end_to_end import WORDS
from .forward import read_size
from .host_files import TINY_FAMILY, write_models
from .host_graphs import Asked, Files, Graph, native, ours
from .lines import Line, about, add_out, emit, relative_error
from .random_parts import FAMILY

PACK = Path(__file__).parents[1]
CASE = "host_end_to_end"
POLL_SECONDS, FORGET_SECONDS = 0.2, 4.0


class HostServer(Server):
    """A ComfyUI whose models lie in a folder of their own, on the device it would choose itself."""

    variables: Mapping[str, str] = {}
    patience = 600.0
    models: Path

    def _fill_folder(self) -> None:
        for name in ("custom_nodes", "input", "output", "temp", "user", "page"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "models").symlink_to(self.models.resolve(), target_is_directory=True)
        (self.folder / "custom_nodes/lightx2v-distill").symlink_to(PACK, target_is_directory=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    emit(measure(options), options.out)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--comfyui", type=Path, required=True, help="the folder that holds main.py")
    add("--python", type=Path, help="its interpreter; without: its .venv's, else this one")
    add("--models", type=Path, required=True, help="like ComfyUI's models; filled where empty")
    add("--scheme", choices=("bf16", "fp8", "fp8-tensor", "int8"), default="fp8-tensor")
    add("--native", action="store_true", help="ComfyUI's own nodes too, and the ratio to them")
    add("--lora", help="a file of models/loras, put on by ComfyUI's LoraLoaderModelOnly")
    add("--memory", default="auto", help="of our Load Model")
    add("--attention", default="auto", help="of our Load Model")
    add("--flags", action="append", default=[], help="one of main.py, as in --flags=--lowvram")
    add("--size", type=read_size, default=read_size("480p"), help="480p, 720p or like 832x480x81")
    add("--runs", type=int, default=3, help="the first is not in the median")
    add("--device", default="auto")
    add("--keep", type=Path, help="a folder for the server's log and the last latents")
    add("--tiny", action="store_true", help="small models, to try the script")
    add_out(parser)
    return parser


def measure(options: argparse.Namespace) -> Iterator[Line]:
    """Ours, and with `--native` ComfyUI's own with the ratio between them."""
    device = select_device(options.device)
    family = TINY_FAMILY if options.tiny else FAMILY
    files = write_models(options.models, family, options.scheme, device)
    asked = Asked(
        options.size,
        seed=1,
        text=WORDS,
        lora=options.lora,
        memory=options.memory,
        attention=options.attention,
    )
    graphs: dict[str, Callable[[Files, Asked], Graph]] = {"ours": ours}
    graphs |= {"comfyui": native} if options.native else {}
    facts = about(device) | {
        "version": comfyui_version(options.comfyui),
        "flags": options.flags,
        "scheme": options.scheme,
        "memory": options.memory,
        "size": [options.size.width, options.size.height, options.size.frames],
    }
    done: dict[str, Line] = {}
    latents: dict[str, Tensor] = {}
    with (
        tempfile.TemporaryDirectory(prefix="lightx2v-host-") as folder,
        started(options, Path(folder), device) as server,
    ):
        write_picture(server.folder / "input" / asked.picture, options.size)
        for who, graph in graphs.items():
            try:
                told = [
                    follow(server, graph(files, asked.another(number)), device)
                    for number in range(options.runs)
                ]
            except RequestError as error:
                yield {"case": CASE, "who": who, "error": str(error), **facts}
                continue
            latents[who] = last_latent(server.folder)
            done[who] = summarise(told) | {"case": CASE, "who": who, **facts}
            if who != "ours" and "ours" in done:
                done[who] |= compare(done["ours"], done[who], latents["ours"], latents[who])
            yield done[who]
            # Its worker forgets all results and models, unless a prompt comes before it looks.
            server.post("/free", {"unload_models": True, "free_memory": True})
            time.sleep(FORGET_SECONDS)
        for who, latent in latents.items() if options.keep else ():
            torch.save(latent, options.keep / f"{who}.pt")


@contextmanager
def started(options: argparse.Namespace, folder: Path, device: torch.device) -> Iterator[Server]:
    beside = options.comfyui / ".venv/bin/python"
    python = options.python or (beside if beside.exists() else Path(sys.executable))
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    flags = (*options.flags, "--front-end-root", str(folder / "page"))
    server = HostServer(options.comfyui, python, PACK, folder, dict(os.environ), flags)
    server.models = options.models
    server.own_flags = ("--cpu",) if device.type == "cpu" else ()
    try:
        with server:
            yield server
    finally:
        if options.keep:
            (options.keep / "server.log").write_text(server.text(), "utf-8")


def write_picture(path: Path, size: VideoSize) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (size.height, size.width, 3)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def follow(server: Server, graph: Graph, device: torch.device) -> Line:
    """One run to its end: seconds, of each node too, texts, the peak, and what was saved."""
    with card_peak(device) as peak:
        run = server.run(graph)
    if run.end != "execution_success":
        raise RequestError(f"ComfyUI ended the run with {run.events[-1]}")
    latent, nodes = last_latent(server.folder), node_seconds(run, graph)
    return {
        "seconds": run.clock[-1] - run.clock[0],
        "frames_seconds": run.clock[-1] - run.clock[0] - nodes.get("SaveVideo", 0.0),
        "nodes": nodes,
        "texts": [text for out in run.outputs.values() for text in out.get("text", ())]
        + run.texts[-1:],
        "peak_gb": max(peak, default=0) / 1e9,
        "latent": hashlib.sha256(latent.numpy().tobytes()).hexdigest()[:16],
        "is_finite": bool(latent.isfinite().all()),
        "video_bytes": max(p.stat().st_size for p in (server.folder / "output").glob("*.mp4")),
    }


def node_seconds(run: Run, graph: Graph) -> dict[str, float]:
    """By the kind of node, from the message that it runs to the next such message."""
    starts = [
        (at, data["node"])
        for at, (kind, data) in zip(run.clock, run.events, strict=True)
        if kind == "executing"
    ]
    ends = [at for at, _ in starts[1:]] + [run.clock[-1]]
    spent: dict[str, float] = {}
    for (start, name), end in zip(starts, ends, strict=True):
        if name is not None:
            kind = graph[name]["class_type"]
            spent[kind] = round(spent.get(kind, 0.0) + end - start, 3)
    return spent


def last_latent(folder: Path) -> Tensor:
    """The raw mean that SaveLatent wrote last."""
    path = max((folder / "output").glob("*.latent"), key=lambda path: path.stat().st_mtime_ns)
    with safe_open(path, "pt") as file:
        return file.get_tensor("latent_tensor")


@contextmanager
def card_peak(device: torch.device) -> Iterator[list[int]]:
    """What all processes held on the card, in bytes, sampled by nvidia-smi; empty without one."""
    held: list[int] = []
    ended = threading.Event()
    number = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "-i", number, "--query-gpu=memory.used"]
    command += ["--format=csv,noheader,nounits"]

    def sample() -> None:
        while not ended.wait(POLL_SECONDS):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                held.append(int(done.stdout.split()[0]) * 2**20)

    thread = threading.Thread(target=sample, daemon=True)
    if device.type == "cuda":
        thread.start()
    try:
        yield held
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()


def summarise(runs: list[Line]) -> Line:
    """The median of all runs but the first, which loads."""
    warm = runs[1:] or runs
    return {
        "seconds": statistics.median(float(str(run["seconds"])) for run in warm),
        "frames_seconds": statistics.median(float(str(run["frames_seconds"])) for run in warm),
        "first_seconds": runs[0]["seconds"],
        "peak_gb": max(float(str(run["peak_gb"])) for run in runs),
        "latents": [run["latent"] for run in runs],
        "is_finite": all(run["is_finite"] for run in runs),
        "texts": runs[-1]["texts"],
        "runs": [{name: run[name] for name in ("seconds", "nodes", "peak_gb")} for run in runs],
        "video_bytes": runs[-1]["video_bytes"],
    }


def compare(mine: Line, theirs: Line, latent: Tensor, their_latent: Tensor) -> Line:
    """How our median stands to theirs, and how far the latents of the last runs are apart."""
    names = {"ratio": "seconds", "ratio_of_frames": "frames_seconds"}
    names |= {"ratio_of_first": "first_seconds"}
    ratios = {ratio: float(str(mine[n])) / float(str(theirs[n])) for ratio, n in names.items()}
    return {**ratios, "relative_difference": relative_error(latent, their_latent)}


if __name__ == "__main__":
    # A time limit ends the server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise SystemExit(main())
