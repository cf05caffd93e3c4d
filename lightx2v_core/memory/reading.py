"""Weights of mapped files onto a card at the speed of the disk: several threads read at a time.

Touching a mapped page after another leaves a fast disk and the bus waiting. Here each thread reads
large pieces of the file into page-locked memory of its own and sends them on a stream of its own;
the mapping itself is not touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .files import READERS, Mapped, read_into
from .readahead import pieces
from .slots import flat_bytes
from .transport import Cuda, TorchCuda, pinned_memory, private_memory

PIECE_BYTES = 16 * 2**20  # page-locked, two for each reader
LEAST_BYTES = 2**20  # smaller tensors are copied plainly


class Part(NamedTuple):
    """A piece of a file and where its bytes belong."""

    path: Path
    start: int
    target: Tensor  # uint8, on the card


def to_device(
    tensors: Sequence[Tensor],
    device: torch.device,
    make_cuda: Callable[[torch.device], Cuda] = TorchCuda,
) -> list[Tensor]:
    """Copies of `tensors` on `device`; those of mapped files read in parallel where that is CUDA.

    Raises CheckpointError when a file ends too early.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    return read_to(tensors, device, make_cuda(device))


def read_to(tensors: Sequence[Tensor], device: torch.device, cuda: Cuda) -> list[Tensor]:
    """`to_device` by way of `cuda`."""
    mapped, copies, parts = Mapped(), [], []
    for tensor in tensors:
        found = mapped.locate(tensor) if tensor.nbytes >= LEAST_BYTES else None
        if found is None or not tensor.is_contiguous():
            copies.append(tensor.to(device))
            continue
        copies.append(torch.empty_like(tensor, device=device))
        path, start = found
        target = flat_bytes(copies[-1])
        for piece in pieces(path, start, tensor.nbytes, PIECE_BYTES):
            begin = piece.start - start
            parts.append(Part(path, piece.start, target[begin : begin + piece.nbytes]))
    if parts:
        _Readers(cuda, parts).run()
    return copies


class _Readers:
    """Threads that share one list of parts. The first error ends all of them and is raised."""

    def __init__(self, cuda: Cuda, parts: Sequence[Part]) -> None:
        self._cuda, self._count = cuda, min(READERS, len(parts))
        self._rest, self._lock = iter(parts), threading.Lock()
        self._allocated = cuda.event()
        self._failed = False

    def run(self) -> None:
        # What used this memory before comes first.
        self._allocated.record(self._cuda.current_stream())
        with ThreadPoolExecutor(self._count, thread_name_prefix="lightx2v-read") as pool:
            done = [pool.submit(self._work) for _ in range(self._count)]
        for future in done:
            future.result()

    def _next(self) -> Part | None:
        with self._lock:
            return None if self._failed else next(self._rest, None)

    def _work(self) -> None:
        with self._cuda.activate(), torch.inference_mode():
            stream = self._cuda.stream()
            stream.wait_event(self._allocated)
            staging = [(_staging(self._cuda), self._cuda.event()) for _ in range(2)]
            turn = 0
            try:
                while (part := self._next()) is not None:
                    memory, sent = staging[turn]
                    turn = 1 - turn
                    sent.synchronize()  # the piece that was here has left
                    piece = memory[: part.target.numel()]
                    read_into(piece, part.path, part.start)
                    self._cuda.copy(part.target, piece, stream)
                    sent.record(stream)
            except BaseException:
                self._failed = True
                raise
            finally:
                stream.synchronize()


def _staging(cuda: Cuda) -> Tensor:
    memory = pinned_memory(cuda, PIECE_BYTES)
    return private_memory(PIECE_BYTES) if memory is None else memory
