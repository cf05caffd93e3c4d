"""Files of fp8 or int8 codes into plain weights, for models that are not built from our ops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError, preview
from .formats import DESCRIPTION, MARKER, UNUSED, read_description

CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
SCALES = (".weight_scale", ".scale_weight")


class Codes(NamedTuple):
    """A quantised weight as it is stored: MK, and one scale for each row or one for all."""

    codes: Tensor
    scale: Tensor

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The product, made in float32."""
        scale, by_row = self.scale.float(), self.scale.numel() > 1
        return (self.codes.float() * scale.reshape((-1, 1) if by_row else ())).to(dtype)


def dequantised(
    tensors: Mapping[str, Tensor], source: str, what: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """`tensors` with codes * scale in `dtype` for every quantised weight, the rest as it is.

    Raises the errors of `with_codes`.
    """
    return {
        name: found.plain(dtype)
        if isinstance(found, Codes)
        else found.to(dtype)
        if found.dtype in CODES
        else found
        for name, found in with_codes(tensors, source, what).items()
    }


def with_codes(tensors: Mapping[str, Tensor], source: str, what: str) -> dict[str, Tensor | Codes]:
    """`tensors` with quantised weights beside their scales; codes without one, as e4m3 may be, and
    all else as they are.

    Raises CheckpointError for 4-bit codes, formats not read here, and int8 without a scale.
    """
    plain: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(DESCRIPTION):
            read_description(tensor, name, source)
        elif name.endswith(SCALES):
            scales[name.removesuffix(".weight_scale").removesuffix(".scale_weight")] = tensor
        elif name != MARKER and not name.endswith(UNUSED):
            plain[name] = tensor
    _refuse_packed(plain, source, what)
    found: dict[str, Tensor | Codes] = {}
    for name, tensor in plain.items():
        scale = scales.pop(name.removesuffix(".weight"), None)
        if scale is None and tensor.dtype == torch.int8:
            raise CheckpointError(f"{source} lacks the scale of {name}; download it again")
        found[name] = tensor if scale is None else Codes(tensor, scale)
    if scales:
        raise CheckpointError(
            f"{source} holds {len(scales)} scales without weights ({preview(scales)}); "
            "the file is damaged"
        )
    return found


def _refuse_packed(plain: Mapping[str, Tensor], source: str, what: str) -> None:
    if packed := [n for n, t in plain.items() if n.endswith("weight") and t.dtype == torch.uint8]:
        raise CheckpointError(
            f"{source} is a 4-bit {what} ({preview(packed)}), which this version does not read; "
            "give it in fp8, int8, bf16, fp16 or fp32"
        )
