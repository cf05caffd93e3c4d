"""Weight files into the system's page cache ahead of whoever maps them, several pieces at a time.

Pages of a mapped file are read when they are touched, a little at a time: a disk that is fast only
with many requests on their way is left waiting. Standard library alone, so that reading can begin
before PyTorch is imported.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .ram import available_bytes, margin_bytes

log = logging.getLogger(__name__)

# The system reads a plain file in small windows, one for each thread that waits.
PIECE_BYTES = 4 * 2**20
THREADS = 16
COMMANDS = {"generate", "bench"}
WEIGHTS = {".safetensors", ".gguf", ".pth", ".pt", ".bin", ".ckpt"}


class Piece(NamedTuple):
    """Bytes of a file."""

    path: Path
    start: int
    nbytes: int


def pieces(path: Path, start: int, nbytes: int, size: int = PIECE_BYTES) -> Iterator[Piece]:
    """`nbytes` from `start` on, in order, at most `size` at a time."""
    for begin in range(start, start + nbytes, size):
        yield Piece(path, begin, min(size, start + nbytes - begin))


def files_of(paths: Iterable[Path]) -> list[Path]:
    """Weight files: those named, and those in named folders; each once, in that order."""
    found: dict[Path, None] = {}
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        found |= {file: None for file in inside if file.suffix in WEIGHTS and file.is_file()}
    return list(found)


def read_ahead(paths: Iterable[Path], room: int | None = None) -> ReadAhead:
    """Begin to read `paths`, in this order, as far as free RAM holds them.

    `room` is how many bytes at most; None asks the system. Files that cannot be read are left to
    whoever opens them for good.
    """
    if room is None:
        free = available_bytes()
        room = 0 if free is None else free - margin_bytes()
    wanted = []
    for path in files_of(paths):
        nbytes = min(path.stat().st_size, max(room, 0))
        room -= nbytes
        wanted += list(pieces(path, 0, nbytes))
    return ReadAhead(wanted)


def read_ahead_named(arguments: Sequence[str]) -> ReadAhead | None:
    """What a command line names, for commands that read weights; the transformer last, since text
    is encoded first."""
    if not arguments or arguments[0] not in COMMANDS or "--dry-run" in arguments:
        return None
    values = [value for argument in arguments[1:] for value in argument.split("=", 1)]
    last = set(values[values.index("--model") + 1 :][:1]) if "--model" in values else set()
    paths = [Path(value) for value in values if value not in last and not value.startswith("-")]
    # A folder may hold far more than is used: the pipeline knows its parts.
    return read_ahead(path for path in [*paths, *map(Path, last)] if path.is_file())


class ReadAhead:
    """Threads that read `wanted` in order and forget what they read."""

    def __init__(self, wanted: Sequence[Piece], threads: int = THREADS) -> None:
        self.bytes_read = 0
        self._rest, self._lock = iter(wanted), threading.Lock()
        self._stopped = False
        count = min(threads, len(wanted))
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Read nothing more; returns when the pieces under way are done."""
        self._stopped = True
        self.wait()

    def wait(self) -> None:
        """Until everything was read."""
        for thread in self._threads:
            thread.join()

    def _next(self) -> Piece | None:
        with self._lock:
            return None if self._stopped else next(self._rest, None)

    def _work(self) -> None:
        buffer = bytearray(PIECE_BYTES)
        while (piece := self._next()) is not None:
            try:
                with piece.path.open("rb", buffering=0) as file:
                    file.seek(piece.start)
                    count = file.readinto(memoryview(buffer)[: piece.nbytes]) or 0
            except OSError as error:
                log.debug("not read ahead: %s", error)
                return
            with self._lock:
                self.bytes_read += count
