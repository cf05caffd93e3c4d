"""GGUF files: header, metadata, and tensors memory-mapped or dequantised.

The header is read here and not by gguf.GGUFReader, which believes what a file claims: an array of
3 million elements that are not there took it 36 s and 2.9 GB of memory on two busy cores, and a
vocabulary as long as UMT5's 16 s. Nothing here imports that package.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..quant.ggml import BLOCK_TYPES, dequantise_blocks
from .headers import MAX_HEADER_BYTES, TensorHeader, gigabytes
from .mapping import MappedFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # where the file names none
MAX_AXES, MAX_NAME_BYTES, MAX_KEY_BYTES = 8, 255, 65535
# A name, axes, type and offset; a key, type and value: the fewest bytes each can take.
LEAST_TENSOR_BYTES, LEAST_FIELD_BYTES = 24, 13
SHAPE_KEY = "comfy.gguf.orig_shape."  # of tensors that were reshaped to be quantised

# Numbers of ggml's types (enum ggml_type in ggml/include/ggml.h), plain ones as safetensors says.
TYPES = {
    **{0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"},
    **{2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"},
    **{12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS"},
    **{18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"},
    **{29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}
TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
# Numbers of the types of metadata values, with struct's letter for those of a fixed size.
SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9

Scalar = str | int | float | bool


class Span(NamedTuple):
    """An array in the header: type of its values, how many, and the bytes they are in."""

    kind: int
    count: int
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class GgufFile:
    """What the header says. Arrays stay where they are until they are asked for."""

    path: Path
    headers: dict[str, TensorHeader]
    fields: dict[str, Scalar]
    arrays: dict[str, Span] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)  # tensor name -> first byte

    @property
    def metadata(self) -> dict[str, str]:
        return {key: str(value) for key, value in self.fields.items()}

    def array(self, key: str) -> list[Scalar] | None:
        """The values of an array in the metadata, None where there is none of that name."""
        if (span := self.arrays.get(key)) is None:
            return None
        with self.path.open("rb") as file:
            file.seek(span.start)
            raw = file.read(span.end - span.start)
        if span.kind == STRING:
            cursor = Cursor(raw, len(raw))
            return [cursor.text() for _ in range(span.count)]
        return list(struct.unpack(f"<{span.count}{SCALARS[span.kind]}", raw))

    def tensors(
        self,
        names: Mapping[str, str],
        packed: Container[str] = (),
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        """Tensors by wanted name. Plain ones are memory-mapped; blocks are dequantised to `dtype`,
        but for the wanted names in `packed`, which are memory-mapped rows of blocks, uint8."""
        found = {}
        for wanted, stored in names.items():
            header, data = self.headers[stored], self._bytes(stored)
            if header.dtype not in BLOCK_TYPES:
                found[wanted] = _view(data, TORCH_DTYPES[header.dtype]).reshape(header.shape)
            elif wanted in packed:
                found[wanted] = data.reshape(header.shape[0], -1)
            else:
                found[wanted] = dequantise_blocks(data, header.dtype, header.shape, dtype)
        return found

    def _bytes(self, name: str) -> Tensor:
        start = self.starts[name]
        return self._mapped[start : start + self.headers[name].nbytes]

    @cached_property
    def _mapped(self) -> Tensor:
        """The whole file as uint8, mapped copy-on-write: pages are read when they are used."""
        return MappedFile(self.path).tensor(0, torch.uint8, (self.path.stat().st_size,))


def _view(data: Tensor, dtype: torch.dtype) -> Tensor:
    aligned = data.storage_offset() % dtype.itemsize == 0
    return (data if aligned else data.clone()).view(dtype)


class DamagedError(Exception):
    """What is wrong with a header, in words without the file's name."""


class Cursor:
    """Reads a header from front to back and never past its end."""

    def __init__(self, data: bytes | mmap.mmap, limit: int) -> None:
        self.data, self.limit, self.at = data, limit, 0

    def skip(self, count: int) -> None:
        if count > self.limit - self.at:
            raise DamagedError(f"the header does not end within the first {self.limit} bytes")
        self.at += count

    def take(self, count: int) -> bytes:
        self.skip(count)
        return self.data[self.at - count : self.at]

    def number(self, letter: str) -> int:
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter)))[0]

    def count(self, what: str, least_bytes: int) -> int:
        """How many of something follow, each of which takes at least `least_bytes`."""
        count = self.number("Q")
        if count * least_bytes > self.limit - self.at:
            raise DamagedError(f"the header claims {count} {what}, more than fit into the file")
        return count

    def name(self, what: str, most: int) -> str:
        length = self.number("Q")
        if length > most:
            raise DamagedError(f"the header claims {length} bytes for the name of a {what}")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedError(f"the name of a {what} is not text") from error

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")


class Entry(NamedTuple):
    """One tensor as the header has it: axes in ggml's order, the fastest first."""

    name: str
    axes: tuple[int, ...]
    type: int
    offset: int


