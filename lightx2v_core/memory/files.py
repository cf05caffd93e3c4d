"""Which tensors are views of a mapped file, and whether that file is still the one it was."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from .readahead import pieces

READERS = 8
MAPS = Path("/proc/self/maps")


@dataclass(frozen=True, slots=True)
class FileStamp:
    """A weight file as it was when it was mapped."""

    path: Path
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        found = path.stat()
        return cls(path, found.st_size, found.st_mtime_ns)

    def check(self) -> None:
        """Raise CheckpointError when the file is another one now.

        Weights that are read from a file that was cut short end the whole process.
        """
        try:
            now = FileStamp.of(self.path)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self.path} is gone, and weights are still read from it; put it back, or load "
                "the model again from where it is now"
            ) from error
        if now != self:
            raise CheckpointError(
                f"{self.path.name} was changed on disk after it was loaded ({self.size} bytes "
                f"then, {now.size} now); load the model again, and replace weight files only while "
                "nothing uses them"
            )


def read_into(memory: Tensor, path: Path, start: int) -> None:
    """The bytes of a file from `start` on into all of `memory` (uint8, on the host).

    Raises CheckpointError where the file ends before.
    """
    view, filled = memory.numpy().data, 0
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while filled < len(view):
            count = file.readinto(view[filled:])
            if not count:
                raise CheckpointError(
                    f"{path.name} ends at byte {start + filled}, inside a tensor; download it again"
                )
            filled += count


def gather(parts: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy `source` into `target` for each (target, source), bytes on the host.

    What is a view of a mapped file is read from the file by several threads, which a disk serves
    faster than one page after another. Raises CheckpointError where the file ends before.
    """
    mapped, reads = Mapped(), []
    for target, source in parts:
        found = mapped.locate(source)
        if found is None:
            target.copy_(source)
            continue
        for piece in pieces(*found, source.nbytes):
            begin = piece.start - found[1]
            reads.append((target[begin : begin + piece.nbytes], piece.path, piece.start))
    if reads:
        with ThreadPoolExecutor(min(READERS, len(reads)), "lightx2v-gather") as pool:
            list(pool.map(lambda read: read_into(*read), reads))


class Mapped:
    """Looks up addresses among the file mappings of this process.

    Where the system does not list them every tensor counts as mapped: the careful answer, since
    such a tensor is copied before it is page-locked.
    """

    def __init__(self, maps: Path = MAPS) -> None:
        self._known = maps.is_file()
        # First and last address, offset of the first in the file, inode and path.
        self._ranges: list[tuple[int, int, int, int, str]] = []
        for line in maps.read_text().splitlines() if self._known else ():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[4] != "0":  # an inode: backed by a file
                first, last = (int(part, 16) for part in fields[0].split("-"))
                offset, inode = int(fields[2], 16), int(fields[4])
                self._ranges.append((first, last, offset, inode, fields[5]))
        self._ranges.sort()

    def holds(self, tensor: Tensor) -> bool:
        if tensor.device.type != "cpu":
            return False
        if not self._known:
            return True
        return self._range(tensor) is not None

    def locate(self, tensor: Tensor) -> tuple[Path, int] | None:
        """The file that `tensor` is a view of, and its first byte there; None where that is not
        known, or is no longer the file of that name."""
        if tensor.device.type != "cpu" or (found := self._range(tensor)) is None:
            return None
        first, last, offset, inode, name = found
        path, address = Path(name), tensor.data_ptr()
        if address + tensor.nbytes > last or not path.is_file() or path.stat().st_ino != inode:
            return None
        return path, offset + address - first

    def _range(self, tensor: Tensor) -> tuple[int, int, int, int, str] | None:
        address = tensor.data_ptr()
        place = bisect.bisect_right(self._ranges, address, key=lambda found: found[0]) - 1
        return self._ranges[place] if place >= 0 and address < self._ranges[place][1] else None


def stamps(paths: Iterable[Path]) -> tuple[FileStamp, ...]:
    return tuple(FileStamp.of(path) for path in sorted(set(paths)) if path.is_file())
