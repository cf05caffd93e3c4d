"""Puts a checkpoint's tensors into a model built empty, in the dtype it computes in."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from ..ops.placing import place
from .mapping import fault_in


def assign(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    what: str,
    dtype: torch.dtype | None = None,
    quantised: Container[str] = (),
) -> None:
    """Fill `model` (built on ``meta``) with `tensors`, all of them, each in its place.

    Tensors of two or more axes take `dtype` (None keeps the file's); one-axis tensors and
    modulation keep the file's dtype, since layers cast at use. A tensor that already has its dtype
    stays the memory-mapped one. Modules named in `quantised` keep their codes; scales are float32,
    those of blocks the bytes that are stored.
    Raises CheckpointError that names what is missing or too many;
    `what` is the kind of model, for the message.
    """
    cast = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in quantised and leaf == "weight":
            cast[name] = tensor
        elif module in quantised and leaf in ("weight_scale", "weight_scale_2"):
            is_byte = tensor.element_size() == 1
            cast[name] = tensor.view(torch.uint8) if is_byte else tensor.float()
        else:
            cast[name] = _cast(name, tensor, dtype, source)
    place(model, cast, source, what)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None, source: str) -> Tensor:
    keeps = dtype is None or tensor.ndim < 2 or name.endswith("modulation")
    if keeps or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    fault_in([tensor], source)
    return tensor.to(dtype)
