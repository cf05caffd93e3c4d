"""GGUF files as ComfyUI-GGUF's converter lays them out, written by the package gguf."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from tests.ggml_blocks import random_blocks

KEEP = "F32"


def is_linear(name: str, tensor: Tensor) -> bool:
    return name.startswith("blocks.") and name.endswith("weight") and tensor.ndim == 2


def blocks_like(tensor: Tensor, kind: str, seed: int) -> np.ndarray:
    """Random blocks in place of a matrix, (rows, bytes), of about the size of its numbers."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = random_blocks(kind, tensor.numel() // elements, seed, 0.02 / math.sqrt(elements))
    return blocks.reshape(tensor.shape[0], tensor.shape[1] // elements * nbytes)


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    kind_of: Callable[[str, Tensor], str],
    architecture: str = "wan",
    fields: Mapping[str, object] | None = None,
) -> dict[str, np.ndarray]:
    """Write `tensors`, those that `kind_of` gives a block type as random blocks; their numbers."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (fields or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, tuple: writer.add_array}
        add[type(value)](key, value)
    numbers = {}
    for seed, (name, tensor) in enumerate(tensors.items()):
        kind = gguf.GGMLQuantizationType[kind_of(name, tensor)]
        if kind.name in ("F32", "F16", "BF16"):
            data = gguf.quants.quantize(tensor.float().numpy(), kind)
        else:
            data = blocks_like(tensor, kind.name, seed)
        numbers[name] = gguf.quants.dequantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers
