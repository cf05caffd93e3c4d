"""Whether our Triton kernels run on a device: asked once for each, with the reason if they do not.

Whoever uses them has the same in plain PyTorch, which computes wherever there is no kernel, and
wherever there are gradients.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..device import describe_card
from .rows import Form, Rows, quantise_rows
from .triton_support import is_plain_call, triton_blocked_by

log = logging.getLogger(__name__)

_allowed = ContextVar("Triton kernels are allowed", default=True)


class Kernels(NamedTuple):
    """The module ops/kernels/glue.py, or None and what keeps it from running."""

    module: ModuleType | None
    blocked_by: str = ""


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """Within it nothing computes in Triton: for comparisons."""
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def kernels_for(x: Tensor | Rows) -> ModuleType | None:
    """The kernels for what is computed from `x`; None where PyTorch computes."""
    if x.device.type != "cuda" or not is_plain_call() or not _allowed.get():
        return None
    return load_kernels(x.device).module


def load_kernels(device: torch.device | str) -> Kernels:
    """The kernels of `device`, after they have computed something small there."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _load(device)


def describe_kernels(device: torch.device | str) -> str:
    """For the line that tells what was loaded."""
    kernels = load_kernels(device)
    return "triton" if kernels.module else f"plain PyTorch ({kernels.blocked_by})"


@cache
def _load(device: torch.device) -> Kernels:
    found = _try(device)
    if isinstance(found, ModuleType):
        return Kernels(found)
    log.info("kernels: plain PyTorch: %s", found)
    return Kernels(None, found)


def _try(device: torch.device) -> ModuleType | str:
    """The module, or why it does not work: Triton compiles at first use, with the system's C
    compiler, and either may be missing or broken."""
    failures = (ImportError, OSError, AssertionError, RuntimeError, subprocess.SubprocessError)
    try:
        if reason := triton_blocked_by(describe_card(device)):
            return reason
        from triton.errors import TritonError
    except ImportError as error:
        return f"triton cannot be imported: {_one_line(error)}"
    try:
        module = import_module(".kernels.glue", __package__)
        return module if _is_right(module, device) else "they gave wrong numbers in their self-test"
    except torch.cuda.OutOfMemoryError:
        raise
    except (*failures, TritonError) as error:
        return f"triton fails here: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _is_right(module: ModuleType, device: torch.device) -> bool:
    """Rows of whole numbers, which have one right answer."""
    x = torch.arange(-127.0, 128.0, device=device).repeat(3, 1)
    rows = module.rows(x, Form(torch.float32, torch.int8, tokens=False))
    codes, scale = quantise_rows(x, torch.int8)
    return bool(torch.equal(rows.codes_LK, codes) and torch.allclose(rows.scale_L1, scale))
