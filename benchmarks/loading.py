"""RAM that a 14B file takes while it is quantised and while it is loaded.

    python -m benchmarks.loading --schemes bf16 fp8 --folder DIR --out loading.jsonl

Writes a bf16 file of the real I2V 14B shapes (33 GB, one random block repeated), makes the other
schemes from it through `quantise_file`, and loads each in a process of its own, computing in
bfloat16 as a card does. Appends a JSON line for each: the most anonymous RAM (what cannot be given
back; mapped pages can) while quantising and while loading, seconds, bytes. `umt5-fp16` and
`umt5-fp8` are the text encoder as the command line loads it, in a file of zeros that takes no room
on the disk. `--tiny` tries it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lightx2v_core.assemble import load_text_encoder, load_transformer
from lightx2v_core.checkpoint.convert import GGUF_SCHEMES, SCHEMES, quantise_file

from .lines import commit, emit
from .memory import AnonymousMemory, rss_anon
from .random_files import I2V_14B, NVFP4, TINY, write_random
from .random_parts import TEXT_TYPES, TEXT_XXL, write_text

TINY_TEXT = {"dim": 64, "heads": 4, "ffn_dim": 48, "layers": 1, "vocab": 300}


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    if options.load is not None:
        print(json.dumps(load(options.load)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, config = Path(name), TINY if options.tiny else I2V_14B
        needs_plain = not options.load_only and any(s not in TEXT_TYPES for s in options.schemes)
        plain = write_random(folder, "bf16", config) if needs_plain else None
        for scheme in options.schemes:
            if scheme in TEXT_TYPES:
                path = write_text(folder, scheme, TINY_TEXT if options.tiny else TEXT_XXL)
                line = measure_load(path, scheme)
                path.unlink()
            elif plain is None:
                path = write_random(folder, scheme, config)
                line = measure_load(path, scheme)
                path.unlink()
            else:
                line = measure(plain, folder, scheme)
            emit([line], options.out)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--schemes",
        nargs="+",
        choices=("bf16", *SCHEMES, NVFP4, *TEXT_TYPES),
        default=["bf16", "fp8"],
    )
    parser.add_argument("--folder", type=Path, help="where the files are written for a while")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument(
        "--load-only", action="store_true", help="write the files directly, from one block"
    )
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    return parser


def measure(plain: Path, folder: Path, scheme: str) -> dict[str, object]:
    """Quantise, load in a process of its own, and remove the file again."""
    path, made = plain, {}
    if scheme != "bf16":
        ending = ".gguf" if scheme in GGUF_SCHEMES else ".safetensors"
        path = folder / f"wan2.1_i2v_random_{scheme}{ending}"
        before, started = rss_anon(), time.perf_counter()
        with AnonymousMemory() as memory:
            quantise_file(plain, path, scheme)
        made = {
            "quantise_seconds": round(time.perf_counter() - started, 1),
            "quantise_anonymous": memory.peak - before,
        }
    line = measure_load(path, scheme) | made
    if path != plain:
        path.unlink()
    return line


def measure_load(path: Path, scheme: str) -> dict[str, object]:
    """Load in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loading", "--load", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {
        "case": "loading",
        "scheme": scheme,
        "file_bytes": path.stat().st_size,
        **json.loads(done.stdout.splitlines()[-1]),
        "torch": torch.__version__,
        "commit": commit(),
    }


def load(path: Path) -> dict[str, float | int]:
    """Seconds, and the most anonymous RAM beyond what the process had before."""
    before, started = rss_anon(), time.perf_counter()
    with AnonymousMemory() as memory:
        if path.stem in TEXT_TYPES:
            weights = load_text_encoder(path, None, torch.bfloat16, as_stored=True).bytes
        else:
            weights = load_transformer(path, torch.bfloat16).residency.total_bytes
    return {
        "load_seconds": round(time.perf_counter() - started, 2),
        "load_anonymous": memory.peak - before,
        "weights": weights,
    }


if __name__ == "__main__":
    sys.exit(main())
