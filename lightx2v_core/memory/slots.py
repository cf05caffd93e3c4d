"""Tensors of a module as places that can be read and refilled, and their bytes laid end to end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LARGE = 2**20  # bytes; codes of packed formats may have one axis
ALIGNMENT = 256  # bytes; what the CUDA allocator gives too


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor of a module, readable and replaceable by name."""

    owner: nn.Module
    leaf: str
    name: str  # in the state dict of the whole

    @property
    def tensor(self) -> Tensor:
        return getattr(self.owner, self.leaf)

    @property
    def streams(self) -> bool:
        """Matrices and whatever else is large stream; biases, norms and modulation are small and
        stay where the rest is."""
        is_large = self.tensor.ndim >= 2 or self.tensor.nbytes >= LARGE
        return is_large and self.leaf != "modulation"

    def put(self, tensor: Tensor) -> None:
        if self.leaf in self.owner._parameters:
            is_parameter = isinstance(tensor, nn.Parameter)
            self.owner._parameters[self.leaf] = (
                tensor if is_parameter else nn.Parameter(tensor, requires_grad=False)
            )
        else:
            self.owner._buffers[self.leaf] = tensor


def slots_of(module: nn.Module) -> list[Slot]:
    """Every parameter and buffer below `module`, shared ones once."""
    return [
        Slot(owner, leaf, f"{prefix}.{leaf}" if prefix else leaf)
        for prefix, owner in module.named_modules()
        for leaf in (*owner._parameters, *owner._buffers)
        if getattr(owner, leaf) is not None
    ]


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one tensor lies in a buffer, and how its bytes are read."""

    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


class Layout:
    """Tensors of any dtypes one after another in one buffer of bytes.

    Strides are kept where a tensor fills its memory, so that a copy computes exactly what the
    original computes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.pieces: list[Piece] = []
        self.nbytes = 0
        for tensor in tensors:
            stride = tensor.stride() if _is_dense(tensor) else _contiguous(tensor.shape)
            piece = Piece(self.nbytes, tensor.nbytes, tensor.dtype, tensor.shape, tuple(stride))
            self.pieces.append(piece)
            self.nbytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors that a filled `buffer` (uint8) holds."""
        return [
            buffer[p.offset : p.offset + p.nbytes].view(p.dtype).as_strided(p.shape, p.stride)
            for p in self.pieces
        ]

    def parts(self, tensors: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """(offset in the buffer, bytes) of each tensor, in the order of the memory."""
        for piece, tensor in zip(self.pieces, tensors, strict=True):
            yield piece.offset, flat_bytes(tensor)


def _is_dense(tensor: Tensor) -> bool:
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.numel() == last + 1


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def flat_bytes(tensor: Tensor) -> Tensor:
    plain = tensor.detach()
    if not _is_dense(plain):
        plain = plain.contiguous()
    flat = plain.as_strided((plain.numel(),), (1,), plain.storage_offset())
    return flat.view(torch.uint8)
