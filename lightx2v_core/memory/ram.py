"""How much RAM this process may still take: from the system, its control group, and `limit_to`.

Linux first: /proc and cgroup v1 or v2; psutil where there is no /proc; unknown otherwise.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

GB = 10**9
LEAST_MARGIN = 2 * GB
MARGIN_SHARE = 0.1  # of all RAM, left to the system and to other programs
# Of all RAM. Windows refuses page-locked memory beyond about half of it.
PINNABLE_SHARE = {"win32": 0.45}
ROOT = Path("/")
UNLIMITED = 2**60  # cgroup v1 writes a number near 2**63 for no limit

_limit: int | None = None


def limit_to(nbytes: int | None) -> None:
    """At most so much RAM for this process from now on, page-locked memory included; None: what
    is there. What is mapped from files does not count, the system takes it back at will."""
    global _limit
    _limit = nbytes


def available_bytes(root: Path = ROOT) -> int | None:
    """What can be allocated before something must be swapped or killed; None when unknown."""
    known = [free for free in (_system(root)[0], _group_free(root)) if free is not None]
    return max(min(known), 0) if known else None


def total_bytes(root: Path = ROOT) -> int | None:
    """All RAM of the machine, or of the control group where that is less."""
    limits = [limit for limit, _ in _groups(root)]
    system = _system(root)[1]
    known = limits if system is None else [system, *limits]
    return min(known) if known else None


def margin_bytes(root: Path = ROOT) -> int:
    """What is left to others."""
    return int(max(LEAST_MARGIN, MARGIN_SHARE * (total_bytes(root) or 0)))


def pinnable_bytes(root: Path = ROOT, platform: str = sys.platform) -> int:
    """How much may be page-locked now: what is free minus a margin, at most a share of all.

    0 where free memory is unknown, since locked memory cannot be swapped out again.
    """
    free, total = available_bytes(root), total_bytes(root)
    if free is None or total is None:
        return 0
    share = PINNABLE_SHARE.get(platform, 1.0)
    return max(min(free - margin_bytes(root), int(share * total)), 0)


def trim() -> None:
    """Give freed memory back to the system where the C library keeps it (glibc)."""
    if sys.platform == "linux":
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if give_back is not None:
            give_back(0)


def _system(root: Path) -> tuple[int | None, int | None]:
    """(available, total) of the machine."""
    info = root / "proc/meminfo"
    if info.is_file():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        sizes = {k: int(v.split()[0]) * 1024 for k, v in fields.items() if v.split()}
        if "MemAvailable" in sizes:
            return sizes["MemAvailable"], sizes.get("MemTotal")
    try:
        import psutil
    except ImportError:
        return None, None
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _group_free(root: Path) -> int | None:
    return min((limit - used for limit, used in _groups(root)), default=None)


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be dropped) of this process and of each control group,
    where they have a limit."""
    if _limit is not None:
        yield _limit, _anonymous(root)
    membership = root / "proc/self/cgroup"
    if not membership.is_file():
        return
    base = root / "sys/fs/cgroup"
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names, folder = ("memory.max", "memory.current", ""), base
        elif "memory" in controllers.split(","):
            folder = base / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        inner = folder / path.lstrip("/")
        # A container often sees its own group as the root: both places are looked at.
        for place in dict.fromkeys([inner, *inner.parents]):
            if place == folder or folder in place.parents:
                yield from _group(place, *names)


def _anonymous(root: Path) -> int:
    """Bytes of this process that are of no file; all that it has in RAM where that is not told."""
    status = root / "proc/self/status"
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "RssAnon" in fields:
            return int(fields["RssAnon"].split()[0]) * 1024
    try:
        import psutil
    except ImportError:
        return 0
    return psutil.Process().memory_info().rss


def _group(folder: Path, limit_name: str, used_name: str, prefix: str) -> Iterator[tuple[int, int]]:
    limit, used = _number(folder / limit_name), _number(folder / used_name)
    if limit is None or used is None or limit >= UNLIMITED:
        return
    statistics = folder / "memory.stat"
    cache = 0
    if statistics.is_file():
        wanted = {f"{prefix}inactive_file", f"{prefix}active_file"}
        pairs = (line.split() for line in statistics.read_text().splitlines())
        cache = sum(int(value) for name, value in pairs if name in wanted)
    yield limit, used - min(cache, used)


def _number(path: Path) -> int | None:
    """None where there is no such file, or no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
