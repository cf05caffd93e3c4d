"""What quantised files carry beside codes and scales, and which of it is understood."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ..errors import CheckpointError, preview

# Formats of ComfyUI's own descriptions whose codes are plain fp8 or int8.
COMFY_FORMATS = {"float8_e4m3fn", "float8_e5m2", "int8_tensorwise"}
MARKER = "scaled_fp8"
# Scales of activations: no use where weights are dequantised.
UNUSED = (".scale_input", ".input_scale")
DESCRIPTION = ".comfy_quant"


def check_description(tensor: Tensor, name: str, source: str) -> None:
    """Raise CheckpointError unless the JSON bytes in `tensor` name a format that is read here."""
    try:
        described = json.loads(bytes(tensor.to(torch.uint8).flatten().tolist()))
        found = str(described["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: {name} is not a description ({error})") from error
    check_format(found, source)
    if extra := described.keys() & {"convrot", "convrot_groupsize", "pre_quant_scale"}:
        raise CheckpointError(
            f"{source} uses {preview(extra)}, which this version does not read; "
            "use the fp8 or bf16 file of the same model"
        )


def check_format(found: str, source: str) -> None:
    """Raise CheckpointError for a format this version does not read."""
    if found not in COMFY_FORMATS:
        raise CheckpointError(
            f"{source} is quantised as {found}, which this version does not read; "
            "use the fp8 or bf16 file of the same model"
        )
