"""Whether new lines are slower than old ones of the same case on the same card.

    python -m benchmarks.regress OLD.jsonl NEW.jsonl --limit 1.05

Compares the last line of NEW for each card, case and setting with the last such line of OLD: by
`ratio` to the peer of its run where both have the same, since a shared card is not always equally
fast, else by `seconds`. Also compares `peak_gib`. Ends with 1 if anything grew by more than the
limit, and names what could not be compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from .lines import Line, read_lines

# What makes two lines the same measurement.
KEY = (
    *("card", "case", "who", "setting", "row", "form", "series", "format", "folder_kind"),
    *("scheme", "attention", "matmul", "dtype", "memory", "flags", "experts", "latents_per_chunk"),
    *("budget_gb", "vram_gb", "ram_gb", "capped"),
    *("size", "blocks", "dim", "tokens", "heads", "width", "in_features", "out_features"),
    *("frames", "steps", "batch", "warm_from", "settled", "peer_setting"),
)
MEASURES = ("ratio", "seconds", "seconds_per_step")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--limit", type=float, default=1.05, help="new / old that is still well")
    options = parser.parse_args(arguments)
    old, new = latest(read_lines(options.old)), latest(read_lines(options.new))
    worse = 0
    for key, line in new.items():
        text, grew = compare(old.get(key), line, options.limit)
        worse += grew
        print(f"{describe(line)}: {text}")
    print(f"{len(new)} cases, {worse} worse than {options.limit:g} times what they were")
    return 1 if worse else 0


def latest(lines: Iterable[Line]) -> dict[str, Line]:
    """The last measured line of each key; lines that say why something did not run are no
    measurement."""
    return {
        str([line.get(name) for name in KEY]): line
        for line in lines
        if any(name in line for name in MEASURES)
    }


def compare(old: Line | None, new: Line, limit: float) -> tuple[str, bool]:
    """(words, whether it is worse)."""
    if old is None:
        return "new, nothing to compare with", False
    is_same_peer = old.get("peer") == new.get("peer")
    measures = MEASURES if is_same_peer else MEASURES[1:]
    measure = next((name for name in measures if name in old and name in new), None)
    if measure is None:
        return "the two lines measure different things", False
    changes = [(measure, _growth(old, new, measure))]
    if old.get("peak_gib") and new.get("peak_gib"):
        changes.append(("peak_gib", _growth(old, new, "peak_gib")))
    words = ", ".join(f"{name} {growth:.3f} times" for name, growth in changes)
    grew = any(growth > limit for _, growth in changes)
    return words + (" WORSE" if grew else ""), grew


def _growth(old: Line, new: Line, name: str) -> float:
    return float(str(new[name])) / float(str(old[name]))


def describe(line: Line) -> str:
    names = ("case", "who", "setting", "peer_setting")
    words = [str(line[name]) for name in names if line.get(name)]
    return " ".join(words) + f" on {line.get('card', 'an unknown card')}"


if __name__ == "__main__":
    raise SystemExit(main())
