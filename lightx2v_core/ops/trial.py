"""A kernel is tried once before its first use, so that a card or a Triton it fails on is known."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import torch
from torch import Tensor


def failure(
    work: Callable[[], Tensor], expected: Tensor, limit: float, what: str = "our kernel"
) -> str | None:
    """None when `work` gives `expected` within the relative error `limit`, else what went wrong.

    What a kernel that does not fit raises, compiling or running, is told and not raised.
    """
    try:
        with torch.no_grad():  # weights of a norm want a gradient
            actual, wide = work().float(), expected.detach().float()
            error = float((actual - wide).norm() / wide.norm())
    except _failures() as told:
        first = next(iter(str(told).strip().splitlines()), "")
        return f"{what} does not run here: {type(told).__name__} {first}"
    if not error < limit:
        return f"{what} is wrong here by {error:.1%} of the result; {limit:.1%} is allowed"
    return None


def _failures() -> tuple[type[Exception], ...]:
    """Of Python, PyTorch, Triton where it is, and the C compiler that it calls at first use."""
    known = (RuntimeError, ImportError, AttributeError, TypeError, ValueError, OSError)
    try:
        from triton import TritonError
    except ImportError:
        return (*known, subprocess.SubprocessError)
    return (*known, subprocess.SubprocessError, TritonError)
