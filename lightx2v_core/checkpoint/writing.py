"""New files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError


@contextmanager
def replacing(target: Path, nbytes: int) -> Iterator[Path]:
    """A path beside `target` that takes its name when all went well, and is gone otherwise.

    Raises CheckpointError, with `nbytes` as what is needed, when the disk does not take it.
    """
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        part.replace(target)
    except OSError as error:
        # numpy counts what was written and gives no number of the error.
        reason = error.strerror or f"the disk took only a part: {error}"
        raise CheckpointError(
            f"{target} could not be written ({reason}); it needs "
            f"{nbytes / 1e9:.1f} GB: free some disk space or choose another folder"
        ) from error
    finally:
        part.unlink(missing_ok=True)
