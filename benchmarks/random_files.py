"""Transformer files of real shapes with random weights: one random block, its rows turned on in
each that follows, so that no two blocks are the same.

    python -m benchmarks.random_files --folder DIR --scheme gguf-Q4_0

Time and memory depend on shapes and on the spread of the values, not on what they mean.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lightx2v_core.checkpoint.convert import (
    GGUF_SCHEMES,
    SCHEMES,
    quantise_file,
    write_safetensors,
)
from lightx2v_core.checkpoint.gguf_writing import start_gguf
from lightx2v_core.checkpoint.headers import TensorHeader
from lightx2v_core.checkpoint.source import Checkpoint, open_checkpoint
from lightx2v_core.checkpoint.writing import replacing
from lightx2v_core.wan.config import CLIP_TOKENS, WanConfig

from .random_models import random_weights

I2V_14B = WanConfig(dim=5120, ffn_dim=13824, num_layers=40, in_dim=36, clip_tokens=CLIP_TOKENS)
TINY = replace(I2V_14B, dim=128, ffn_dim=256, num_layers=6, text_dim=64)
BLOCK = re.compile(r"^blocks\.0\.")
NVFP4 = "nvfp4"  # read and not written by `quantize`: LightX2V's layout by formulas of the tests


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--scheme", choices=("bf16", *SCHEMES, NVFP4), default="fp8")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    print(write_random(options.folder, options.scheme, TINY if options.tiny else I2V_14B))
    return 0


def write_random(folder: Path, scheme: str, config: WanConfig) -> Path:
    """A file in `scheme` ("bf16", NVFP4, what `quantise_file` writes); one block is in memory."""
    ending = ".gguf" if scheme in GGUF_SCHEMES else ".safetensors"
    first = folder / "wan2.1_i2v_one_block.safetensors"
    tensors = random_weights(replace(config, num_layers=1), torch.device("cpu"))
    headers = {k: TensorHeader(tuple(v.shape), "BF16") for k, v in tensors.items()}
    write_safetensors(first, headers, iter(tensors.values()), {})
    if scheme != "bf16":
        plain, first = first, folder / f"wan2.1_i2v_one_block_{scheme}{ending}"
        _quantise(plain, first, scheme)
        plain.unlink()
    target = folder / f"wan2.1_i2v_random_{scheme}{ending}"
    checkpoint = open_checkpoint(first)
    places = dict(_repeated(checkpoint, config.num_layers))
    headers = {name: checkpoint.headers[stored] for name, (stored, _) in places.items()}
    if ending == ".gguf":
        with replacing(target, sum(header.nbytes for header in headers.values())) as part:
            writer = start_gguf(part, headers, checkpoint.metadata, scheme)
            for place in places.values():
                writer.write_tensor_data(_stored_bytes(checkpoint, *place).numpy())
            writer.close()
    else:
        stored_bytes = (_stored_bytes(checkpoint, *place) for place in places.values())
        write_safetensors(target, headers, stored_bytes, checkpoint.metadata)
    first.unlink()
    return target


def _quantise(plain: Path, target: Path, scheme: str) -> None:
    if scheme != NVFP4:
        quantise_file(plain, target, scheme)
        return
    from .format_files import forms

    forms()["NVFP4, LightX2V"].make(plain, target.parent).rename(target)


def _repeated(checkpoint: Checkpoint, blocks: int) -> Iterator[tuple[str, tuple[str, int]]]:
    """(name in the whole file, (name in that of one block, number of the block)); whole blocks
    after another."""
    inner = [name for name in checkpoint.headers if BLOCK.match(name)]
    yield from ((name, (name, 0)) for name in checkpoint.headers if name not in inner)
    for index in range(blocks):
        yield from ((BLOCK.sub(f"blocks.{index}.", name), (name, index)) for name in inner)


def _stored_bytes(checkpoint: Checkpoint, stored: str, block: int) -> Tensor:
    tensor = checkpoint.tensors({stored: stored}, packed=[stored])[stored].contiguous()
    if tensor.ndim == 2 and block:
        # Whole rows, so that blocks of codes and the scale of a row stay what they are.
        tensor = tensor.view(torch.uint8).roll(block, dims=0)
    return tensor.reshape(-1).view(torch.uint8)


if __name__ == "__main__":
    raise SystemExit(main())
