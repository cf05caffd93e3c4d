"""One attention contract, several backends: q, k, v and the result are BNLD."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import Card, describe_card
from ..errors import CapabilityError
from .eight_bit import gluon_row_blocked_by, load_gluon, load_triton, triton_row_blocked_by
from .triton_support import dotted

log = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

CUDNN_SINCE = (2, 11)  # seen: PyTorch itself takes cuDNN on Hopper
# `auto` takes an 8-bit row where a forward of random 14B blocks stays as near to float32 as this,
# and within twice the error of exact attention in bfloat16. Seen on an H200 (four blocks, 10,920
# tokens, gates near one): exact 0.27 %, gluon 0.43 %, triton 0.52 %.
ERROR_BUDGET, WORSE_THAN_EXACT = 0.04, 2.0


class Backend(NamedTuple):
    load: Callable[[torch.device], Attend]
    blocked_by: Callable[[Card], str | None]  # None when usable, else the reason in words
    is_exact: bool = True
    # Compute capabilities on which an 8-bit row was seen within these bounds, and faster.
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

    return lambda q, k, v: sageattn(q, k, v, tensor_layout="HND")


def _flash_blocked_by(card: Card) -> str | None:
    return _package_blocked_by("flash_attn", card, (8, 0))


def _load_flash(_device: torch.device) -> Attend:
    from flash_attn import flash_attn_func

    return _token_major(flash_attn_func)


def _flash3_blocked_by(card: Card) -> str | None:
    reason = _package_blocked_by("flash_attn_interface", card, (9, 0))
    if reason is None and card.capability != (9, 0):
        return f"FlashAttention 3 is made for compute capability 9.0, not {dotted(card.capability)}"
    return reason


def _load_flash3(_device: torch.device) -> Attend:
    from flash_attn_interface import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash_attn_func(q, k, v)
        return result[0] if isinstance(result, tuple) else result  # older ones add the log-sum

    return _token_major(attend)


def _token_major(attend: Attend) -> Attend:
    """`attend` takes and gives BLND."""

    def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return turned


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
    return int8_attention


def _load_gluon(device: torch.device) -> Attend:
    return load_gluon(device, _load_sdpa(device))


def _load_triton(device: torch.device) -> Attend:
    return load_triton(device, _load_sdpa(device))


# Of those that `auto` may take, the first that is not blocked.
BACKENDS = {
    "gluon": Backend(_load_gluon, gluon_row_blocked_by, False, ((9, 0),)),
    "triton": Backend(_load_triton, triton_row_blocked_by, False, ((9, 0),)),
    "sdpa": Backend(_load_sdpa, lambda card: None),
    "flash": Backend(_load_flash, _flash_blocked_by),
    "flash3": Backend(_load_flash3, _flash3_blocked_by),
    "sage": Backend(_load_sage, _sage_blocked_by, False),
    "kitchen": Backend(_load_kitchen, _kitchen_blocked_by, False),
}


def select_attention(
    name: str = "auto", device: torch.device | str = "cpu", exact: bool = True
) -> Attend:
    """The attention called `name`; a named choice is honoured or refused, never replaced.

    `auto` is exact unless the model is not (`exact` False: its linears are 8-bit codes); then it
    takes an 8-bit row that was seen within ERROR_BUDGET on this kind of card and passes its trial.
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
        reason = row.blocked_by(card)
        if reason is None and not row.is_exact:
            if exact or card.capability not in row.proven_on:
                continue
            try:
                return _loaded(name, device)
            except CapabilityError as refusal:
                reason = str(refusal)
        if reason is None:
            return _loaded(name, device)
        if not (exact or row.is_exact) and card.capability in row.proven_on:
            log.info("attention: not %s: %s", name, reason)
    raise AssertionError("PyTorch's own row is never blocked")


def _loaded(name: str, device: torch.device) -> Attend:
    attend = BACKENDS[name].load(device)
    by_cudnn = name == "sdpa" and takes_cudnn(describe_card(device))
    log.info("attention: %s%s", name, " (cuDNN first)" if by_cudnn else "")
    return attend
