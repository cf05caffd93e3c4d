"""Whether our Triton kernels can run: asked before they are imported. Knows no kernel."""

from __future__ import annotations

import logging
import re
from importlib.util import find_spec

import torch

from ..device import Card

log = logging.getLogger(__name__)

LEAST_TRITON = (3, 2)  # split, join and staged ranges; each kernel is tried before it is used
LEAST_CAPABILITY = (8, 0)


def triton_version() -> tuple[int, int] | None:
    """None where the package is missing. Imports it where it is there."""
    if find_spec("triton") is None:
        return None
    import triton

    major, minor = re.findall(r"\d+", triton.__version__)[:2]
    return int(major), int(minor)


def triton_blocked_by(card: Card, least: tuple[int, int] = LEAST_TRITON) -> str | None:
    """None when our kernels can be tried on `card` with Triton `least`, else the reason."""
    if card.kind == "rocm":
        return "our kernels have not been tried on AMD cards"
    if card.kind != "cuda":
        return f"it needs an NVIDIA GPU and this is {card.kind}"
    if card.capability < LEAST_CAPABILITY:
        return f"it needs compute capability 8.0 and this is {dotted(card.capability)}"
    try:
        version = triton_version()
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if version is None:
        return "the triton package is not installed"
    if version < least:
        return f"it needs Triton {dotted(least)} and this is {dotted(version)}"
    return None


def dotted(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"


def is_plain_call() -> bool:
    """Whether a kernel without gradient may stand in: no autograd, no compiler looking on."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()
