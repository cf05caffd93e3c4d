"""NVFP4 in the dialects of LightX2V and ComfyUI, and ComfyUI's MXFP8: names, shapes, scales."""

from __future__ import annotations

from math import prod

from torch import Tensor

from ..errors import CheckpointError
from ..quant.blocks import MXFP8_BLOCK, NVFP4_BLOCK, scale_shape
from .stored import Codes, Stored

# The scale of the tensor: ComfyUI stores it; LightX2V stores what its kernel multiplies by, alpha =
# 1 / (scale of the input * scale of the weight), beside the scale of the input, both inverted; its
# intermediate exports store the inverted scale of the weight.
COMFY_SCALE = "weight_scale_2"
ALPHA, INPUT_SCALE = "alpha", "input_global_scale"
INVERTED = "weight_global_scale"


def read_block_codes(module: str, scheme: str, stored: Stored) -> tuple[Codes, dict[str, Tensor]]:
    """How `module` is stored, and its scales that had to be computed, by official name.

    Names that the model does not have leave `stored.names`.
    """
    if scheme not in ("nvfp4", "mxfp8"):
        raise CheckpointError(
            f"{stored.source}: {module} is stored as {scheme}, which this version does not read; "
            "use the fp8 or bf16 file of the same model"
        )
    is_nvfp4 = scheme == "nvfp4"
    _check_shapes(module, stored, NVFP4_BLOCK if is_nvfp4 else MXFP8_BLOCK, 2 if is_nvfp4 else 1)
    if not is_nvfp4:
        return Codes("mxfp8"), {}
    found = [s for s in (COMFY_SCALE, ALPHA, INVERTED) if f"{module}.{s}" in stored.names]
    if len(found) != 1:
        raise CheckpointError(
            f"{stored.source}: {module} has {len(found)} scales for the tensor "
            f"({', '.join(found) or 'none'}); NVFP4 needs one of {COMFY_SCALE} (ComfyUI), {ALPHA} "
            f"or {INVERTED} (LightX2V); download it again"
        )
    if found[0] == COMFY_SCALE:
        return _comfy(module, stored)
    return Codes("nvfp4", (True,)), {f"{module}.{COMFY_SCALE}": _lightx2v_scale(module, stored)}


def _comfy(module: str, stored: Stored) -> tuple[Codes, dict[str, Tensor]]:
    if module not in stored.formats:
        raise CheckpointError(
            f"{stored.source}: {module} is NVFP4 with ComfyUI's {COMFY_SCALE} and without its "
            "description (comfy_quant), so the order of its values is not known; convert it for "
            "ComfyUI or use the fp8 file of the same model"
        )
    return Codes("nvfp4", (False,)), {
        f"{module}.{COMFY_SCALE}": _number(module, COMFY_SCALE, stored)
    }


def _lightx2v_scale(module: str, stored: Stored) -> Tensor:
    """One number, float32. An input scale beside the inverted form is not needed."""
    if f"{module}.{INVERTED}" in stored.names:
        stored.names.pop(f"{module}.{INPUT_SCALE}", None)
        return 1.0 / _number(module, INVERTED, stored)
    if f"{module}.{INPUT_SCALE}" not in stored.names:
        raise CheckpointError(
            f"{stored.source}: {module} has {ALPHA} and no {INPUT_SCALE}; download it again"
        )
    return _number(module, ALPHA, stored) * _number(module, INPUT_SCALE, stored)


def _number(module: str, leaf: str, stored: Stored) -> Tensor:
    name = f"{module}.{leaf}"
    header = stored.headers[stored.names[name]]
    if prod(header.shape) != 1 or header.dtype not in ("F32", "F16", "BF16"):
        raise CheckpointError(
            f"{stored.source}: {name} is {header.dtype} of shape {header.shape}; one "
            "floating-point number is needed there: download it again"
        )
    return stored.read(stored.names.pop(name)).float().reshape(())


def _check_shapes(module: str, stored: Stored, block: int, codes_per_byte: int) -> None:
    weight = stored.headers[stored.names[f"{module}.weight"]]
    scale = stored.header(f"{module}.weight_scale")
    if len(weight.shape) != 2 or weight.shape[1] * codes_per_byte % block:
        raise CheckpointError(
            f"{stored.source}: {module}.weight has shape {weight.shape}, which is not whole blocks "
            f"of {block} values; download it again"
        )
    rows, columns = weight.shape[0], weight.shape[1] * codes_per_byte
    needed = scale_shape(rows, columns, block)
    if scale is None or scale.shape != needed:
        raise CheckpointError(
            f"{stored.source}: the block scales of {module} are "
            f"{'missing' if scale is None else scale.shape}; a weight of {rows}x{columns} needs "
            f"{needed} in cuBLAS order: download it again"
        )
