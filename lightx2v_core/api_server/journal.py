"""What became of every task, on disk, so that a restart forgets nothing: one SQLite file."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CapabilityError

PENDING, PROCESSING = "pending", "processing"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
ENDED = (COMPLETED, FAILED, CANCELLED)
INTERRUPTED = "Interrupted"

SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, status TEXT NOT NULL,
    name TEXT NOT NULL, file TEXT NOT NULL, wish TEXT NOT NULL, warnings TEXT NOT NULL,
    created REAL NOT NULL, started REAL, ended REAL, attempts INTEGER NOT NULL,
    error TEXT, error_type TEXT, facts TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS by_status ON tasks (status);
CREATE INDEX IF NOT EXISTS by_name ON tasks (name);
"""
COLUMNS = (
    *("id", "status", "name", "file", "wish", "warnings", "created", "started", "ended"),
    *("attempts", "error", "error_type", "facts"),
)
AS_JSON = ("wish", "warnings", "facts")


@dataclass(slots=True)
class Record:
    """One task as it is written down. `file` is the stem of its files, made up here; `wish` the
    request without its pictures; times are seconds since 1970."""

    id: str
    name: str
    file: str
    wish: dict[str, object]
    warnings: list[str]
    status: str = PENDING
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    attempts: int = 0
    error: str | None = None
    error_type: str | None = None
    facts: dict[str, object] = field(default_factory=dict)


class Journal:
    """Tasks by id. One process at a time: a second one on the same file is refused."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path, timeout=0.2, isolation_level=None)
        try:
            self._database.executescript(
                "PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;"
                + SCHEMA
            )
        except sqlite3.Error as error:
            self._database.close()
            raise CapabilityError(
                f"{path} cannot be used ({error}); another service may be running on this folder: "
                "give each its own --result-dir"
            ) from error

    def close(self) -> None:
        self._database.close()

    def write(self, record: Record) -> None:
        """The whole record, new or in place of what was known of it."""
        values = [getattr(record, name) for name in COLUMNS]
        row = [json.dumps(v) if n in AS_JSON else v for n, v in zip(COLUMNS, values, strict=True)]
        updates = ", ".join(f"{name} = excluded.{name}" for name in COLUMNS[1:])
        self._database.execute(
            f"INSERT INTO tasks ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) "
            f"ON CONFLICT (id) DO UPDATE SET {updates}",
            row,
        )

    def read(self, task_id: str) -> Record | None:
        return next(self._find("WHERE id = ?", task_id), None)

    def by_name(self, name: str) -> Record | None:
        """The newest finished task whose result has this name."""
        where = "WHERE name = ? AND status = ? ORDER BY number DESC LIMIT 1"
        return next(self._find(where, name, COMPLETED), None)

    def all(self) -> list[Record]:
        return list(self._find("ORDER BY number"))

    def interrupt(self) -> int:
        """Mark what was waiting or running when the service stopped; how many."""
        changed = self._database.execute(
            "UPDATE tasks SET status = ?, ended = ?, error = ?, error_type = ? "
            "WHERE status IN (?, ?)",
            (FAILED, time.time(), INTERRUPTED_TEXT, INTERRUPTED, PENDING, PROCESSING),
        )
        return changed.rowcount

    def forget_beyond(self, keep: int) -> list[str]:
        """Drop the oldest tasks that ended, so that `keep` remain; the stems of their files."""
        excess = self._database.execute(
            "SELECT id, file FROM tasks WHERE status IN (?, ?, ?) ORDER BY number DESC "
            "LIMIT -1 OFFSET ?",
            (*ENDED, keep),
        ).fetchall()
        self._database.executemany("DELETE FROM tasks WHERE id = ?", [(i,) for i, _ in excess])
        return [file for _, file in excess]

    def files(self) -> set[str]:
        return {file for (file,) in self._database.execute("SELECT file FROM tasks")}

    def _find(self, where: str, *values: object) -> Iterator[Record]:
        rows = self._database.execute(f"SELECT {', '.join(COLUMNS)} FROM tasks {where}", values)
        for row in rows.fetchall():
            named = dict(zip(COLUMNS, row, strict=True))
            yield Record(**{n: json.loads(v) if n in AS_JSON else v for n, v in named.items()})


INTERRUPTED_TEXT = "the service stopped before this was finished; send it again"
