"""Transformers into GGUF files as ComfyUI-GGUF reads them, by llama.cpp's own package.

Official names; the matrices of the blocks in the type that is asked for; vectors, small tensors,
modulation and the patch embedding, which keeps its five axes, in F32; other matrices as they are.
https://github.com/city96/ComfyUI-GGUF/blob/main/tools/convert.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CapabilityError, CheckpointError
from ..quant.ggml import BLOCK_TYPES
from ..quant.gguf_package import gguf_package
from .headers import TensorHeader
from .source import DTYPE_NAMES, Checkpoint
from .writing import replacing

if TYPE_CHECKING:
    import numpy as np

    from ..quant.gguf_package import GGUFWriter

PREFIX = "gguf-"
# What gguf.quants can write; the TQ types are for models trained to be ternary.
WRITTEN_TYPES = (
    *("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "MXFP4", "TQ2_0", "TQ1_0"),
    *("BF16", "F16", "F32"),
)
GGUF_SCHEMES = tuple(PREFIX + name for name in WRITTEN_TYPES)
ARCHITECTURE = "wan"
READ_TYPES = ("F32", "F16", "BF16")
CHUNK = 2**22  # elements converted at a time
SMALL = 1024  # elements, up to which a tensor is not worth a type of fewer bits
NEEDED_FOR = "writing a GGUF file"
# Of the numbers of general.file_type that do not follow from the type's name.
FILE_TYPES = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}


def stored_type(name: str, header: TensorHeader, wanted: str) -> str:
    """The type in which the tensor `name` is written when `wanted` is the type of the blocks."""
    shape = header.shape
    if len(shape) != 2 or math.prod(shape) <= SMALL or "modulation" in name:
        return "F32"
    if not (name.startswith("blocks.") and name.endswith(".weight")):
        return header.dtype
    if wanted in BLOCK_TYPES and shape[1] % BLOCK_TYPES[wanted].elements:
        return header.dtype
    return wanted


def write_gguf(
    target: Path,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    scheme: str,
    on_tensor: Callable[[int, int], None],
) -> None:
    """Write `target`, one tensor at a time.

    `names` maps official names to those in `checkpoint`. Raises CapabilityError when the package
    gguf is not there or too old, CheckpointError for numbers the type cannot hold and a full disk.
    """
    main, headers = scheme.removeprefix(PREFIX), {}
    for name, stored in names.items():
        header = checkpoint.headers[stored]
        if header.dtype not in READ_TYPES:
            raise CheckpointError(
                f"{checkpoint.name} holds {name} in {header.dtype}; give a file that is in "
                f"{', '.join(READ_TYPES)} throughout"
            )
        headers[name] = TensorHeader(header.shape, stored_type(name, header, main))
    total = sum(header.nbytes for header in headers.values())
    source = checkpoint.name
    with replacing(target, total) as part:
        writer = start_gguf(part, headers, checkpoint.metadata, scheme)
        try:
            done = 0
            for name, stored in names.items():
                tensor = checkpoint.tensors({name: stored})[name]
                writer.write_tensor_data(_encode(tensor, headers[name].dtype, name, source))
                done += headers[name].nbytes
                on_tensor(done, total)
        finally:
            writer.close()


def start_gguf(
    path: Path, headers: Mapping[str, TensorHeader], metadata: Mapping[str, str], scheme: str
) -> GGUFWriter:
    """A writer behind the header, waiting for the tensors in the order of `headers`."""
    package, main = gguf_package(NEEDED_FOR), scheme.removeprefix(PREFIX)
    if not hasattr(package.GGMLQuantizationType, main):
        raise CapabilityError(
            f"the installed package gguf does not know the type {main}; "
            "update it: pip install -U gguf"
        )
    writer = package.GGUFWriter(None, ARCHITECTURE)
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    file_type = getattr(package.LlamaFileType, FILE_TYPES.get(main, f"MOSTLY_{main}"), None)
    if file_type is not None:
        writer.add_file_type(file_type)
    for key, value in metadata.items():
        if key.startswith(("lightx2v.", "modelspec.")):
            writer.add_string(key, value)
    writer.add_string("lightx2v.quantised", scheme)
    for name, header in headers.items():
        # The dtype, None here, is not looked at where the type is given.
        kind = package.GGMLQuantizationType[header.dtype]
        writer.add_tensor_info(name, header.shape, None, header.nbytes, kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _encode(tensor: Tensor, kind: str, name: str, source: str) -> np.ndarray:
    """The bytes of `tensor` in the type `kind`; as they are where that is its own."""
    import numpy as np

    package = gguf_package(NEEDED_FOR)
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1).contiguous()
    if DTYPE_NAMES[tensor.dtype] == kind:
        return rows.view(torch.uint8).numpy()
    pieces = []
    for piece in rows.split(max(CHUNK // rows.shape[1], 1)):
        wide = piece.float()
        if not torch.isfinite(wide).all():
            raise CheckpointError(
                f"{source}: {name} holds numbers that are not finite; download it again"
            )
        if kind == "F16" and wide.abs().amax() > torch.finfo(torch.float16).max:
            raise CheckpointError(
                f"{source}: {name} holds {wide.abs().amax():.3g}, beyond what F16 can; "
                "use gguf-BF16"
            )
        pieces.append(package.quants.quantize(wide.numpy(), package.GGMLQuantizationType[kind]))
    return np.concatenate(pieces)
