"""A weight file in memory as it lies on disk, copy-on-write: pages are read when they are used.

The libraries map with a reservation of as much RAM, which Linux refuses for a file larger than the
machine's ("Cannot allocate memory"): a 33 GB model would not load on 23 GB. Nothing writes to these
pages, so none is reserved here.
"""

from __future__ import annotations

import math
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError

# Python names it from 3.13 on.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class MappedFile:
    """`tensor` gives views that keep the mapping alive."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._memory = _map(file.fileno())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path.name} cannot be mapped into memory: {error}; close other programs, or use "
                "a smaller file of the same model (fp8, GGUF)"
            ) from error

    def tensor(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Of the bytes from `start` on, which need not be aligned."""
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=start)
        return flat.reshape(shape)


def _map(descriptor: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    flags = mmap.MAP_PRIVATE | NO_RESERVE
    return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