def read_gguf(path: Path) -> GgufFile:
    """Header of one GGUF file. Raises CheckpointError in words for anything else."""
    try:
        size = path.stat().st_size
        if size < 24:
            raise CheckpointError(f"{path.name} holds {size} bytes; download it again")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(path, Cursor(data, min(size, MAX_HEADER_BYTES)), size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except DamagedError as error:
        raise CheckpointError(
            f"{path.name} is not a whole GGUF file: {error}; download it again"
        ) from error


def _parse(path: Path, cursor: Cursor, size: int) -> GgufFile:
    _check_version(path.name, cursor)
    tensor_count = cursor.count("tensors", LEAST_TENSOR_BYTES)
    field_count = cursor.count("metadata fields", LEAST_FIELD_BYTES)
    fields: dict[str, Scalar] = {}
    arrays: dict[str, Span] = {}
    for _ in range(field_count):
        key = cursor.name("field", MAX_KEY_BYTES)
        if key in fields or key in arrays:
            raise DamagedError(f"it holds the field {key[:60]} twice")
        value = _read_value(cursor)
        if isinstance(value, Span):
            arrays[key] = value
        else:
            fields[key] = value
    _check_parts(path.name, fields)
    entries = [_read_entry(cursor) for _ in range(tensor_count)]
    alignment = fields.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise DamagedError(f"its alignment is {str(alignment)[:20]}, not a power of two")
    begin = _aligned(cursor.at, alignment)
    starts = _place(entries, begin, alignment, path.name, size)
    file = GgufFile(path, {}, fields, arrays, starts)
    for entry in entries:
        file.headers[entry.name] = _header(entry, file)
    _check_patches(file)
    return file


def _check_version(name: str, cursor: Cursor) -> None:
    if cursor.take(4) != MAGIC:
        raise CheckpointError(f"{name} is not a GGUF file; check that it is what its name says")
    version = cursor.number("I")
    if version not in VERSIONS:
        kind = "big-endian" if version and not version & 0xFFFF else f"version {version}"
        raise CheckpointError(
            f"{name} is a {kind} GGUF file; this version reads 2 and 3, little-endian: "
            "use a newer file of the same model"
        )


def _check_parts(name: str, fields: Mapping[str, Scalar]) -> None:
    if (count := fields.get("split.count", 1)) not in (0, 1):
        raise CheckpointError(
            f"{name} is one of {str(count)[:20]} parts of a split GGUF file; join them with "
            "llama-gguf-split --merge and load the result"
        )


def _read_value(cursor: Cursor) -> Scalar | Span:
    kind = cursor.number("I")
    if kind == STRING:
        return cursor.text()
    if kind in SCALARS:
        return cursor.number(SCALARS[kind])
    if kind != ARRAY:
        raise DamagedError(f"a field has a value of unknown type {kind}")
    inner = cursor.number("I")
    if inner != STRING and inner not in SCALARS:
        raise DamagedError(f"a field is an array of unknown type {inner}")
    width = 8 if inner == STRING else struct.calcsize("<" + SCALARS[inner])
    count = cursor.count("values in an array", width)
    start = cursor.at
    if inner == STRING:
        for _ in range(count):
            cursor.skip(cursor.number("Q"))
    else:
        cursor.skip(count * width)
    return Span(inner, count, start, cursor.at)


def _read_entry(cursor: Cursor) -> Entry:
    name = cursor.name("tensor", MAX_NAME_BYTES)
    count = cursor.number("I")
    if count > MAX_AXES:
        raise DamagedError(f"tensor {name} claims {count} axes")
    axes = tuple(cursor.number("Q") for _ in range(count))
    if 0 in axes:
        raise DamagedError(f"tensor {name} has an axis of length 0")
    return Entry(name, axes, cursor.number("I"), cursor.number("Q"))


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _place(
    entries: list[Entry], begin: int, alignment: int, source: str, size: int
) -> dict[str, int]:
    """First byte of each tensor. They lie one behind the other, as llama.cpp demands too."""
    starts: dict[str, int] = {}
    end = begin
    for entry in entries:
        start = _aligned(end - begin, alignment)
        if entry.name in starts:
            raise DamagedError(f"it holds the tensor {entry.name} twice")
        if entry.offset != start:
            raise DamagedError(f"the header's sizes for {entry.name} contradict each other")
        starts[entry.name] = begin + start
        end = begin + start + _stored_bytes(entry, source)
    if end > size:
        raise CheckpointError(
            f"{source} is incomplete: {gigabytes(max(size - begin, 0))} of {gigabytes(end - begin)}"
            " of weights are there; download it again"
        )
    return starts


def _stored_bytes(entry: Entry, source: str) -> int:
    name = TYPES.get(entry.type)
    if name is None or (name not in BLOCK_TYPES and name not in TORCH_DTYPES):
        what = f"type {name}" if name else f"a type of number {entry.type}"
        raise CheckpointError(
            f"{source}: {entry.name} is stored in {what}, which this version does not read; "
            f"use a file in {', '.join(('F16', 'BF16', *BLOCK_TYPES))}"
        )
    if name in BLOCK_TYPES and (not entry.axes or entry.axes[0] % BLOCK_TYPES[name].elements):
        raise DamagedError(f"the rows of {entry.name} are no whole blocks of {name}")
    return TensorHeader(entry.axes, name).nbytes


def _header(entry: Entry, file: GgufFile) -> TensorHeader:
    shape = entry.axes[::-1]
    if original := file.array(SHAPE_KEY + entry.name):
        whole = [side for side in original if isinstance(side, int) and side > 0]
        if len(whole) != len(original) or math.prod(whole) != math.prod(shape):
            raise DamagedError(f"the two shapes of {entry.name} contradict each other")
        shape = tuple(whole)
    return TensorHeader(shape, TYPES[entry.type])


def _check_patches(file: GgufFile) -> None:
    """Converters leave out the tensor of five axes, which a second tool has to put back."""
    ends = {name.rpartition("patch_embedding.")[2] for name in file.headers if "patch_emb" in name}
    if ends == {"bias"}:
        raise CheckpointError(
            f"{file.path.name} lacks patch_embedding.weight: the last step of its conversion "
            "(fix_5d_tensors.py of ComfyUI-GGUF) was left out; use another file of this model"
        )
