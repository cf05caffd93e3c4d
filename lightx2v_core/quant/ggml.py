"""Weights that stay in the block types of GGUF files: the types by name, and linears of them.

Blocks are dequantised where they are, in float32, and rounded once to the dtype that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ggml_blocks as plain
from . import ggml_grids as grids
from .linear import DequantisedLinear

# Elements dequantised at a time: bounds what a large weight needs beside itself.
CHUNK = 2**24


@dataclass(frozen=True, slots=True)
class BlockType:
    """`elements` numbers in `nbytes` bytes; `dequantise` turns NB uint8 into NE float32."""

    elements: int
    nbytes: int
    dequantise: Callable[[Tensor], Tensor]


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, plain.q4_0),
    "Q4_1": BlockType(32, 20, plain.q4_1),
    "Q5_0": BlockType(32, 22, plain.q5_0),
    "Q5_1": BlockType(32, 24, plain.q5_1),
    "Q8_0": BlockType(32, 34, plain.q8_0),
    "Q2_K": BlockType(256, 84, plain.q2_k),
    "Q3_K": BlockType(256, 110, plain.q3_k),
    "Q4_K": BlockType(256, 144, plain.q4_k),
    "Q5_K": BlockType(256, 176, plain.q5_k),
    "Q6_K": BlockType(256, 210, plain.q6_k),
    "TQ1_0": BlockType(256, 54, plain.tq1_0),
    "TQ2_0": BlockType(256, 66, plain.tq2_0),
    "IQ1_S": BlockType(256, 50, grids.iq1_s),
    "IQ1_M": BlockType(256, 56, grids.iq1_m),
    "IQ2_XXS": BlockType(256, 66, grids.iq2_xxs),
    "IQ2_XS": BlockType(256, 74, grids.iq2_xs),
    "IQ2_S": BlockType(256, 82, grids.iq2_s),
    "IQ3_XXS": BlockType(256, 98, grids.iq3_xxs),
    "IQ3_S": BlockType(256, 110, grids.iq3_s),
    "IQ4_NL": BlockType(32, 18, plain.iq4_nl),
    "IQ4_XS": BlockType(256, 136, plain.iq4_xs),
    "MXFP4": BlockType(32, 17, plain.mxfp4),
    "NVFP4": BlockType(64, 36, plain.nvfp4),
}

GRID_TYPES = tuple(name for name in BLOCK_TYPES if name.startswith(("IQ1", "IQ2", "IQ3")))


def dequantise_blocks(
    blocks: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """A tensor of `shape` and `dtype` from the uint8 blocks, of any shape, of block type `name`."""
    kind = BLOCK_TYPES[name]
    rows = blocks.reshape(-1, kind.nbytes)
    numbers = torch.empty(len(rows), kind.elements, dtype=dtype, device=blocks.device)
    step = CHUNK // kind.elements
    for start in range(0, len(rows), step):
        numbers[start : start + step] = kind.dequantise(rows[start : start + step])
    return numbers.reshape(tuple(shape))


class GgmlLinear(DequantisedLinear):
    """Drop-in for a linear M from K whose weight is kept as rows of blocks, uint8."""

    weight: Tensor

    def __init__(
        self, in_features: int, out_features: int, block_type: str, bias: bool = True
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.block_type, self.codes_name = block_type, f"GGUF {block_type}"
        kind = BLOCK_TYPES[block_type]
        if block_type in GRID_TYPES:
            # A package that is missing shows now, not in the middle of a video.
            grids.grid(block_type, torch.device("cpu"))
        row_bytes = in_features // kind.elements * kind.nbytes
        self.register_buffer("weight", torch.empty(out_features, row_bytes, dtype=torch.uint8))

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight MK, computed in float32 and rounded once."""
        shape = (self.out_features, self.in_features)
        return dequantise_blocks(self.weight, self.block_type, shape, dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.block_type}"
