"""Layers that keep their matrix as a file holds it and turn it at every use.

A text encoder runs once for each prompt. Turned while loading, one stored in float16 or fp8 would
lie in RAM as 11 GB that cannot be given back; as it is stored it stays mapped, and streams in fewer
bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant.dequantise import Codes


class StoredLinear(nn.Module):
    """y = x W^T, W computed from what is stored: the numbers that loading would have given."""

    stored: Tensor  # MK
    scale: Tensor | None  # of codes

    def __init__(self, found: Tensor | Codes, dtype: torch.dtype) -> None:
        super().__init__()
        stored, scale = found if isinstance(found, Codes) else (found, None)
        self.register_buffer("stored", stored)
        self.register_buffer("scale", scale)
        self.dtype = dtype

    @property
    def weight(self) -> Tensor:
        """Of the type that is computed in, and empty: transformers asks what its input shall be."""
        return torch.empty(0, dtype=self.dtype)

    @property
    def turning_bytes(self) -> int:
        between = 0 if self.scale is None else 2 * torch.float32.itemsize
        return self.stored.numel() * (between + self.dtype.itemsize)

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.stored if self.scale is None else Codes(self.stored, self.scale)
        return F.linear(x, turned(matrix, self.dtype))


class StoredEmbedding(nn.Module):
    """Rows of a table in another type than they are handed on in."""

    def __init__(self, table_VE: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(table_VE, requires_grad=False)
        self.embedding_dim = table_VE.shape[1]
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(self.dtype)


def turned(found: Tensor | Codes, dtype: torch.dtype) -> Tensor:
    """The plain weight in `dtype`."""
    return found.plain(dtype) if isinstance(found, Codes) else found.to(dtype)
