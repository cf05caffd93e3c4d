"""New files that appear whole or not at all."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError, LightX2VError
from .headers import gigabytes

log = logging.getLogger(__name__)

MOST_KEPT = 1000  # rescued files of one name


@contextmanager
def replacing(target: Path, nbytes: int) -> Iterator[Path]:
    """A path beside `target` that takes its name when all went well, and is gone otherwise.

    Raises CheckpointError, with `nbytes` as what is needed, when the disk does not take it.
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(target)
    except OSError as error:
        # numpy counts what was written and gives no number of the error.
        reason = error.strerror or f"the disk took only a part: {error}"
        raise CheckpointError(
            f"{target} could not be written ({reason}); it needs "
            f"{gigabytes(nbytes)}: free some disk space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_somewhere(write: Callable[[Path], object], path: Path) -> Path:
    """`write(path)`, and where that fails under the same name in the system's folder for temporary
    files, so that what took an hour is not lost to a full disk. Returns where it is.

    Raises the error of the first attempt, which says why and what to do, when both fail.
    """
    try:
        write(path)
        return path
    except LightX2VError as error:
        first = error
    names = (path.name, *(f"{path.stem}-{n}{path.suffix}" for n in range(2, MOST_KEPT)))
    try:
        folder = Path(tempfile.gettempdir()) / "lightx2v"
        other = next(folder / name for name in names if not (folder / name).exists())
        write(other)
    except (LightX2VError, OSError, StopIteration):
        raise first from None
    log.warning("%s; it is kept as %s", first, other)
    return other
