"""Messages between the service and its workers: one JSON object a line, plain data, over pipes.

service -> worker
    {"kind": "run", "id": ..., "request": {...}, "output": "path of the mp4"}
    {"kind": "cancel", "id": ...}
    end of file: stop at once
worker -> service
    {"kind": "ready", "lines": [...]}                   the model is loaded
    {"kind": "unusable", "error": ...}                  it never will be; then the worker ends
    {"kind": "progress", "id": ..., "stage": ..., "done": n, "total": m}
    {"kind": "done", "id": ..., "facts": {...}}         the file is whole
    {"kind": "failed", "id": ..., "error": ..., "error_type": ...}
    {"kind": "cancelled", "id": ...}

Nothing but JSON is ever read from the other side, so a broken worker can say wrong things and run
nothing here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from .errors import RequestError

MAX_LINE = 1 << 20  # bytes; images travel as files


def encode(message: Mapping[str, object]) -> bytes:
    """One line, ASCII alone, with its end of line. RequestError when it is longer than a line."""
    line = json.dumps(message, allow_nan=False).encode("ascii") + b"\n"
    if len(line) > MAX_LINE:
        raise RequestError(f"a message of {len(line)} bytes is over the limit of {MAX_LINE}")
    return line


def decode(line: bytes) -> dict[str, object]:
    """The message in a line. RequestError for anything that is not a JSON object with a kind."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{line[:60]!r} is not a message: {error}") from error
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise RequestError(f"{line[:60]!r} is not a message: an object with a kind is needed")
    return message
