"""A LightX2V configuration: its keys checked for what they may hold. Opens no model file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from ..errors import RequestError
from .keys import IGNORED, KEYS, LORA_KEYS
from .tolerant import read_object


@dataclass(frozen=True, slots=True)
class Configuration:
    """The values by key, each of the form its key asks for; null values are left out. `notes` say
    what is not obeyed, one sentence each. `source` is what messages call it."""

    source: str
    values: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.values.get(key, default))

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        return None if value is None else str(value)

    def count(self, key: str) -> int | None:
        value = self.values.get(key)
        return int(value) if isinstance(value, (int, float)) else None

    def number(self, key: str) -> float | None:
        value = self.values.get(key)
        return float(value) if isinstance(value, (int, float)) else None

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.values.get(key)
        return tuple(value) if isinstance(value, (list, tuple)) else ()

    def object(self, key: str) -> Mapping[str, object]:
        value = self.values.get(key)
        return value if isinstance(value, Mapping) else {}


def read_configuration(path: str | Path) -> Configuration:
    """Raises RequestError where the file is not readable or a key holds what it cannot."""
    values, twice = read_object(Path(path))
    return make_configuration(values, Path(path).name, twice)


def make_configuration(
    values: Mapping[str, object], source: str = "configuration", twice: Sequence[str] = ()
) -> Configuration:
    """From an object that is read already; `twice` are keys that stood in the file twice."""
    given = {key: value for key, value in values.items() if value is not None}
    for key, value in given.items():
        if key in KEYS:
            check_form(source, key, value, KEYS[key].form)
    notes = [f"{source}: {key} stands twice; the last one counts" for key in dict.fromkeys(twice)]
    notes += [_unknown(source, key) for key in given if key not in KEYS]
    return Configuration(source, given, (*notes, *_ignored(source, given)))


def _unknown(source: str, key: str) -> str:
    near = get_close_matches(key, KEYS, 1, 0.75)
    hint = f"; {near[0]} is meant?" if near else ""
    return f"warning: {source}: {key} is no key that LightX2V has for Wan, and is ignored{hint}"


def _ignored(source: str, given: Mapping[str, object]) -> list[str]:
    """One line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for key in given:
        if key in KEYS and KEYS[key].fate == IGNORED:
            by_reason.setdefault(KEYS[key].what, []).append(key)
    return [f"{source}: {', '.join(keys)} ignored: {why}" for why, keys in by_reason.items()]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return _is_number(value) and float(value).is_integer() and value >= 0  # type: ignore


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _all(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_path(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


# Form -> (what is said of it, whether a value has it).
FORMS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "any": ("anything", lambda value: True),
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "count": ("a whole number", _is_count),
    "number": ("a number", _is_number),
    "numbers": ("a list of numbers", _all(_is_number)),
    "scale": (
        "a number, or a list of two",
        lambda value: (
            _is_number(value) or (_all(_is_number)(value) and len(value) == 2)  # type: ignore[arg-type]
        ),
    ),
    "text": ("text", _is_text),
    "path": ("a path", _is_path),
    "paths": ("a path or a list of paths", lambda value: _is_path(value) or _all(_is_path)(value)),
    "object": ("an object in braces", lambda value: isinstance(value, dict)),
    "parallel": ("false or an object", lambda value: isinstance(value, (bool, dict))),
    "loras": ("a list of objects", _all(lambda entry: isinstance(entry, dict))),
}


def check_form(source: str, key: str, value: object, form: str) -> None:
    """Raise RequestError unless `value` has `form`; of LoRA entries also their own keys."""
    words, has_form = FORMS[form]
    if not has_form(value):
        raise RequestError(f"{source}: {key} is {_shown(value)}; it takes {words}")
    entries: list[dict[str, object]] = value if form == "loras" else []  # type: ignore[assignment]
    for index, entry in enumerate(entries):
        where = f"{key}[{index}]"
        if "path" not in entry:
            raise RequestError(f"{source}: {where} has no path; give the LoRA file")
        for name, held in entry.items():
            if name in LORA_KEYS and held is not None:
                check_form(source, f"{where}.{name}", held, LORA_KEYS[name].form)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
