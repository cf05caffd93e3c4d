"""JSON as LightX2V's documentation shows it: with comments, and a comma before a closing bracket.

What is not JSON is blanked out in place, so that every message names the line and column of the
file as it is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import RequestError

LARGEST = 4_000_000  # bytes; a configuration has a few thousand
# A string, a comment to the end of its line, a comment between marks, or one that never ends.
_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*"|(?P<comment>//[^\n]*|/\*.*?\*/)|(?P<open>/\*)', re.DOTALL)
_LAST_COMMA = re.compile(r'"(?:[^"\\\n]|\\.)*"|[\[{]\s*,|(?P<comma>,)(?=\s*[}\]])')


def read_object(path: Path) -> tuple[dict[str, object], list[str]]:
    """The object in the file, and the keys that stand in it twice (the last one counts).

    Raises RequestError with line and column where it is not readable.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise RequestError(
                f"{path} has {path.stat().st_size / 1e6:.0f} MB and is no configuration; give the "
                "JSON file, not the model"
            )
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise RequestError(
            f"configuration {path} cannot be read ({error.strerror}); check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not text in UTF-8 (byte {error.start}); save it as UTF-8"
        ) from error
    return parse_object(text, path.name)


def parse_object(text: str, source: str) -> tuple[dict[str, object], list[str]]:
    """`read_object` of text; `source` is what messages call it."""
    twice: list[str] = []

    def collect(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                twice.append(key)
            found[key] = value
        return found

    def refuse(constant: str) -> object:
        raise RequestError(f"{source} holds {constant}, which is no JSON number; write a number")

    try:
        loaded = json.loads(_plain(text, source), object_pairs_hook=collect, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise _error(source, text, error.pos, error.msg) from error
    except RecursionError as error:
        raise RequestError(f"{source} is nested too deeply to be a configuration") from error
    if not isinstance(loaded, dict):
        raise RequestError(
            f"{source} holds {type(loaded).__name__}, and a configuration is an object in braces: "
            '{"infer_steps": 4, …}'
        )
    return loaded, twice


def _plain(text: str, source: str) -> str:
    """The same text with comments and last commas as spaces; strings stay as they are."""

    def blank(match: re.Match[str]) -> str:
        if match["open"]:
            raise _error(source, text, match.start(), "this comment has no end; close it with */")
        return re.sub(r"[^\n]", " ", match[0]) if match["comment"] else match[0]

    uncommented = _TOKEN.sub(blank, text)
    return _LAST_COMMA.sub(lambda match: " " if match["comma"] else match[0], uncommented)


def _error(source: str, text: str, position: int, what: str) -> RequestError:
    line = text.count("\n", 0, position) + 1
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    shown = text.splitlines()[line - 1].strip()[:60] if text.strip() else "nothing"
    return RequestError(f"{source}, line {line}, column {column}: {what} (at: {shown})")
