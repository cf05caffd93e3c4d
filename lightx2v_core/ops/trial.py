"""A kernel is tried once before its first use, so that a card or a Triton it fails on is known."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from torch import Tensor

# Of Python, PyTorch and the C compiler that Triton calls at first use.
FAILURES = (
    RuntimeError,
    ImportError,
    AttributeError,
    TypeError,
    ValueError,
    OSError,
    subprocess.SubprocessError,
)


def failure(work: Callable[[], Tensor], expected: Tensor, limit: float) -> str | None:
    """None when `work` gives `expected` within the relative error `limit`, else what went wrong.

    What a kernel that does not fit raises, compiling or running, is told and not raised.
    """
    try:
        from triton import TritonError
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    try:
        actual = work()
        error = float((actual.float() - expected.float()).norm() / expected.float().norm())
    except (TritonError, *FAILURES) as told:
        first = next(iter(str(told).strip().splitlines()), "")
        return f"our kernel does not run here: {type(told).__name__} {first}"
    if not error < limit:
        return f"our kernel is wrong here by {error:.1%} of the result; {limit:.1%} is allowed"
    return None
