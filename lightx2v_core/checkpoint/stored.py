"""How one linear of a file is stored, as its headers say it. Reads nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from .headers import TensorHeader

CODE_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
}
PLAIN_SCHEMES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
PACKED = "U8"
EXPONENTS = ("U8", "F8_E8M0")  # scales that are powers of two


@dataclass(frozen=True, slots=True)
class Codes:
    """How one linear is stored: a row of quant.schemes.LINEARS, and the arguments of its class that
    follow the two sizes."""

    scheme: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Stored:
    """One file while its names are read; `names` are those still to be placed."""

    source: str
    names: dict[str, str]
    headers: Mapping[str, TensorHeader]
    formats: Mapping[str, str]  # described by ComfyUI, by module name
    read: Callable[[str], Tensor]

    def header(self, name: str) -> TensorHeader | None:
        return self.headers[self.names[name]] if name in self.names else None


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
