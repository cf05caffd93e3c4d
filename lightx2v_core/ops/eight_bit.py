"""Self-attention of 8-bit codes, by our own kernels: one contract, two rows (Gluon and Triton).

What does not suit the kernels goes to PyTorch's attention by a rule that looks at shapes and dtypes
alone, and is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import Card
from ..errors import CapabilityError
from .norm_rotary import HALVES, HEAD_DIM, Rotary, fuses, norm_of, split_heads
from .rows import Rows
from .triton_support import dotted, is_plain_call, triton_blocked_by, triton_version

if TYPE_CHECKING:
    from .kernels.prepass import Coded

log = logging.getLogger(__name__)

# (queries, keys, values: codes or BLND, o BLND): fills o.
Kernel = Callable[["Coded", "Coded", "Coded | Tensor", Tensor], None]

LEAST_TOKENS = 8192  # below, cuDNN was as fast on an H200: six launches are more than one
GLUON_TRITON = (3, 6)  # what the Gluon kernel was tested with; its interface still changes
DESCRIPTORS = (3, 4)  # Triton with descriptors of tiles, which the plain kernel takes on 9.0
OWN_ERROR = 0.08  # of the trial, on normal numbers: 0.02 to 0.045 was seen


class EightBit:
    """Attention by codes; called with BNLD like every row, or piece by piece from linears."""

    def __init__(self, name: str, kernel: Kernel, wide_values: bool, exact: Callable) -> None:
        """`wide_values`: V stays in half precision. `exact`: attention for what is unfit."""
        self.name, self._kernel = name, kernel
        self._wide_values, self._exact = wide_values, exact
        self._said: set[str] = set()

    def __call__(self, q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor) -> Tensor:
        reason = unfit(q_BNLD.dtype, q_BNLD.shape[-1], q_BNLD.shape[2], k_BNLD.shape[2])
        if not q_BNLD.is_cuda:
            reason = reason or f"numbers on {q_BNLD.device.type}"
        if reason:
            self._say(reason)
            return self._exact(q_BNLD, k_BNLD, v_BNLD)
        from .kernels import prepass

        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q_BNLD, k_BNLD, v_BNLD))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # BNLD -> BLND
        codes = (prepass.code_queries(q), prepass.code_keys(k), self.values(v))
        return self._product(*codes, torch.empty(q.shape, dtype=q.dtype, device=q.device))

    def fuses(self, x_BLE: Tensor, *norms: nn.Module) -> bool:
        """Whether `attend` may be called for these tokens and norms."""
        tokens = x_BLE.shape[1]
        return unfit(x_BLE.dtype, HEAD_DIM, tokens, tokens) is None and fuses(x_BLE, *norms)

    def queries(self, x_BLE: Tensor, norm: nn.Module, rotary: Rotary) -> Coded:
        """Norm, rotary and codes of what the linear gave, in one pass."""
        from .kernels import prepass

        return prepass.code_queries(split_heads(x_BLE), norm_of(norm), rotary)

    def keys(self, x_BLE: Tensor, norm: nn.Module, rotary: Rotary) -> Coded:
        """The same for keys, in two passes: the mean over tokens comes off first."""
        from .kernels import prepass

        return prepass.code_keys(split_heads(x_BLE), norm_of(norm), rotary)

    def values(self, v_BLND: Tensor) -> Coded | Tensor:
        from .kernels import prepass

        return v_BLND if self._wide_values else prepass.code_values(v_BLND)

    def attend(self, q: Coded, k: Coded, v: Coded | Tensor, like_BLE: Tensor | Rows) -> Tensor:
        """BLE in the dtype and shape of `like_BLE`."""
        o = torch.empty(like_BLE.shape, dtype=like_BLE.dtype, device=like_BLE.device)
        return self._product(q, k, v, split_heads(o)).transpose(1, 2).flatten(2)  # BNLD -> BLE

    def _product(self, q: Coded, k: Coded, v: Coded | Tensor, o_BLND: Tensor) -> Tensor:
        with torch.cuda.device_of(o_BLND):
            self._kernel(q, k, v, o_BLND)
        return o_BLND.transpose(1, 2)  # BLND -> BNLD

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            log.info("attention %s leaves to PyTorch what it does not do: %s", self.name, reason)


def unfit(dtype: torch.dtype, head_dim: int, queries: int, keys: int) -> str | None:
    """Why one call is left to exact attention, or None."""
    if not is_plain_call():
        return "calls that need a gradient or are compiled"
    if dtype not in HALVES:
        return f"numbers of {str(dtype).removeprefix('torch.')}"
    if head_dim != HEAD_DIM:
        return f"heads of {head_dim} lanes, not {HEAD_DIM}"
    if queries != keys:
        return "cross-attention"
    if keys < LEAST_TOKENS:
        return f"fewer than {LEAST_TOKENS} tokens, which are as fast there"
    return None


def triton_row_blocked_by(card: Card) -> str | None:
    return triton_blocked_by(card, DESCRIPTORS)


def gluon_row_blocked_by(card: Card) -> str | None:
    if reason := triton_blocked_by(card):
        return reason
    if card.capability != (9, 0):
        return f"it is made for compute capability 9.0 and this is {dotted(card.capability)}"
    version = triton_version()
    if version != GLUON_TRITON:
        found = "none" if version is None else dotted(version)
        return f"it was tested with Triton {dotted(GLUON_TRITON)} alone and this is {found}"
    return None


def load_gluon(device: torch.device, exact: Callable) -> EightBit:
    """The Hopper row, after its trial. Raises CapabilityError when that fails."""
    from .kernels.launch import GluonKernel

    return _tried(EightBit("gluon", GluonKernel(), False, exact), device)


def load_triton(device: torch.device, exact: Callable) -> EightBit:
    """The row for any card; P V in half precision where a card multiplies no float8."""
    from .kernels.launch import triton_kernel

    wide_values = torch.cuda.get_device_capability(device) < (8, 9)
    return _tried(EightBit("triton", triton_kernel, wide_values, exact), device)


def _tried(attend: EightBit, device: torch.device) -> EightBit:
    """`attend` itself when it is right about a few tokens."""
    from .kernels import prepass
    from .trial import failure

    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, 700, 2, HEAD_DIM, generator=generator, device=device).bfloat16()
        for _ in range(3)
    )
    v *= torch.linspace(0, 4, 700, device=device).exp()[:, None, None]  # blocks of unlike size
    q_BNLD, k_BNLD, v_BNLD = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q_BNLD, k_BNLD, v_BNLD)

    def work() -> Tensor:
        codes = (prepass.code_queries(q), prepass.code_keys(k), attend.values(v))
        return attend._product(*codes, torch.empty_like(q))

    if reason := failure(work, expected, OWN_ERROR):
        raise CapabilityError(f"attention {attend.name!r} cannot run here: {reason}; use sdpa")
    return attend
