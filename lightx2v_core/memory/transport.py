"""How the bytes of a block come onto the device: at once, or on a side stream of a CUDA card.

On a card every copy waits for the computation that used its buffer before, and every computation
waits for its copy; nothing else waits. Page-locked blocks are copied by the card itself; a worker
thread reads the others into two page-locked pieces first, so that page faults of a mapped file are
not felt by whoever computes.
"""

from __future__ import annotations

import logging
import mmap
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..checkpoint.mapping import fault_in
from .files import FileStamp, Mapped, gather
from .ram import pinnable_bytes
from .slots import Layout

log = logging.getLogger(__name__)

STAGING_BYTES = 64 * 2**20  # each of two


class HostBlock:
    """The tensors of one block off the card. `mapped` tells which are views of `files`."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        files: Sequence[FileStamp] = (),
        mapped: Mapped | None = None,
    ) -> None:
        self.tensors = tuple(tensors)
        self.layout = Layout(tensors)
        self._of_file = [t for t in tensors if mapped is not None and mapped.holds(t)]
        self.may_pin = False
        self.pinned: Tensor | None = None  # all bytes in the layout's order, page-locked
        self._files = tuple(files)

    @property
    def in_file(self) -> bool:
        """Nothing of it takes RAM of its own."""
        return len(self._of_file) == len(self.tensors) > 0

    @property
    def is_locked(self) -> bool:
        """Page-locked now, or when it has been read once."""
        return self.may_pin or self.pinned is not None

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        return all(a is b for a, b in zip(self.tensors, tensors, strict=True))

    def check(self) -> None:
        """Raise CheckpointError when what would be read is no longer what was loaded, or cannot
        be: its pages are read for that."""
        self.check_files()
        if self._of_file and self._files:
            fault_in(self._of_file, ", ".join(stamp.path.name for stamp in self._files[:3]))

    def check_files(self) -> None:
        """The same of the files alone, for who reads them and is told what cannot be read."""
        for stamp in self._files if self._of_file else ():
            stamp.check()


class Transport(Protocol):
    """Fills buffers ("slots") for one reader. `start` to `wait` to `done`, then `start` again."""

    pins: bool  # whether page-locked RAM is of use

    def start(self, slot: int, source: HostBlock, target: Tensor) -> None:
        """Begin to copy `source` into `target`, after what was computed from this slot before."""
        ...

    def wait(self, slot: int) -> None:
        """What is computed from now on sees the copy. Raises what the copy raised."""
        ...

    def done(self, slot: int) -> None:
        """What was computed so far is all that reads this slot's present content."""
        ...

    def close(self) -> None:
        """Wait until nothing is on its way."""
        ...


class DirectTransport:
    """Copies when asked: CPU, MPS, and every device without CUDA's streams."""

    pins = False

    def start(self, slot: int, source: HostBlock, target: Tensor) -> None:
        source.check()
        with torch.inference_mode():
            for offset, part in source.layout.parts(source.tensors):
                target[offset : offset + part.numel()].copy_(part)

    def wait(self, slot: int) -> None:
        """The copy was made in `start`."""

    def done(self, slot: int) -> None:
        """Nothing runs ahead."""

    def close(self) -> None:
        """Nothing is on its way."""


class Stream(Protocol):
    """Work in order; two of them are ordered by events alone."""

    def wait_event(self, event: Event, /) -> None: ...
    def synchronize(self) -> None: ...


class Event(Protocol):
    """A point in a stream."""

    def record(self, stream: Stream, /) -> None: ...
    def synchronize(self) -> None: ...


class Cuda(Protocol):
    """The few things CudaTransport needs of a card; a recorder in tests."""

    def activate(self) -> AbstractContextManager[object]: ...
    def stream(self) -> Stream: ...
    def current_stream(self) -> Stream: ...
    def event(self) -> Event: ...
    def copy(self, target: Tensor, source: Tensor, stream: Stream, /) -> None: ...
    def register(self, memory: Tensor, /) -> bool: ...
    def unregister(self, address: int, /) -> None: ...


class TorchCuda:
    """`Cuda` on a real card."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def activate(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self._device)

    def stream(self) -> Stream:
        return cast(Stream, torch.cuda.Stream(self._device))

    def current_stream(self) -> Stream:
        return cast(Stream, torch.cuda.current_stream(self._device))

    def event(self) -> Event:
        return cast(Event, torch.cuda.Event(blocking=True))

    def copy(self, target: Tensor, source: Tensor, stream: Any) -> None:  # noqa: ANN401
        with torch.cuda.stream(stream), torch.inference_mode():
            target.copy_(source, non_blocking=True)
        target.record_stream(stream)

    def register(self, memory: Tensor) -> bool:
        portable = 1  # cudaHostRegisterPortable
        code = _runtime().cudaHostRegister(memory.data_ptr(), memory.nbytes, portable)
        if int(code) == 0:
            return True
        self._forget_error()
        return False

    def unregister(self, address: int) -> None:
        torch.cuda.synchronize(self._device)
        _runtime().cudaHostUnregister(address)

    def _forget_error(self) -> None:
        """A refusal stays behind as CUDA's last error, and the next kernel would report it."""
        try:
            torch.ones(1, device=self._device).add_(1)
            torch.cuda.synchronize(self._device)
        except RuntimeError as error:
            log.debug("after the refusal of page-locked memory: %s", error)


def _runtime() -> Any:  # noqa: ANN401 - a module that PyTorch makes at run time
    return torch.cuda.cudart()


