"""Exact attention of 16-bit operands by our own kernel for Hopper: softmax in float32.

What does not suit the kernel goes to PyTorch's attention by a rule that looks at shapes, strides
and dtypes alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CapabilityError
from .norm_rotary import HALVES, HEAD_DIM
from .trial import failure
from .triton_support import is_plain_call

OWN_ERROR = 0.01  # of the trial: one rounding of bfloat16 is 0.004 at most
# Below, cuDNN is as fast or faster: a program's start and end are not hidden behind another's
# products (H200, 40 heads: 8,192 tokens 2.4 and 2.2 ms, 16,384 9.0 and 9.0, 32,760 34.1 and 39.8).
LEAST_QUERIES, LEAST_KEYS = 16384, 16384
ALIGNED = 8  # elements: the copy engine takes addresses and strides in steps of 16 bytes


class SixteenBit:
    """Called with BNLD like every row; any number of queries and keys."""

    name = "gluon16"

    def __init__(self, exact: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        """`exact`: attention for what is unfit."""
        self._exact = exact

    def __call__(self, q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor) -> Tensor:
        if not fits(q_BNLD, k_BNLD, v_BNLD):
            return self._exact(q_BNLD, k_BNLD, v_BNLD)
        return _by_kernel(q_BNLD, k_BNLD, v_BNLD)


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel serves this call."""
    return (
        q.is_cuda
        and is_plain_call()
        and q.dtype in HALVES
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] == HEAD_DIM
        and q.shape[2] >= LEAST_QUERIES
        and k.shape[2] >= LEAST_KEYS
        and q.shape[:2] == k.shape[:2]
    )


def _by_kernel(q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor) -> Tensor:
    from .kernels.launch16 import attend

    q, k, v = (_copyable(x.transpose(1, 2)) for x in (q_BNLD, k_BNLD, v_BNLD))  # BNLD -> BLND
    o_BLND = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with torch.cuda.device_of(o_BLND):
        attend(q, k, v, o_BLND)
    return o_BLND.transpose(1, 2)  # BLND -> BNLD


def _copyable(x_BLND: Tensor) -> Tensor:
    """`x` itself where the copy engine can read it, else a contiguous copy."""
    *strides, last = x_BLND.stride()
    aligned = x_BLND.data_ptr() % (2 * ALIGNED) == 0 and all(s % ALIGNED == 0 for s in strides)
    return (
        x_BLND
        if last == 1 and aligned and min(strides) > 0
        else x_BLND.clone(memory_format=torch.contiguous_format)
    )


def load_gluon16(
    device: torch.device, exact: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> SixteenBit:
    """The row, after its trial. Raises CapabilityError when that fails."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(3, 1, 300, 2, HEAD_DIM, generator=generator, device=device).bfloat16()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # BLND -> BNLD
    expected = F.scaled_dot_product_attention(q, k, v)
    if reason := failure(lambda: _by_kernel(q, k, v), expected, OWN_ERROR):
        raise CapabilityError(f"attention 'gluon16' cannot run here: {reason}; use sdpa")
    return SixteenBit(exact)
