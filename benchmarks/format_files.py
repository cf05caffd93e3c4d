"""Files of one transformer in every number format that is read, each by whoever can write it.

`quantize` writes what it can. Forms of others come from independent code: PyTorch's float8, the
formulas in tests/unit/checkpoint/block_forms.py, and ggml's own quantiser for K and IQ types.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightx2v_core.checkpoint.convert import SCHEMES, is_quantised, quantise_file
from lightx2v_core.checkpoint.gguf_writing import GGUF_SCHEMES, PREFIX, stored_type
from lightx2v_core.checkpoint.headers import TensorHeader
from lightx2v_core.checkpoint.source import DTYPE_NAMES
from lightx2v_core.checkpoint.stored import PLAIN_SCHEMES
from lightx2v_core.errors import CapabilityError
from tests.unit.checkpoint.block_forms import as_file

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LIMITS = {E4M3: 448.0, torch.int8: 127.0}
# Types that llama.cpp's package reads and does not write.
GGML_TYPES = (
    *("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS"),
    *("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "NVFP4"),
)
# What `detect` calls that which `quantize` calls otherwise.
DETECTED_AS = {"fp8": "fp8-row", "int8": "int8-row"} | {
    f"{PREFIX}{kind}": scheme for kind, scheme in PLAIN_SCHEMES.items()
}
SOURCE = "fp16"
Weights = Mapping[str, Tensor]
Make = Callable[[Path, Path], Path]  # source file, folder -> the file or folder that was made


@dataclass(frozen=True, slots=True)
class Form:
    """One row: what `detect` is to call it, who writes it, and how."""

    scheme: str
    writer: str
    make: Make


def forms(ggml: Path | None = None) -> dict[str, Form]:
    """Every row by its name, the source first. `ggml` is ggml's shared library (libggml-base)."""
    rows = {SOURCE: Form("fp16", "the source itself", lambda source, _folder: source)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rows[name] = Form(name, "PyTorch", _from_weights(partial(_cast_all, dtype)))
    for scheme in SCHEMES:
        expected = DETECTED_AS.get(scheme, scheme)
        rows[scheme] = Form(expected, "`quantize`", partial(_quantise, scheme))
    made: dict[str, tuple[str, Callable[[Weights], dict[str, Tensor]]]] = {
        "fp8, block-split folder": ("fp8-row", partial(_by_row, E4M3, "")),
        "fp8-row, comfy_quant": ("fp8-row", partial(_by_row, E4M3, "float8_e4m3fn_rowwise")),
        "fp8-tensor, comfy_quant": ("fp8-tensor", partial(_by_tensor, E4M3, "float8_e4m3fn")),
        "int8-tensor, comfy_quant": (
            "int8-tensor",
            partial(_by_tensor, torch.int8, "int8_tensorwise"),
        ),
        "fp8-cast": ("fp8-cast", partial(_cast_linears, E4M3)),
        "fp8-e5m2": ("fp8-e5m2", partial(_cast_linears, E5M2)),
    }
    for name, (scheme, change) in made.items():
        write = _write_folder if "folder" in name else _write_file
        rows[name] = Form(scheme, "PyTorch's formulas", _from_weights(change, write))
    blocks = {"lightx2v": "LightX2V", "export": "LightX2V, export", "comfy": "ComfyUI"}
    for dialect, title in blocks.items():
        change = partial(_in_blocks, dialect)
        rows[f"NVFP4, {title}"] = Form("nvfp4", "formulas in tests", _from_weights(change))
    change = partial(_in_blocks, "mxfp8")
    rows["MXFP8, ComfyUI"] = Form("mxfp8", "formulas in tests", _from_weights(change))
    for kind in GGML_TYPES:
        rows[PREFIX + kind] = Form(PREFIX + kind, "ggml", partial(_by_ggml, kind, ggml))
    return rows


def linears(weights: Weights) -> list[str]:
    """The names that every quantised form turns into codes."""
    return [name for name, tensor in weights.items() if is_quantised(name, _header(tensor))]


def _header(tensor: Tensor) -> TensorHeader:
    return TensorHeader(tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])


def _quantise(scheme: str, source: Path, folder: Path) -> Path:
    ending = "gguf" if scheme in GGUF_SCHEMES else "safetensors"
    target = folder / f"{source.stem}_{scheme}.{ending}"
    quantise_file(source, target, scheme)
    return target


