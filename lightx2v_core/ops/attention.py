"""One attention contract, several backends: q, k, v and the result are BNLD."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CapabilityError

log = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Backend(NamedTuple):
    load: Callable[[], Attend]
    blocked_by: Callable[[torch.device], str | None]  # None when usable, else the reason in words


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own attention: always there, and the row every other one is tested against."""
    return F.scaled_dot_product_attention(q, k, v)


def _sage_blocked_by(device: torch.device) -> str | None:
    if find_spec("sageattention") is None:
        return "the sageattention package is not installed"
    return None if device.type == "cuda" else f"it needs an NVIDIA GPU and this is {device.type}"


def _load_sage() -> Attend:
    from sageattention import sageattn

    return lambda q, k, v: sageattn(q, k, v, tensor_layout="HND")


def _flash_blocked_by(device: torch.device) -> str | None:
    if find_spec("flash_attn") is None:
        return "the flash_attn package is not installed"
    return None if device.type == "cuda" else f"it needs a CUDA GPU and this is {device.type}"


def _load_flash() -> Attend:
    from flash_attn import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # BNLD -> BLND -> BNLD
        return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(
            1, 2
        )

    return attend


# "auto" takes the exact row: the 8-bit ones trade accuracy for speed and are asked for by name.
BACKENDS = {
    "sdpa": Backend(lambda: sdpa, lambda device: None),
    "flash": Backend(_load_flash, _flash_blocked_by),
    "sage": Backend(_load_sage, _sage_blocked_by),
}


def select_attention(name: str = "auto", device: torch.device | str = "cpu") -> Attend:
    """The attention called `name`; a named choice is honoured or refused, never replaced.

    Raises CapabilityError when `name` is unknown or cannot run on `device`.
    """
    device = torch.device(device)
    if name == "auto":
        name = next(key for key, row in BACKENDS.items() if row.blocked_by(device) is None)
    elif name not in BACKENDS:
        raise CapabilityError(f"attention {name!r} is unknown; use auto, {', '.join(BACKENDS)}")
    elif reason := BACKENDS[name].blocked_by(device):
        raise CapabilityError(f"attention {name!r} cannot run here: {reason}; use auto")
    log.info("attention: %s", name)
    return BACKENDS[name].load()
