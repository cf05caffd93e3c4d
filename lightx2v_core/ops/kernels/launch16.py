# A kernel is launched as kernel[grid](...).
# pyright: reportIndexIssue=false
"""Launch of the 16-bit attention kernel. Imported only where Triton is there."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import attention_gluon16 as kernel
from .prepass import LOG2_SCALE


def attend(q_BLND: Tensor, k_BSND: Tensor, v_BSND: Tensor, o_BLND: Tensor) -> None:
    """Fills o. Every stride but the last is a multiple of 16 bytes, the last is one element."""
    B, L, N, D = q_BLND.shape
    kernel.attend[(triton.cdiv(L, kernel.QUERIES), B * N)](
        _tiles(q_BLND, kernel.ROWS),
        _tiles(k_BSND, kernel.BLOCK),
        _tiles(v_BSND, kernel.BLOCK),
        o_BLND,
        L,
        k_BSND.shape[1],
        N,
        *o_BLND.stride()[:3],
        LOG2_SCALE,
        KEYS=kernel.BLOCK,
        D=D,
        K_RING=kernel.K_STAGES,
        V_RING=kernel.V_STAGES,
        num_warps=4,
    )


def _tiles(x_BLND: Tensor, tokens: int) -> object:
    """How the copy engine reads tiles of one clip and one head; zeros past the last token."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, tokens, 1, x_BLND.shape[-1]]
    kind = gl.bfloat16 if x_BLND.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    return TensorDescriptor.from_tensor(x_BLND, block, layout)
