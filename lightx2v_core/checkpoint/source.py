"""Opens a checkpoint, whatever its container: a file, shards with an index, a folder, a pickle.

Gives headers first and tensors by name afterwards. Safetensors and GGUF stay memory-mapped; pickles
are read with ``weights_only=True`` and never run code.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, preview
from .gguf import MAGIC, GgufFile, read_gguf
from .headers import TensorHeader, read_header, refuse_other_formats
from .mapping import MappedFile

PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".tar"}
SHOWN = 80  # characters of a damaged name that a message shows
# Where a training checkpoint keeps the weights, most wanted first.
PICKLE_WRAPPERS = ("generator_ema", "generator", "model", "state_dict")
# Folders inside LightX2V's older distilled repositories, the full-precision one first.
DISTILL_FOLDERS = ("distill_models", "original")
DISTILL_FILES = ("distill_model.safetensors", "distill_model.pt")
# One file of many: a shard, a block or the rest of LightX2V's split folders, a numbered part.
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
BLOCK = re.compile(r"^block_(\d+)\.safetensors$")
REST = "non_block.safetensors"
NUMBERED = re.compile(r"_part\d+\.safetensors$")
# What lies beside a transformer in an official model folder.
NOT_TRANSFORMERS = ("vae", "t5", "clip", "lora", "tae")

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", torch.uint8),  # PyTorch 2.7 and later
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Headers of all tensors, and where each one is. `name` is what messages call it."""

    path: Path
    headers: dict[str, TensorHeader]
    metadata: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)  # tensor name -> safetensors file
    starts: dict[str, int] = field(default_factory=dict)  # tensor name -> first byte there
    _maps: dict[Path, MappedFile] = field(default_factory=dict)
    pickled: Mapping[str, Tensor] = field(default_factory=dict)
    gguf: GgufFile | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def nbytes(self) -> int:
        return sum(header.nbytes for header in self.headers.values())

    def tensors(
        self,
        names: Mapping[str, str],
        packed: Container[str] = (),
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        """Tensors by wanted name; `names` maps wanted name -> name in the file. Memory-mapped.

        Block types of GGUF come dequantised in `dtype`, but for the wanted names in `packed`: those
        stay rows of blocks.
        """
        if self.gguf is not None:
            return self.gguf.tensors(names, packed, dtype)
        found = {k: self.pickled[v] for k, v in names.items() if v in self.pickled}
        for wanted, stored in names.items():
            if stored in self.files:
                found[wanted] = self._mapped(stored)
        return found

    def _mapped(self, stored: str) -> Tensor:
        path, header = self.files[stored], self.headers[stored]
        if path not in self._maps:
            self._maps[path] = MappedFile(path)
        return self._maps[path].tensor(self.starts[stored], DTYPES[header.dtype], header.shape)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a file or a folder; for one file of many, all of them.

    Raises CheckpointError when it is not there or not whole.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; check the path")
    path = whole(path)
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(".index.json"):
        return _open_index(path)
    if path.suffix == ".gguf" or _starts_with(path, MAGIC):
        return _open_gguf(path)
    if path.suffix in PICKLES:
        return _open_pickle(path)
    header = read_header(path)
    files = dict.fromkeys(header.tensors, path)
    return Checkpoint(path, header.tensors, header.metadata, files, header.starts)


def whole(path: Path) -> Path:
    """The folder, for a file that is one of many; else `path` itself."""
    name, folder = path.name, path.parent
    if not path.is_file():
        return path
    if SHARD.search(name) or (BLOCK.match(name) and (folder / REST).is_file()):
        return folder
    if name == REST and any(BLOCK.match(other.name) for other in folder.iterdir()):
        return folder
    return folder if NUMBERED.search(name) and any(folder.glob("*.index.json")) else path


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _open_gguf(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        start = file.read(64)
    if not start.startswith(MAGIC):
        refuse_other_formats(path, start, path.stat().st_size)
    gguf = read_gguf(path)
    return Checkpoint(path, gguf.headers, gguf.metadata, gguf=gguf)


def _open_folder(folder: Path) -> Checkpoint:
    """An index, else LightX2V's distilled layouts, else every safetensors file that fits."""
    for candidate in [folder, *(folder / name for name in DISTILL_FOLDERS)]:
        if indexes := sorted(candidate.glob("*.safetensors.index.json")):
            return _open_index(indexes[0])
        if distilled := [candidate / f for f in DISTILL_FILES if (candidate / f).is_file()]:
            return open_checkpoint(distilled[0])
        everything = sorted(candidate.glob("*.safetensors"))
        if split := [p for p in everything if BLOCK.match(p.name) or p.name == REST]:
            _check_split(candidate, split)
            return _join(candidate, split)
        parts = [p for p in everything if not _is_beside(p.name.lower())]
        if everything:
            return _join(candidate, parts or everything)
    raise CheckpointError(
        f"{folder} holds no safetensors weights and no index; it has "
        f"{preview(p.name for p in folder.iterdir()) or 'nothing'}. Name the file itself, or the "
        "folder of one model (for Wan 2.2: high_noise_model or low_noise_model)"
    )


def _check_split(folder: Path, parts: list[Path]) -> None:
    """Every block up to the last, and what is no block, must be there."""
    blocks = {int(match.group(1)) for p in parts if (match := BLOCK.match(p.name))}
    expected = {f"block_{n}.safetensors" for n in range(max(blocks, default=0) + 1)} | {REST}
    if absent := expected - {p.name for p in parts}:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of {len(expected)} files of a block-split model "
            f"({preview(absent)}); download them too"
        )


def _is_beside(name: str) -> bool:
    return any(word in name for word in NOT_TRANSFORMERS)


def _open_index(index: Path) -> Checkpoint:
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        files = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        why = " ".join(str(error).split())[:SHOWN]
        raise CheckpointError(
            f"{index.name} is not a safetensors index ({why}); download it again"
        ) from error
    if not files:
        raise CheckpointError(f"{index.name} lists no tensors; download it again")
    shown = preview(name[:SHOWN] for name in files)
    if any(Path(name).name != name or "\0" in name for name in files):
        raise CheckpointError(f"{index.name} names files outside its folder: {shown}")
    here = {path.name for path in index.parent.iterdir() if path.is_file()}
    paths = [index.parent / name for name in files]
    if absent := [name[:SHOWN] for name in files if name not in here]:
        raise CheckpointError(
            f"{index.parent} lacks {len(absent)} of {len(paths)} shards ({preview(absent)}); "
            "download them too"
        )
    checkpoint = _join(index.parent, paths)
    if unlisted := weight_map.keys() - checkpoint.headers.keys():
        raise CheckpointError(
            f"{index.name} lists {len(unlisted)} tensors that no shard holds "
            f"({preview(name[:SHOWN] for name in unlisted)}); download the shards again"
        )
    return checkpoint


def _join(folder: Path, paths: list[Path]) -> Checkpoint:
    headers: dict[str, TensorHeader] = {}
    files: dict[str, Path] = {}
    starts: dict[str, int] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        header = read_header(path)
        if twice := headers.keys() & header.tensors.keys():
            raise CheckpointError(
                f"{files[min(twice)].name} and {path.name} in {folder} both hold {preview(twice)}; "
                "they are two models: name one of the files"
            )
        headers |= header.tensors
        metadata |= header.metadata
        files |= dict.fromkeys(header.tensors, path)
        starts |= header.starts
    return Checkpoint(paths[0] if len(paths) == 1 else folder, headers, metadata, files, starts)


def _open_pickle(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        refuse_other_formats(path, file.read(64), path.stat().st_size)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name} holds more than weights, and loading it would run code from the file; "
            "use the safetensors form of this model"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        if "unable to mmap" in str(error):
            raise CheckpointError(
                f"{path.name} is larger than this system maps for PyTorch ({error}); use the "
                "safetensors form of this model, which needs no RAM to load"
            ) from error
        raise CheckpointError(
            f"{path.name} is not a whole PyTorch file ({str(error).splitlines()[0]}); "
            "download it again"
        ) from error
    tensors = _unwrap(loaded, path.name)
    headers = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{path.name}: {name} has dtype {tensor.dtype}, unknown here")
        headers[name] = TensorHeader(tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])
    return Checkpoint(path, headers, pickled=tensors)


def _is_zip(path: Path) -> bool:
    return _starts_with(path, b"PK\x03\x04")  # older pickles cannot be mapped


def _unwrap(loaded: object, name: str) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping):
        for wrapper in PICKLE_WRAPPERS:
            if isinstance(loaded.get(wrapper), Mapping):
                return _unwrap(loaded[wrapper], name)
        tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
        if tensors:
            return tensors
    raise CheckpointError(f"{name} holds no tensors; it is not a model file")
