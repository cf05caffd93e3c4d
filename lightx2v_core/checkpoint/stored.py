"""How one linear of a file is stored, as its headers say it. Reads nothing."""

from __future__ import annotations

from math import prod

from .headers import TensorHeader

PLAIN_SCHEMES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
PACKED = "U8"
EXPONENTS = ("U8", "F8_E8M0")  # scales that are powers of two


def scheme_of(weight: TensorHeader, scale: TensorHeader | None) -> str:
    """What one linear's headers say. A format that is known and not read has a name here too."""
    if weight.dtype in PLAIN_SCHEMES:
        return PLAIN_SCHEMES[weight.dtype]
    if weight.dtype == PACKED:
        if scale is not None and scale.dtype == "F8_E4M3":
            return "nvfp4"
        return "mxfp4 or mxfp6" if scale is not None and scale.dtype in EXPONENTS else "4-bit codes"
    family = {"F8_E4M3": "fp8", "F8_E5M2": "fp8-e5m2", "I8": "int8"}.get(weight.dtype, "unknown")
    if family in ("fp8-e5m2", "unknown"):
        return family
    if scale is None:
        return "fp8-cast" if family == "fp8" else "int8-tensor"
    if scale.dtype in EXPONENTS:
        return "mxfp8"
    if len(scale.shape) == 2 and scale.shape[1] > 1:
        return f"{family}-block"
    return f"{family}-row" if prod(scale.shape) > 1 else f"{family}-tensor"
