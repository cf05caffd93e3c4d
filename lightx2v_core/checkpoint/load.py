"""Puts tensors into a model that was built empty: strictly, and without a second copy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, preview


def assign(
    model: nn.Module, tensors: Mapping[str, Tensor], source: str, dtype: torch.dtype | None = None
) -> None:
    """Fill `model` (built on ``meta``) with `tensors`, all of them, each in its place.

    Tensors of two or more axes take `dtype` (None keeps the file's); one-axis tensors and
    modulation keep the file's dtype, since layers cast at use. A tensor that already has its dtype
    stays the memory-mapped one. Raises CheckpointError that names what is missing or too many.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if missing := wanted.keys() - tensors.keys():
        raise CheckpointError(
            f"{source} lacks {len(missing)} of {len(wanted)} tensors ({preview(missing)}); "
            "the file is of another model or not whole"
        )
    if surplus := tensors.keys() - wanted.keys():
        raise CheckpointError(
            f"{source} holds {len(surplus)} tensors that this model has no place for "
            f"({preview(surplus)}); it is a variant this version does not run"
        )
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{source}: {name} is {tuple(tensors[name].shape)} and must be {shape}"
            )
    placed = {name: _cast(name, tensor, dtype) for name, tensor in tensors.items()}
    model.load_state_dict(placed, strict=True, assign=True)
    model.requires_grad_(False).eval()


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    keeps = dtype is None or tensor.ndim < 2 or name.endswith("modulation")
    return tensor if keeps or not tensor.is_floating_point() else tensor.to(dtype)
