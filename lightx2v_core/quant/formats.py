"""What quantised files carry beside codes and scales, and which of it is understood."""

from __future__ import annotations

import json
from collections.abc import Container

import torch
from torch import Tensor

from ..errors import CheckpointError, preview

# Formats of ComfyUI's own descriptions whose codes are plain fp8 or int8; what is one scale for the
# tensor and what one for each row is told by the shape of the scale.
COMFY_FORMATS = {"float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "int8_tensorwise"}
# And those in blocks, which the transformer loads.
BLOCK_FORMATS = {"nvfp4", "mxfp8"}
MARKER = "scaled_fp8"
# Scales of activations: no use where weights are dequantised, and where they are not, activations
# are quantised by their own values.
UNUSED = (".scale_input", ".input_scale", ".input_absmax")
# A description's full_precision_matrix_mult is not followed: it is for ComfyUI's way of quantising
# activations, with a fixed scale; ours follows each token. `dequantise` can be asked for by name.
DESCRIPTION = ".comfy_quant"


def read_description(
    tensor: Tensor, name: str, source: str, readable: Container[str] = COMFY_FORMATS
) -> str:
    """The format that the JSON bytes in `tensor` name.

    Raises CheckpointError unless it is one of `readable` without further treatment.
    """
    try:
        described = json.loads(bytes(tensor.to(torch.uint8).flatten().tolist()))
        found = str(described["format"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{source}: {name} is not a description ({error})") from error
    check_format(found, source, readable)
    if extra := described.keys() & {"convrot", "convrot_groupsize", "pre_quant_scale"}:
        raise CheckpointError(
            f"{source} uses {preview(extra)}, which this version does not read; "
            "use the fp8 or bf16 file of the same model"
        )
    return found


def check_format(found: str, source: str, readable: Container[str] = COMFY_FORMATS) -> None:
    """Raise CheckpointError for a format this version does not read."""
    if found not in readable:
        raise CheckpointError(
            f"{source} is quantised as {found[:40]}, which this version does not read; "
            "use the fp8 or bf16 file of the same model"
        )
