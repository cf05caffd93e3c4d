"""One attention contract, several backends: q, k, v and the result are BNLD."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import Card, describe_card
from ..errors import CapabilityError
from .eight_bit import gluon_row_blocked_by, load_gluon, load_triton, triton_row_blocked_by
from .norm_rotary import HALVES, HEAD_DIM
from .sixteen_bit import load_gluon16
from .trial import failure
from .triton_support import dotted, is_plain_call

log = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

FLASH3_ERROR = 0.01  # of its trial: one rounding of bfloat16 is 0.004 at most
# FlashAttention's own build, and the wheel fa3-fwd; the first found is taken.
FLASH3_MODULES = ("flash_attn_interface", "fa3_fwd_interface")
CUDNN_SINCE = (2, 11)  # seen: PyTorch itself takes cuDNN on Hopper
# `auto` takes an 8-bit row where a forward of random 14B blocks stays as near to float32 as this,
# and within twice the error of exact attention in bfloat16. Seen on an H200 (four blocks, 10,920
# tokens, gates near one): exact 0.27 %, gluon 0.43 %, triton 0.52 %.
ERROR_BUDGET, WORSE_THAN_EXACT = 0.04, 2.0


class Backend(NamedTuple):
    load: Callable[[torch.device], Attend]
    blocked_by: Callable[[Card], str | None]  # None when usable, else the reason in words
    is_exact: bool = True
    # Compute capabilities on which the row was seen to be faster, an 8-bit one within these bounds.
    proven_on: tuple[tuple[int, int], ...] = ()


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own attention: always there, and the row every other one is tested against."""
    return F.scaled_dot_product_attention(q, k, v)


def sdpa_cudnn_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, by cuDNN where that can; older PyTorch puts FlashAttention 2 first on Hopper."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)


def _load_sdpa(device: torch.device) -> Attend:
    card = describe_card(device)
    return sdpa_cudnn_first if takes_cudnn(card) and card.torch < CUDNN_SINCE else sdpa


def takes_cudnn(card: Card) -> bool:
    """On Hopper cuDNN does 577 TFLOP/s where FlashAttention 2 does 365 (32,760 tokens, H200)."""
    return card.kind == "cuda" and card.capability == (9, 0) and card.torch >= (2, 7)


def _package_blocked_by(package: str, card: Card, least: tuple[int, int]) -> str | None:
    if find_spec(package) is None:
        return f"the {package} package is not installed"
    if card.kind not in ("cuda", "rocm"):
        return f"it needs a CUDA GPU and this is {card.kind}"
    if card.kind == "cuda" and card.capability < least:
        return f"it needs compute capability {dotted(least)} and this is {dotted(card.capability)}"
    return None


def _sage_blocked_by(card: Card) -> str | None:
    return _package_blocked_by("sageattention", card, (8, 0))


def _load_sage(_device: torch.device) -> Attend:
    from sageattention import sageattn

    return Packaged("sage", lambda q, k, v: sageattn(q, k, v, tensor_layout="HND"))


def _flash_blocked_by(card: Card) -> str | None:
    return _package_blocked_by("flash_attn", card, (8, 0))


def _load_flash(_device: torch.device) -> Attend:
    from flash_attn import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # BNLD -> BLND
        return flash_attn_func(q, k, v).transpose(1, 2)

    return Packaged("flash", attend)


def _flash3_blocked_by(card: Card) -> str | None:
    module = _flash3_module()
    if module is None:
        return f"the {FLASH3_MODULES[0]} package is not installed, nor is fa3-fwd"
    reason = _package_blocked_by(module, card, (9, 0))
    if reason is None and card.capability != (9, 0):
        return f"FlashAttention 3 is made for compute capability 9.0, not {dotted(card.capability)}"
    return reason


def _flash3_module() -> str | None:
    return next((name for name in FLASH3_MODULES if find_spec(name)), None)


def _load_flash3(device: torch.device) -> Attend:
    """After a trial: its wheels are made for one PyTorch and one CUDA each."""
    module = _flash3_module()
    if module is None:
        raise CapabilityError("attention 'flash3' cannot run here: its package is gone; use sdpa")
    flash, exact = Packaged("flash3", _by_flash3(module)), _load_sdpa(device)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 300, HEAD_DIM, generator=generator, device=device).bfloat16()
    expected = F.scaled_dot_product_attention(q, k, v)
    if reason := failure(lambda: flash(q, k, v), expected, FLASH3_ERROR, module):
        raise CapabilityError(f"attention 'flash3' cannot run here: {reason}; use sdpa")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # It takes half precision alone and, as published for use, gives no gradients.
        return flash(q, k, v) if q.dtype in HALVES and is_plain_call() else exact(q, k, v)

    return Packaged("flash3", attend)


