"""A weight file in memory as it lies on disk, copy-on-write: pages are read when they are used.

The libraries map with a reservation of as much RAM, which Linux refuses for a file larger than the
machine's ("Cannot allocate memory"): a 33 GB model would not load on 23 GB. Nothing writes to these
pages, so none is reserved here.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError

# Python names it from 3.13 on.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
POPULATE_READ = 22  # MADV_POPULATE_READ
# What it answers for pages that would end the process: not in the file, not read, broken memory.
UNREADABLE = (errno.EFAULT, getattr(errno, "EHWPOISON", 133))


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


def fault_in(tensors: Iterable[Tensor], name: str) -> None:
    """Read the pages of mapped `tensors` now; CheckpointError where one cannot be read.

    To touch a page of a file that was cut short, or of a disk that fails, ends the whole process
    (SIGBUS). Linux 5.14 and later report it here instead; elsewhere nothing is done.
    madvise(2), https://man7.org/linux/man-pages/man2/madvise.2.html
    """
    if (advise := _advise()) is None:
        return
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.nbytes:
            continue
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in steps)
        begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        end = tensor.data_ptr() + (last + 1) * tensor.element_size()
        if (code := advise(begin, end - begin)) in UNREADABLE:
            raise CheckpointError(
                f"{name} cannot be read ({os.strerror(code)} at a page of its weights): its disk "
                "failed, or the file was cut short while it was in use; check the disk, and load "
                "a whole file again"
            )


@cache
def _advise() -> Callable[[int, int], int] | None:
    """(address, bytes) to the number of an error, or 0."""
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def advise(address: int, nbytes: int) -> int:
        return ctypes.get_errno() if madvise(address, nbytes, POPULATE_READ) else 0

    return advise
