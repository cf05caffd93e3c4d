"""A transformer or text encoder into one of fewer bits, one tensor in memory at a time.

Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, RequestError
from ..quant.formats import MARKER
from ..quant.quantise import WRITTEN, WrittenScheme
from ..quant.schemes import PLAIN
from .detect import detect
from .gguf_writing import GGUF_SCHEMES, write_gguf
from .headers import ITEM_BYTES, TensorHeader
from .layouts import official_names
from .source import DTYPE_NAMES, Checkpoint, open_checkpoint
from .writing import replacing

# The linears of a UMT5 encoder by their official names, and by those of transformers.
TEXT_LINEAR = re.compile(
    r"(^|\.)(attn|SelfAttention)\.[qkvo]\.weight$"
    r"|(^|\.)(ffn|DenseReluDense)\.(gate\.0|fc1|fc2|wi_0|wi_1|wo)\.weight$"
)
ALIGNMENT = 8  # of the first tensor, as the safetensors library pads
SCHEMES = (*WRITTEN, *GGUF_SCHEMES)
OnTensor = Callable[[int, int], None]  # bytes written, bytes in all


def _ignore(done: int, total: int) -> None:
    """Default progress callback."""


def quantise_file(
    source: str | Path, target: str | Path, scheme: str, on_tensor: OnTensor = _ignore
) -> None:
    """Write `source` to `target` with the linears of its blocks quantised; a transformer gets
    official names.

    The rest keeps its dtype, but for what GGUF wants in F32. Raises RequestError for a target that
    exists or an unknown scheme, and CheckpointError for a source that is no full-precision Wan
    transformer or UMT5 encoder (that one not as GGUF) or a disk that is full; nothing half-written
    is left.
    """
    target = Path(target)
    if scheme not in SCHEMES:
        raise RequestError(f"scheme {scheme!r} cannot be written; use {', '.join(SCHEMES)}")
    if target.exists():
        raise RequestError(f"{target} exists already; remove it or choose another name")
    ending = ".gguf" if scheme in GGUF_SCHEMES else ".safetensors"
    if target.suffix != ending:
        raise RequestError(f"{target} must end in {ending}")
    checkpoint = open_checkpoint(source)
    info = detect(checkpoint)
    is_text = info.kind == "text encoder" and scheme not in GGUF_SCHEMES and not info.unusable
    if info.scheme not in PLAIN or not (is_text or info.kind == "transformer"):
        or_text = "" if scheme in GGUF_SCHEMES else " or UMT5 encoder"
        raise CheckpointError(
            f"{checkpoint.name} is {info.describe()}; give a Wan transformer{or_text} in "
            f"{', '.join(PLAIN)}"
        )
    _, names = official_names(checkpoint.headers) or ("", {n: n for n in checkpoint.headers})
    if scheme in GGUF_SCHEMES:
        write_gguf(target, checkpoint, names, scheme, on_tensor)
        return
    metadata = {**checkpoint.metadata, "lightx2v.quantised": scheme}
    written = WRITTEN[scheme]
    write_safetensors(
        target,
        _headers(checkpoint, names, written),
        _tensors(checkpoint, names, written),
        metadata,
        on_tensor,
    )


def is_quantised(name: str, header: TensorHeader) -> bool:
    """Whether a tensor of that name is one of the linears that are turned into codes: of a
    transformer by its official name, or of a text encoder."""
    if len(header.shape) != 2:
        return False
    is_block = name.startswith("blocks.") and name.endswith(".weight")
    return bool(TEXT_LINEAR.search(name)) or (is_block and "pos_embedding" not in name)


def _headers(
    checkpoint: Checkpoint, names: dict[str, str], scheme: WrittenScheme
) -> dict[str, TensorHeader]:
    """In the order in which `_tensors` gives them."""
    headers: dict[str, TensorHeader] = {}
    for name, stored in names.items():
        header = checkpoint.headers[stored]
        if not is_quantised(name, header):
            headers[name] = header
            continue
        headers[name] = TensorHeader(header.shape, DTYPE_NAMES[scheme.dtype])
        scale = name.removesuffix("weight") + scheme.scale_leaf
        headers[scale] = TensorHeader(scheme.scale_shape(header.shape[0]), "F32")
    if scheme.marker:
        headers[MARKER] = TensorHeader((2,), DTYPE_NAMES[scheme.dtype])
    return headers


def _tensors(
    checkpoint: Checkpoint, names: dict[str, str], scheme: WrittenScheme
) -> Iterator[Tensor]:
    for name, stored in names.items():
        tensor = checkpoint.tensors({name: stored})[name]
        if is_quantised(name, checkpoint.headers[stored]):
            yield from scheme.quantise(tensor)
        else:
            yield tensor
    if scheme.marker:
        yield torch.zeros(2).to(scheme.dtype)


def write_safetensors(
    target: Path,
    headers: dict[str, TensorHeader],
    tensors: Iterator[Tensor],
    metadata: dict[str, str],
    on_tensor: OnTensor = _ignore,
) -> None:
    """Write `target` from `tensors` in the order of `headers`, one at a time in memory.

    Raises CheckpointError when the disk does not take it; nothing half-written is left.
    """
    table: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, header in headers.items():
        size = math.prod(header.shape) * ITEM_BYTES[header.dtype]
        offsets = [end, end + size]
        table[name] = {"dtype": header.dtype, "shape": header.shape, "data_offsets": offsets}
        end += size
    raw = json.dumps(table).encode()
    raw += b" " * (-len(raw) % ALIGNMENT)
    with replacing(target, end) as part, part.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        done = 0
        for tensor in tensors:
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            file.write(flat.numpy().data)
            done += flat.numel()
            on_tensor(done, end)
