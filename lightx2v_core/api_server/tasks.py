"""The queue: what waits, what runs, what came of it. One event loop, so no locks.

A task is in memory while it waits or runs; ended tasks are in the journal alone. States are
LightX2V's: pending, processing, completed, failed, cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from .body import VideoRequest
from .journal import (
    CANCELLED,
    COMPLETED,
    FAILED,
    INTERRUPTED,
    INTERRUPTED_TEXT,
    PENDING,
    PROCESSING,
    Journal,
    Record,
)

log = logging.getLogger(__name__)

KEEP = 1000  # tasks that ended, and their results
OWN_FILE = re.compile(r"([0-9a-f]{32})(\.part)?\.(mp4|png|jpg|webp|latent)")


@dataclass(slots=True, eq=False)
class Task:
    """A task that waits or runs. `cancelled` tells its worker; `pictures` are files of ours."""

    record: Record
    pictures: dict[str, Path] = field(default_factory=dict)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    progress: dict[str, object] = field(default_factory=dict)


class Folders:
    """The result folder. Every file in it is named by 32 hexadecimal digits made up here."""

    def __init__(self, root: Path) -> None:
        self.inputs, self.outputs = root / "inputs", root / "outputs"
        for folder in (self.inputs, self.outputs):
            folder.mkdir(parents=True, exist_ok=True)

    def result(self, record: Record) -> Path:
        return self.outputs / f"{record.file}.mp4"

    def keep_picture(self, data: bytes, suffix: str) -> Path:
        path = self.inputs / f"{secrets.token_hex(16)}{suffix}"
        path.write_bytes(data)
        return path

    def remove(self, file: str) -> None:
        """The result and what a killed worker left of it."""
        for suffix in (".mp4", ".part.mp4", ".latent"):
            (self.outputs / f"{file}{suffix}").unlink(missing_ok=True)

    def sweep(self, known: set[str]) -> None:
        """Remove what a service that was killed left behind; files of others stay."""
        for folder, kept in ((self.inputs, set()), (self.outputs, known)):
            for path in folder.iterdir():
                found = OWN_FILE.fullmatch(path.name)
                if found and (found[2] or found[1] not in kept):
                    path.unlink(missing_ok=True)


class Tasks:
    """Every task of the service. `on_change` is called after each change of the queue."""

    def __init__(
        self,
        journal: Journal,
        folders: Folders,
        capacity: int,
        on_change: Callable[[], None] = lambda: None,
        keep: int = KEEP,
    ) -> None:
        self.journal, self.folders, self.capacity = journal, folders, capacity
        self.on_change, self.keep = on_change, keep
        self.active: dict[str, Task] = {}  # pending and processing
        self.counts: Counter[str] = Counter()  # since the start: created and every end
        self.is_stopping = False
        self._waiting: deque[Task] = deque()
        self._wake = asyncio.Event()
        if interrupted := journal.interrupt():
            log.warning("%d tasks of the last run were interrupted", interrupted)
        folders.sweep(journal.files())

    @property
    def is_full(self) -> bool:
        return len(self.active) >= self.capacity

    @property
    def pending(self) -> int:
        return len(self._waiting)

    @property
    def processing(self) -> list[Task]:
        return [task for task in self.active.values() if task.record.status == PROCESSING]

    def create(self, request: VideoRequest, pictures: Mapping[str, Path]) -> Task:
        """Queue a request whose id is new; see `is_full` and `find` before."""
        record = Record(
            request.task_id,
            request.name,
            secrets.token_hex(16),
            request.wish,
            list(request.warnings),
        )
        task = Task(record, dict(pictures))
        self.journal.write(record)
        self.active[record.id] = task
        self._waiting.append(task)
        self.counts["created"] += 1
        self._changed()
        return task

    async def next(self, is_usable: Callable[[], bool]) -> Task | None:
        """The oldest waiting task, now processing; None when the worker died or the service stops.

        Call `wake` when `is_usable` turns false.
        """
        while is_usable() and not self.is_stopping:
            if self._waiting:
                task = self._waiting.popleft()
                task.record.status, task.record.started = PROCESSING, time.time()
                task.record.attempts += 1
                self.journal.write(task.record)
                self._changed()
                return task
            self._wake.clear()
            await self._wake.wait()
        return None

    def wake(self) -> None:
        self._wake.set()

    def again(self, task: Task) -> None:
        """Put a task whose worker died back to where it came from, the front."""
        if self.is_stopping:
            self.fail(task, INTERRUPTED_TEXT, INTERRUPTED)
            return
        task.record.status, task.progress = PENDING, {}
        self.journal.write(task.record)
        self._waiting.appendleft(task)
        self._changed()

    def complete(self, task: Task, facts: dict[str, object]) -> None:
        task.record.facts = facts
        self._end(task, COMPLETED)

    def fail(self, task: Task, error: str, error_type: str) -> None:
        task.record.error, task.record.error_type = error, error_type
        self._end(task, FAILED)

    def cancel(self, task_id: str) -> bool:
        """Cancel what waits or runs; False for what is unknown or has ended. A running one counts
        as cancelled at once; its worker is told, and killed when it does not listen."""
        task = self.active.get(task_id)
        if task is None:
            return False
        was_running = task.record.status == PROCESSING
        if not was_running:
            self._waiting.remove(task)
        task.cancelled.set()
        task.record.error = "cancelled on request"
        self._end(task, CANCELLED, keep_pictures=was_running)
        return True

    def drop_files(self, task: Task) -> None:
        """After the worker has let go of a task that was cancelled or died."""
        self.folders.remove(task.record.file)
        _remove(task)

    def stop(self) -> None:
        """No more work is handed out; what waits is marked."""
        self.is_stopping = True
        while self._waiting:
            self.fail(self._waiting.popleft(), INTERRUPTED_TEXT, INTERRUPTED)
        self.wake()

    def find(self, task_id: str) -> Record | None:
        task = self.active.get(task_id)
        return task.record if task else self.journal.read(task_id)

    def status(self, record: Record) -> dict[str, object]:
        """What clients see of a task: LightX2V's keys, then ours."""
        task = self.active.get(record.id)
        return {
            "task_id": record.id,
            "status": record.status,
            "start_time": _iso(record.started or record.created),
            "end_time": _iso(record.ended),
            "error": record.error,
            "error_type": record.error_type or "",
            "save_result_path": record.name,
            "seed": record.wish.get("seed"),
            "progress": task.progress if task else {},
            "attempts": record.attempts,
            "warnings": record.warnings,
            "facts": record.facts,
        }

    def _end(self, task: Task, status: str, keep_pictures: bool = False) -> None:
        record = task.record
        record.status, record.ended = status, time.time()
        self.journal.write(record)
        self.active.pop(record.id, None)
        self.counts[status] += 1
        if not keep_pictures:
            _remove(task)
        for file in self.journal.forget_beyond(self.keep):
            self.folders.remove(file)
        self._changed()

    def _changed(self) -> None:
        self.on_change()
        self.wake()


def _remove(task: Task) -> None:
    for path in task.pictures.values():
        path.unlink(missing_ok=True)


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