def private_memory(nbytes: int) -> Tensor:
    """Page-aligned bytes of this process alone, given back to the system with the tensor."""
    if sys.platform == "win32":
        region = mmap.mmap(-1, nbytes)
    else:
        region = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # Fewer pages to fault and to lock. Kernels without huge pages refuse.
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):
                region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)


def pinned_memory(
    cuda: Cuda, nbytes: int, fill: Callable[[Tensor], None] | None = None
) -> Tensor | None:
    """Page-locked bytes, exactly as many as asked for; None where the system refuses them.

    PyTorch's own pinned allocator rounds up to a power of two, twice the RAM at worst. `fill`
    writes them first: the driver locks pages that are there faster than it makes them (2 GB on an
    H200's machine: 0.20 s, where locking came first 1.06 s; small pages 0.43 and 1.07 s).
    """
    try:
        memory = private_memory(nbytes)
    except (OSError, MemoryError):
        return None
    if fill is not None:
        fill(memory)
    if not cuda.register(memory):
        return None
    # Not at exit: the driver has gone by then and takes its locks with it.
    weakref.finalize(memory, cuda.unregister, memory.data_ptr()).atexit = False
    return memory


class CudaTransport:
    """Copies on a side stream, ordered by events. `room` says how much may be page-locked now."""

    pins = True

    def __init__(
        self, cuda: Cuda, slots: int = 2, room: Callable[[], int] = pinnable_bytes
    ) -> None:
        self._cuda, self._room = cuda, room
        self._stream = cuda.stream()
        self._worker: ThreadPoolExecutor | None = None
        self._copies: list[Future[None] | None] = [None] * slots
        self._ready = [cuda.event() for _ in range(slots)]
        self._free = [cuda.event() for _ in range(slots)]
        self._staging: list[tuple[Tensor, Event]] = []
        self.refused_bytes = 0

    def start(self, slot: int, source: HostBlock, target: Tensor) -> None:
        self._settle(slot)
        if source.pinned is not None:
            self._stream.wait_event(self._free[slot])
            self._send(source.pinned, target, self._ready[slot])
            return
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="lightx2v-weights")
        self._copies[slot] = self._worker.submit(self._load, slot, source, target)

    def wait(self, slot: int) -> None:
        copy, self._copies[slot] = self._copies[slot], None
        if copy is not None:
            copy.result()
        self._cuda.current_stream().wait_event(self._ready[slot])

    def done(self, slot: int) -> None:
        self._settle(slot)
        self._free[slot].record(self._cuda.current_stream())

    def close(self) -> None:
        for slot in range(len(self._copies)):
            self._settle(slot)
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None
        self._stream.synchronize()
        self._staging.clear()

    def _settle(self, slot: int) -> None:
        """A copy that nobody waited for ends before its slot gets another; its error is moot."""
        copy, self._copies[slot] = self._copies[slot], None
        if copy is not None:
            copy.exception()

    def _load(self, slot: int, source: HostBlock, target: Tensor) -> None:
        """In the worker: through page-locked memory, kept with the block where it may be."""
        with self._cuda.activate(), torch.inference_mode():
            source.check_files()
            self._stream.wait_event(self._free[slot])
            if source.may_pin and self._pin(source):
                assert source.pinned is not None
                self._send(source.pinned, target, self._ready[slot])
                return
            source.check()
            self._send_in_pieces(source, target)
            self._ready[slot].record(self._stream)

    def _send(self, source: Tensor, target: Tensor, ready: Event) -> None:
        self._cuda.copy(target[: source.numel()], source, self._stream)
        ready.record(self._stream)

    def _pin(self, source: HostBlock) -> bool:
        source.may_pin = False  # asked for once
        nbytes = source.layout.nbytes

        def fill(memory: Tensor) -> None:
            parts = source.layout.parts(source.tensors)
            gather((memory[offset : offset + part.numel()], part) for offset, part in parts)

        memory = pinned_memory(self._cuda, nbytes, fill) if nbytes <= self._room() else None
        if memory is None:
            if not self.refused_bytes:
                log.warning(
                    "%.2f GB of page-locked RAM are not to be had; such blocks are read from the "
                    "file at each step instead, through %.2f GB",
                    nbytes / 1e9,
                    2 * STAGING_BYTES / 1e9,
                )
            self.refused_bytes += nbytes
            return False
        source.pinned = memory
        return True

    def _send_in_pieces(self, source: HostBlock, target: Tensor) -> None:
        if not self._staging:
            self._staging = [self._make_staging() for _ in range(2)]
        turn = 0
        for offset, part in source.layout.parts(source.tensors):
            for begin in range(0, part.numel(), STAGING_BYTES):
                piece = part[begin : begin + STAGING_BYTES]
                memory, sent = self._staging[turn]
                turn = 1 - turn
                sent.synchronize()  # the piece that was here has left
                memory[: piece.numel()].copy_(piece)
                place = target[offset + begin : offset + begin + piece.numel()]
                self._cuda.copy(place, memory[: piece.numel()], self._stream)
                sent.record(self._stream)

    def _make_staging(self) -> tuple[Tensor, Event]:
        """Where even this little is refused ordinary memory serves: the worker waits for copies."""
        memory = pinned_memory(self._cuda, STAGING_BYTES)
        return (private_memory(STAGING_BYTES) if memory is None else memory), self._cuda.event()


def make_transport(device: torch.device) -> Transport:
    """Streams and page-locked memory where PyTorch drives CUDA or ROCm; else direct copies."""
    return CudaTransport(TorchCuda(device)) if device.type == "cuda" else DirectTransport()
