"""Rotary positions of a (time, row, column) grid, interleaved pairs (2i, 2i + 1).

Su et al., "RoFormer", https://arxiv.org/abs/2104.09864, with one third of the head for each axis.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0


@lru_cache(maxsize=2)  # two sizes: every step, both halves of a guided call and both experts share
def rotary_table(
    grid: tuple[int, int, int], head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each L x D/2 float32, tokens in frame, row, column order.

    Built in float64: 128 lanes split 44 / 42 / 42 over time, height, width. Callers share the
    tensors and do not write to them.
    """
    # Not of inference mode, since training may use them after it.
    with torch.inference_mode(False), torch.no_grad():
        return _table(grid, head_dim, device)


def _table(
    grid: tuple[int, int, int], head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    side = 2 * (head_dim // 6)
    angles = []
    for axis, (positions, lanes) in enumerate(
        zip(grid, (head_dim - 2 * side, side, side), strict=True)
    ):
        exponent = torch.arange(0, lanes, 2, dtype=torch.float64, device=device) / lanes
        steps = torch.arange(positions, dtype=torch.float64, device=device)
        angle = torch.outer(steps, THETA**-exponent)
        shape = [1, 1, 1, angle.shape[1]]
        shape[axis] = positions
        angles.append(angle.view(shape).expand(*grid, -1))
    table = torch.cat(angles, dim=-1).flatten(0, 2)
    return table.cos().float(), table.sin().float()
