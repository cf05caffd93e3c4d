"""The header of a safetensors file: names, shapes, dtypes and metadata. Reads no weights.

Every way a download goes wrong (a Git-LFS pointer, a web page, half a file, a header that lies)
becomes one sentence here, before anything is allocated.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError
from ..quant.ggml import BLOCK_TYPES

MAX_HEADER_BYTES = 100_000_000  # the safetensors library refuses longer ones too

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: "BF16", "F8_E4M3", "I8"; or a block type of GGUF

    @property
    def nbytes(self) -> int:
        if block := BLOCK_TYPES.get(self.dtype):
            return math.prod(self.shape) // block.elements * block.nbytes
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class FileHeader:
    tensors: dict[str, TensorHeader]
    metadata: dict[str, str] = field(default_factory=dict)
    file_bytes: int = 0
    starts: dict[str, int] = field(default_factory=dict)  # first byte of each tensor in the file


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def read_header(path: Path) -> FileHeader:
    """Header of one safetensors file. Raises CheckpointError in words for anything else."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            refuse_other_formats(path, start, file_bytes)
            length = int.from_bytes(start[:8], "little")
            if length > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{path.name} is not a whole safetensors file: its header claims {length} bytes"
                    f" and the file has {file_bytes}; download it again"
                )
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return _parse(path.name, raw, file_bytes)


def refuse_other_formats(path: Path, start: bytes, file_bytes: int) -> None:
    """Raise for what is commonly found under a .safetensors name but is none."""
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path.name} is a Git-LFS pointer of {file_bytes} bytes, not the weights; "
            "fetch the real file with `git lfs pull` or download it from the model page"
        )
    # The length that safetensors begins with may look like text, but always holds zeros.
    if start.lstrip()[:1] == b"<" and b"\0" not in start[:8]:
        raise CheckpointError(
            f"{path.name} is a web page, not weights; download the file itself "
            "(a link with /resolve/ in it, logged in where the repository asks for it)"
        )
    if start.startswith(b"GGUF"):
        raise CheckpointError(f"{path.name} is a GGUF file, not safetensors")
    if file_bytes < 10:
        raise CheckpointError(f"{path.name} holds {file_bytes} bytes; download it again")


def _parse(name: str, raw: bytes, file_bytes: int) -> FileHeader:
    try:
        fields = json.loads(raw)
        metadata = dict(fields.pop("__metadata__", {}))
        tensors, spans = {}, []
        for key, entry in fields.items():
            header = TensorHeader(tuple(map(_whole, entry["shape"])), str(entry["dtype"]))
            begin, end = map(_whole, entry["data_offsets"])
            tensors[key] = header
            spans.append((begin, end, key))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{name} is not a safetensors file: its header is not readable ({error}); "
            "check that the file is what its name says, or download it again"
        ) from error
    _check_spans(name, tensors, spans, file_bytes - 8 - len(raw))
    starts = {key: 8 + len(raw) + begin for begin, _, key in spans}
    return FileHeader(tensors, metadata, file_bytes, starts)


def _whole(number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"{str(number)[:20]} is not a size")
    return number


def _check_spans(
    name: str,
    tensors: dict[str, TensorHeader],
    spans: list[tuple[int, int, str]],
    data_bytes: int,
) -> None:
    """Tensors must lie one behind the other, each as long as its shape says, up to the end."""
    expected = 0
    for begin, end, key in sorted(spans):
        header = tensors[key]
        if header.dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"{name}: {key} has dtype {header.dtype}, unknown to this version"
            )
        if min(header.shape, default=0) < 0 or end - begin != header.nbytes or begin != expected:
            raise CheckpointError(
                f"{name}: the header's sizes for {key} contradict each other; download it again"
            )
        expected = end
    if expected > data_bytes:
        raise CheckpointError(
            f"{name} is incomplete: {gigabytes(max(data_bytes, 0))} of {gigabytes(expected)} of"
            " weights are there; download it again"
        )