def _write_file(tensors: dict[str, Tensor], folder: Path) -> Path:
    path = folder / "wan2.1_t2v.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def _write_folder(tensors: dict[str, Tensor], folder: Path) -> Path:
    """LightX2V's block-split layout: a file for each block, and one for the rest."""
    path = folder / "wan2.1_t2v_blocks"
    path.mkdir()
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        block = re.match(r"blocks\.(\d+)\.", name)
        file = f"block_{block.group(1)}" if block else "non_block"
        files.setdefault(file, {})[name] = tensor.contiguous()
    for file, inside in files.items():
        save_file(inside, path / f"{file}.safetensors")
    return path


def _from_weights(
    change: Callable[[Weights], dict[str, Tensor]],
    write: Callable[[dict[str, Tensor], Path], Path] = _write_file,
) -> Make:
    return lambda source, folder: write(change(load_file(source)), folder)


def _cast_all(dtype: torch.dtype, weights: Weights) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def _cast_linears(dtype: torch.dtype, weights: Weights) -> dict[str, Tensor]:
    return dict(weights) | {name: weights[name].to(dtype) for name in linears(weights)}


def _codes(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    divided = (weight.float() / scale).clamp(-LIMITS[dtype], LIMITS[dtype])
    return (divided.round() if dtype == torch.int8 else divided).to(dtype)


def _by_row(dtype: torch.dtype, described: str, weights: Weights) -> dict[str, Tensor]:
    tensors = dict(weights)
    for name in linears(weights):
        scale = weights[name].float().abs().amax(dim=1, keepdim=True).clamp_min(1e-5)
        scale = scale / LIMITS[dtype]
        tensors[name] = _codes(weights[name], scale, dtype)
        tensors[f"{name}_scale"] = scale
    return tensors | _descriptions(weights, described)


def _by_tensor(dtype: torch.dtype, described: str, weights: Weights) -> dict[str, Tensor]:
    tensors = dict(weights)
    for name in linears(weights):
        scale = weights[name].float().abs().amax() / LIMITS[dtype]
        tensors[name] = _codes(weights[name], scale, dtype)
        tensors[f"{name}_scale"] = scale
    return tensors | _descriptions(weights, described)


def _descriptions(weights: Weights, described: str) -> dict[str, Tensor]:
    """ComfyUI's JSON beside each layer; nothing for an empty name."""
    if not described:
        return {}
    text = torch.frombuffer(
        bytearray(json.dumps({"format": described}).encode()), dtype=torch.uint8
    )
    return {f"{n.removesuffix('weight')}comfy_quant": text.clone() for n in linears(weights)}


def _in_blocks(form: str, weights: Weights) -> dict[str, Tensor]:
    names = linears(weights)
    wide = dict(weights) | {name: weights[name].float() for name in names}
    return as_file(wide, names, form)


def _by_ggml(kind: str, library: Path | None, source: Path, folder: Path) -> Path:
    """Linears of the blocks by ggml_quantize_chunk, the rest as `quantize` stores it.

    https://github.com/ggml-org/ggml/blob/master/include/ggml.h
    """
    if library is None:
        raise CapabilityError(
            f"gguf-{kind} is written by ggml's own quantiser alone; give --ggml libggml-base.so"
        )
    import gguf

    path = folder / f"{source.stem}_{kind}.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in load_file(source).items():
        stored = gguf.GGMLQuantizationType[stored_type(name, _header(tensor), kind)]
        if stored.name == kind:
            data = _quantise_rows(library, stored, tensor)
        else:
            data = gguf.quants.quantize(tensor.float().numpy(), stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _quantise_rows(library: Path, kind: int, weight_MK: Tensor) -> object:
    """Rows of blocks, uint8. Types that need an importance matrix get one of ones."""
    import gguf
    import numpy as np

    ggml = ctypes.CDLL(str(library))
    quantise, needs_matrix = ggml.ggml_quantize_chunk, ggml.ggml_quantize_requires_imatrix
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    quantise.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    quantise.restype, needs_matrix.restype = ctypes.c_size_t, ctypes.c_bool
    values = np.ascontiguousarray(weight_MK.float().numpy())
    rows, columns = values.shape
    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    blocks = np.zeros((rows, columns // elements * nbytes), np.uint8)
    matrix = np.ones(columns, np.float32)
    given = matrix.ctypes.data if needs_matrix(int(kind)) else None
    quantise(int(kind), values.ctypes.data, blocks.ctypes.data, 0, rows, columns, given)
    return blocks