def _by_flash3(module: str) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # BNLD -> BLND
        result = import_module(module).flash_attn_func(q, k, v)
        y = result[0] if isinstance(result, tuple) else result  # older ones add the log-sum
        return y.transpose(1, 2)

    return attend


class Packaged:
    """A package's attention under the name of its row; q, k, v and the result are BNLD."""

    def __init__(self, name: str, attend: Attend) -> None:
        self.name, self._attend = name, attend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(q, k, v)


def name_of(attend: Attend) -> str:
    """The row that gave `attend`; of anything else the name of the function."""
    if attend in (sdpa, sdpa_cudnn_first):
        return "sdpa"
    return getattr(attend, "name", None) or getattr(attend, "__name__", "unknown")


def _kitchen_blocked_by(card: Card) -> str | None:
    reason = _package_blocked_by("comfy_kitchen", card, (7, 5))
    if reason is None and find_spec("comfy_kitchen.sage_attention") is None:
        return "this comfy-kitchen has no int8 attention"
    return reason


def _load_kitchen(device: torch.device) -> Attend:
    from comfy_kitchen import int8_attention, int8_attention_is_available

    if not int8_attention_is_available(device):
        raise CapabilityError(
            "attention 'kitchen' cannot run here: comfy-kitchen has no kernel for this card; "
            "use auto"
        )
    return Packaged("kitchen", int8_attention)


def _load_gluon(device: torch.device) -> Attend:
    return load_gluon(device, _load_sdpa(device))


def _load_gluon16(device: torch.device) -> Attend:
    return load_gluon16(device, _load_sdpa(device))


def _load_triton(device: torch.device) -> Attend:
    return load_triton(device, _load_sdpa(device))


# Of those that `auto` may take, the first that is not blocked.
BACKENDS = {
    "gluon": Backend(_load_gluon, gluon_row_blocked_by, False, ((9, 0),)),
    "triton": Backend(_load_triton, triton_row_blocked_by, False, ((9, 0),)),
    # Not quantised. A bfloat16 forward of 14B took on an H200 (32,760 tokens) 2.52 s with flash3,
    # 2.64 s with gluon16 and 2.81 s with PyTorch's, which is cuDNN's there.
    "flash3": Backend(_load_flash3, _flash3_blocked_by, True, ((9, 0),)),
    "gluon16": Backend(_load_gluon16, gluon_row_blocked_by, True, ((9, 0),)),
    "sdpa": Backend(_load_sdpa, lambda card: None),
    "flash": Backend(_load_flash, _flash_blocked_by),
    "sage": Backend(_load_sage, _sage_blocked_by, False),
    "kitchen": Backend(_load_kitchen, _kitchen_blocked_by, False),
}


def select_attention(
    name: str = "auto", device: torch.device | str = "cpu", exact: bool = True
) -> Attend:
    """The attention called `name`; a named choice is honoured or refused, never replaced.

    `auto` is exact unless the model is not (`exact` False: its linears are 8-bit codes); then it
    takes an 8-bit row that was seen within ERROR_BUDGET on this kind of card and passes its trial.
    Exact on Hopper is FlashAttention 3 where it is installed and passes its own, else our kernel
    for 16 bits, else PyTorch's.
    Raises CapabilityError when `name` is unknown or cannot run on `device`.
    """
    device = torch.device(device)
    card = describe_card(device)
    if name == "auto":
        return _fastest(device, card, exact)
    if name not in BACKENDS:
        raise CapabilityError(f"attention {name!r} is unknown; use auto, {', '.join(BACKENDS)}")
    if reason := BACKENDS[name].blocked_by(card):
        raise CapabilityError(f"attention {name!r} cannot run here: {reason}; use auto")
    return _loaded(name, device)


def _fastest(device: torch.device, card: Card, exact: bool) -> Attend:
    for name, row in BACKENDS.items():
        is_proven = card.capability in row.proven_on
        if not row.is_exact and (exact or not is_proven):
            continue
        reason = row.blocked_by(card)
        if reason is None:
            try:
                return _loaded(name, device)
            except CapabilityError as refusal:
                reason = str(refusal)
        if is_proven:
            log.info("attention: not %s: %s", name, reason)
    raise AssertionError("PyTorch's own row is never blocked")


def _loaded(name: str, device: torch.device) -> Attend:
    attend = BACKENDS[name].load(device)
    why = ""
    if name == "sdpa" and takes_cudnn(describe_card(device)):
        why = " (cuDNN first)"
    elif name in ("flash3", "gluon16"):
        why = " (exact, and faster than cuDNN on this kind of card)"
    log.info("attention: %s%s", name, why)
    return attend
