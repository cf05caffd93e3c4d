"""A transformer of random weights made where it runs, loaded as a file would be.

Timing does not depend on the values, and what a benchmark compares must be the same weights: a seed
gives the same ones every time, so that nobody has to keep 33 GB for whoever comes next.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from lightx2v_core.checkpoint.convert import is_quantised
from lightx2v_core.checkpoint.headers import TensorHeader
from lightx2v_core.checkpoint.source import DTYPE_NAMES, Checkpoint
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.quant.quantise import WRITTEN
from lightx2v_core.wan.config import CLIP_DIM, TEXT_LEN, WanConfig
from lightx2v_core.wan.model import WanModel

WEIGHT_SEED, INPUT_SEED = 1, 2
WRITERS = 8
NAME = Path("wan2.1_i2v_random.safetensors")


def random_weights(
    config: WanConfig,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = WEIGHT_SEED,
) -> dict[str, Tensor]:
    """Every tensor of the official names in `dtype`, on `device`; each block has its own."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in WanModel(config).state_dict().items()}
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm_k_img.weight", "norm3.weight")):
            tensor = 1 + 0.1 * tensor
        elif len(shape) > 1:
            tensor *= shape[1:].numel() ** -0.5
        else:
            tensor *= 0.1
        tensors[name] = tensor.to(dtype)
    return tensors


def quantised(weights: dict[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """What an fp8 or int8 file of `weights` holds. Takes them out of `weights` one by one, so that
    both are never there at once."""
    written, stored = WRITTEN[scheme], {}
    for name in list(weights):
        weight = weights.pop(name)
        if is_quantised(name, TensorHeader(tuple(weight.shape), DTYPE_NAMES[weight.dtype])):
            stored[name], scale = written.quantise(weight)
            stored[f"{name.removesuffix('weight')}{written.scale_leaf}"] = scale
        else:
            stored[name] = weight
    return stored


def write_file(tensors: Mapping[str, Tensor], path: Path, sync: bool = True) -> Path:
    """A safetensors file of `tensors`, wherever they are, written by several threads."""
    header, starts, end = safetensors_header(tensors)

    def write(start: int, tensor: Tensor) -> None:
        data = tensor.reshape(-1).view(torch.uint8).cpu().numpy().data
        with path.open("r+b", buffering=0) as file:
            file.seek(start)
            written = 0
            while written < len(data):
                written += file.write(data[written : written + 2**30])

    with path.open("wb") as file:
        file.write(header)
        file.truncate(end)
        file.flush()
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(write, starts, tensors.values()))
        if sync:
            os.fsync(file.fileno())
    return path


def safetensors_header(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[int], int]:
    """(length and table, where each tensor begins, where the file ends), of tensors on any device,
    meta too."""
    table, starts, end = {}, [], 0
    for name, tensor in tensors.items():
        place = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        table[name] = {**place, "data_offsets": [end, end + tensor.nbytes]}
        starts.append(end)
        end += tensor.nbytes
    raw = json.dumps(table).encode()
    raw += b" " * (-len(raw) % 8)
    header = len(raw).to_bytes(8, "little") + raw
    return header, [len(header) + start for start in starts], len(header) + end


def as_checkpoint(tensors: dict[str, Tensor]) -> Checkpoint:
    """What `load_transformer` takes in place of a path."""
    headers = {
        name: TensorHeader(tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])
        for name, tensor in tensors.items()
    }
    return Checkpoint(NAME, headers, pickled=tensors)


def random_inputs(
    config: WanConfig, size: VideoSize, device: torch.device, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(noise with condition, timestep, text, CLIP features) of one forward, float32."""
    generator = torch.Generator(device).manual_seed(INPUT_SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    _, _, T, H, W = size.latent_shape()
    clip = draw(batch, config.clip_tokens, CLIP_DIM) if config.clip_tokens else None
    timestep = torch.full((batch,), 937.5, device=device)
    x = draw(batch, config.in_dim, T, H, W)
    return x, timestep, draw(batch, TEXT_LEN, config.text_dim), clip
