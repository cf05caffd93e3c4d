"""The names quantised files add (scales, markers, formats), in the forms that are published.

Decided from headers and metadata; of tensors only descriptions and single numbers are read here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, preview
from ..quant.blocks import Mxfp8Linear, Nvfp4Linear
from ..quant.formats import (
    BLOCK_FORMATS,
    COMFY_FORMATS,
    DESCRIPTION,
    MARKER,
    UNUSED,
    check_format,
    read_description,
)
from ..quant.ggml import BLOCK_TYPES
from ..quant.linear import QuantisedLinear
from .blockscaled import read_block_codes
from .headers import TensorHeader
from .stored import (
    CODE_DTYPES,
    EXPONENTS,
    PACKED,
    PLAIN_SCHEMES,
    Codes,
    Stored,
    scheme_of,
)

SCALE_READERS = 16
METADATA_KEY = "_quantization_metadata"
FLOATS = tuple(PLAIN_SCHEMES)
# What each description says of the dtypes of codes and scales.
DESCRIBED_AS = {
    "float8_e4m3fn": ("F8_E4M3", FLOATS),
    "float8_e4m3fn_rowwise": ("F8_E4M3", FLOATS),
    "float8_e5m2": ("F8_E5M2", FLOATS),
    "int8_tensorwise": ("I8", FLOATS),
    "mxfp8": ("F8_E4M3", EXPONENTS),
    "nvfp4": ("U8", ("F8_E4M3", "U8")),
}


class QuantisedNames(NamedTuple):
    """Official name -> name in the file, without what is not needed; codes by module name; and
    scales that a file holds in another form, by official name."""

    names: dict[str, str]
    codes: dict[str, Codes]
    made: dict[str, Tensor]


def read_codes(
    names: Mapping[str, str],
    headers: Mapping[str, TensorHeader],
    source: str,
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor],
) -> QuantisedNames:
    """How every quantised linear of a file is stored.

    `names` maps official names to those in the file, `headers` are as in the file; `read` gives a
    tensor by its name there. Raises CheckpointError for a scale that is missing, doubled or of
    another shape, and for formats this version does not read.
    """
    kept = _with_one_scale_name(names, source)
    formats = _formats(kept, source, metadata, read)
    stored = Stored(source, kept, headers, formats, read)
    codes: dict[str, Codes] = {}
    made: dict[str, Tensor] = {}
    for name in [n for n in kept if n.endswith(".weight")]:
        module = name.removesuffix(".weight")
        weight = headers[kept[name]]
        _check_described(module, weight, stored)
        if _is_rows_of_blocks(weight):
            codes[module] = Codes(f"gguf-{weight.dtype}", (weight.dtype,))
            continue
        if weight.dtype not in CODE_DTYPES and weight.dtype != PACKED:
            continue
        scheme = scheme_of(weight, stored.header(f"{module}.weight_scale"))
        scheme = formats[module] if formats.get(module) in BLOCK_FORMATS else scheme
        if scheme in BLOCK_FORMATS or weight.dtype == PACKED:
            codes[module], scales = read_block_codes(module, scheme, stored)
            made |= scales
        else:
            codes[module] = _codes_of(module, scheme, stored)
    _check_scales(kept, codes, source)
    return QuantisedNames(kept, codes, made)


def _is_rows_of_blocks(header: TensorHeader) -> bool:
    """Whether a linear can keep this; anything else is dequantised when it is read."""
    kind = BLOCK_TYPES.get(header.dtype)
    return kind is not None and len(header.shape) == 2 and header.shape[1] % kind.elements == 0


def _with_one_scale_name(names: Mapping[str, str], source: str) -> dict[str, str]:
    kept: dict[str, str] = {}
    for name, stored in names.items():
        if name == MARKER or name.endswith(UNUSED):
            continue
        old = name.endswith(".scale_weight")
        wanted = name.removesuffix(".scale_weight") + ".weight_scale" if old else name
        if wanted in kept:
            raise CheckpointError(f"{source} holds two scales for {wanted}; the file is damaged")
        kept[wanted] = stored
    return kept


def _formats(
    kept: dict[str, str],
    source: str,
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor],
) -> dict[str, str]:
    """Described formats by module name, from the metadata and from tensors, which leave `kept`."""
    readable = COMFY_FORMATS | BLOCK_FORMATS
    official = {stored: name for name, stored in kept.items()}
    formats = {}
    for layer, found in _metadata_formats(metadata, source).items():
        check_format(found, source, readable)
        name = official.get(f"{layer}.weight")
        if name is None:
            raise CheckpointError(
                f"{source}: its {METADATA_KEY} describes {layer[:80]}, which the file does not "
                "hold; download it again"
            )
        formats[name.removesuffix(".weight")] = found
    for name in [n for n in kept if n.endswith(DESCRIPTION)]:
        found = read_description(read(kept.pop(name)), name, source, readable)
        module = name.removesuffix(DESCRIPTION)
        if formats.setdefault(module, found) != found:
            raise CheckpointError(
                f"{source} describes {module} as {found} and as {formats[module]}; "
                "the file is damaged"
            )
        if f"{module}.weight" not in kept:
            raise CheckpointError(
                f"{source} describes {module} and does not hold it; download it again"
            )
    return formats


def _metadata_formats(metadata: Mapping[str, str], source: str) -> dict[str, str]:
    if METADATA_KEY not in metadata:
        return {}
    try:
        layers = json.loads(metadata[METADATA_KEY])["layers"]
        return {str(layer): str(found["format"]) for layer, found in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{source}: its {METADATA_KEY} is not readable: {error}") from error


def _check_described(module: str, weight: TensorHeader, stored: Stored) -> None:
    found = stored.formats.get(module)
    if found is None:
        return
    codes, scales = DESCRIBED_AS[found]
    scale = stored.header(f"{module}.weight_scale")
    if weight.dtype != codes or (scale is not None and scale.dtype not in scales):
        raise CheckpointError(
            f"{stored.source} describes {module} as {found} and stores {weight.dtype} codes with "
            f"{scale.dtype if scale else 'no'} scales; the file is damaged"
        )


def _codes_of(module: str, scheme: str, stored: Stored) -> Codes:
    weight = stored.headers[stored.names[f"{module}.weight"]]
    scale = stored.header(f"{module}.weight_scale")
    dtype = CODE_DTYPES[weight.dtype]
    if scale is None:
        return Codes(scheme, (dtype, None))
    rows = weight.shape[0] if weight.shape else 1
    if prod(scale.shape) != 1 and scale.shape not in ((rows,), (rows, 1)):
        raise CheckpointError(
            f"{stored.source}: the scale of {module} is {scale.shape} for {rows} rows; this "
            "version reads one scale for each row or one for the tensor"
        )
    if scale.dtype not in FLOATS:
        raise CheckpointError(
            f"{stored.source}: the scale of {module} is stored as {scale.dtype}; this version "
            "reads F32, F16 and BF16 there"
        )
    return Codes(scheme, (dtype, scale.shape))


def _check_scales(kept: Mapping[str, str], codes: Mapping[str, Codes], source: str) -> None:
    scaled = {m for m in codes if f"{m}.weight_scale" in kept}
    bare = {m for m in codes if m not in scaled}
    if scaled and bare:
        raise CheckpointError(
            f"{source} lacks the scale of {len(bare)} of {len(codes)} quantised linears "
            f"({preview(bare)}); download it again"
        )
    if integers := {m for m in bare if codes[m].arguments[0] == torch.int8}:
        raise CheckpointError(
            f"{source} holds int8 weights without scales ({preview(integers)}); download it again"
        )
    stray = {n for n in kept if n.endswith(".weight_scale")} - {f"{m}.weight_scale" for m in scaled}
    if stray:
        raise CheckpointError(
            f"{source} holds {len(stray)} scales of weights that are not quantised "
            f"({preview(stray)}); the file is damaged"
        )


def check_scale_values(model: nn.Module, source: str) -> None:
    """Raise CheckpointError for scales that are no numbers. Reads all scales, no weights.

    Several at a time: they lie all over a mapped file, and a disk answers many requests as fast
    as one.
    """
    modules = dict(model.named_modules())
    with ThreadPoolExecutor(SCALE_READERS, "lightx2v-scales") as pool:
        found = list(pool.map(_bad_scales, modules.values()))
    bad = [name for name, is_bad in zip(modules, found, strict=True) if is_bad]
    if bad:
        raise CheckpointError(
            f"{source}: the scales of {len(bad)} linears hold NaN or infinity ({preview(bad)}); "
            "the file is damaged: download it again"
        )


def _bad_scales(module: nn.Module) -> bool:
    if isinstance(module, Nvfp4Linear):  # e4m3: no infinity; NaN has all bits but the sign set
        is_bad = ((module.weight_scale & 0x7F) == 0x7F).any() | ~_finite(module.weight_scale_2)
    elif isinstance(module, Mxfp8Linear):
        is_bad = (module.weight_scale == 0xFF).any()
    elif isinstance(module, QuantisedLinear) and module.weight_scale is not None:
        is_bad = ~_finite(module.weight_scale)
    else:
        return False
    return bool(is_bad)


def _finite(scale: Tensor) -> Tensor:
    return torch.isfinite(scale).all()
