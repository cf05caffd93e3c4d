"""The names quantised files add (scales, markers, formats), in the forms that are published.

Decided from headers and metadata; only the few bytes of `comfy_quant` descriptions are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..errors import CheckpointError, preview
from ..quant.formats import DESCRIPTION, MARKER, UNUSED, check_description, check_format
from ..quant.ggml import BLOCK_TYPES
from .headers import TensorHeader

CODE_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
}
METADATA_KEY = "_quantization_metadata"


@dataclass(frozen=True, slots=True)
class Codes:
    """How one linear is stored: dtype of its codes and shape of its scale, None without one; or
    the block type of GGUF it is kept in."""

    dtype: torch.dtype
    scale_shape: tuple[int, ...] | None
    block_type: str | None = None


def read_codes(
    names: Mapping[str, str],
    headers: Mapping[str, TensorHeader],
    source: str,
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor],
) -> tuple[dict[str, str], dict[str, Codes]]:
    """(official name -> name in the file without what is not needed, codes by module name).

    `names` and `headers` are as in the file; `read` gives a tensor by its name there. Raises
    CheckpointError for a scale that is missing, doubled or of another shape, and for formats this
    version does not read.
    """
    _check_metadata(metadata, source)
    kept: dict[str, str] = {}
    for name, stored in names.items():
        if name == MARKER or name.endswith(UNUSED):
            continue
        if name.endswith(DESCRIPTION):
            check_description(read(stored), name, source)
            continue
        wanted = name.removesuffix(".scale_weight") + ".weight_scale"
        wanted = wanted if name.endswith(".scale_weight") else name
        if wanted in kept:
            raise CheckpointError(f"{source} holds two scales for {wanted}; the file is damaged")
        kept[wanted] = stored
    codes = {}
    for name, stored in kept.items():
        if name.endswith(".weight") and headers[stored].dtype in CODE_DTYPES:
            module = name.removesuffix(".weight")
            codes[module] = _codes_of(module, kept, headers, source)
        elif name.endswith(".weight") and _is_rows_of_blocks(headers[stored]):
            codes[name.removesuffix(".weight")] = Codes(torch.uint8, None, headers[stored].dtype)
    _check_scales(kept, codes, source)
    return kept, codes


def _is_rows_of_blocks(header: TensorHeader) -> bool:
    """Whether a linear can keep this; anything else is dequantised when it is read."""
    kind = BLOCK_TYPES.get(header.dtype)
    return kind is not None and len(header.shape) == 2 and header.shape[1] % kind.elements == 0


def _codes_of(
    module: str, kept: Mapping[str, str], headers: Mapping[str, TensorHeader], source: str
) -> Codes:
    weight = headers[kept[f"{module}.weight"]]
    stored = kept.get(f"{module}.weight_scale")
    if stored is None:
        return Codes(CODE_DTYPES[weight.dtype], None)
    shape, rows = headers[stored].shape, weight.shape[0]
    if prod(shape) != 1 and shape not in ((rows,), (rows, 1)):
        raise CheckpointError(
            f"{source}: the scale of {module} is {shape} for {rows} rows; this version reads one "
            "scale for each row or one for the tensor"
        )
    return Codes(CODE_DTYPES[weight.dtype], shape)


def _check_scales(kept: Mapping[str, str], codes: Mapping[str, Codes], source: str) -> None:
    scaled = {module for module, code in codes.items() if code.scale_shape is not None}
    if scaled and (bare := codes.keys() - scaled):
        raise CheckpointError(
            f"{source} lacks the scale of {len(bare)} of {len(codes)} quantised linears "
            f"({preview(bare)}); download it again"
        )
    if integers := {m for m, c in codes.items() if c.dtype == torch.int8} - scaled:
        raise CheckpointError(
            f"{source} holds int8 weights without scales ({preview(integers)}); download it again"
        )
    stray = {n for n in kept if n.endswith(".weight_scale")} - {f"{m}.weight_scale" for m in scaled}
    if stray:
        raise CheckpointError(
            f"{source} holds {len(stray)} scales of weights that are not quantised "
            f"({preview(stray)}); the file is damaged"
        )


def _check_metadata(metadata: Mapping[str, str], source: str) -> None:
    if METADATA_KEY not in metadata:
        return
    try:
        layers = json.loads(metadata[METADATA_KEY])["layers"]
        found = {str(layer["format"]) for layer in layers.values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source}: its {METADATA_KEY} is not readable: {error}") from error
    for name in sorted(found):
        check_format(name, source)
