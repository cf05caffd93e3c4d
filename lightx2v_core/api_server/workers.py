"""Worker processes: started, followed, restarted when they die, their request tried once more.

One worker holds one model on one card and makes one video at a time, so n workers make n videos at
once. One video over several cards is not done here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from ..errors import RequestError
from ..wire import MAX_LINE, decode, encode
from .journal import CANCELLED, INTERRUPTED, INTERRUPTED_TEXT, PROCESSING
from .metrics import Metrics
from .processes import finish, read_to_end
from .tasks import Task, Tasks

log = logging.getLogger(__name__)

ATTEMPTS = 2
STARTS = 3  # in a row that may fail before the service gives up
PAUSES = (0.0, 0.2, 1.0, 5.0, 30.0)  # seconds to the next start, by failures to load in a row
LAST_SECONDS = 1.0  # from the end of its messages to the end of a process
ENDED_BY_ARGUMENTS = 2  # exit code of argparse


class Plan(NamedTuple):
    """How workers are started: one for each environment."""

    command: Sequence[str]
    environments: Sequence[Mapping[str, str]] = ({},)
    cancel_seconds: float = 10.0  # from a cancel to the kill


def environments(count: int) -> list[dict[str, str]]:
    """One card for each worker, out of those CUDA_VISIBLE_DEVICES leaves; nothing for one alone."""
    if count == 1:
        return [{}]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    cards = [card for card in visible.split(",") if card] or [str(i) for i in range(count)]
    if len(cards) < count:
        raise RequestError(
            f"{count} workers need a card each, and CUDA_VISIBLE_DEVICES names {len(cards)}"
        )
    return [{"CUDA_VISIBLE_DEVICES": card} for card in cards[:count]]


class Worker:
    """One running process. Its end of file is its death: `receive` then answers None for ever."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.is_alive = True
        self._messages: asyncio.Queue[dict[str, object] | None] = asyncio.Queue()

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str]) -> Worker:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **environment},
            limit=MAX_LINE,
            # Ctrl-C in a terminal reaches the service alone, which then ends its workers in order.
            start_new_session=True,
        )
        return cls(process)

    async def listen(self, tasks: Tasks) -> None:
        """Collect messages until the process ends or says something that is none."""
        assert self.process.stdout is not None
        try:
            while line := await self.process.stdout.readline():
                self._messages.put_nowait(decode(line))
        except (RequestError, ValueError) as error:  # ValueError: a line over the limit
            log.error("worker %d: %s", self.process.pid, error)
            self.kill()
            await read_to_end(self.process.stdout, LAST_SECONDS)
        self.is_alive = False
        try:
            await asyncio.wait_for(self.process.wait(), LAST_SECONDS)
        except TimeoutError:  # it closed its stdout and lives on
            self.kill()
            await self.process.wait()
        self._messages.put_nowait(None)
        tasks.wake()

    async def receive(self) -> dict[str, object] | None:
        message = await self._messages.get()
        if message is None:
            self._messages.put_nowait(None)
        return message

    async def send(self, message: Mapping[str, object]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(encode(message))
            await self.process.stdin.drain()
        except OSError:
            self.kill()  # it is dying: `receive` says so

    def kill(self) -> None:
        self.is_alive = False
        if self.process.returncode is None:
            self.process.kill()

    async def end(self) -> None:
        """Kill it; the process and the pipe to it are gone when this returns, and the pipe from it
        when `listen` has returned. In Python 3.11 `wait` may answer while pipes are open, and a
        child that a worker leaves behind holds them open longer."""
        assert self.process.stdin is not None
        self.kill()
        if not self.process.stdin.is_closing():
            self.process.stdin.transport.abort()
        await self.process.wait()
        with suppress(OSError):
            await self.process.stdin.wait_closed()


class Pool:
    """Keeps one worker alive for each environment and hands tasks to them."""

    def __init__(self, tasks: Tasks, plan: Plan, metrics: Metrics) -> None:
        self.tasks, self.plan, self.metrics = tasks, plan, metrics
        self.ready: set[Worker] = set()
        self.refusal: str | None = None  # why no worker can ever run
        self._refused = asyncio.Event()
        self._was_ready = False

    async def run(self) -> None:
        """Until cancelled, or until `refusal` says why it ended."""
        slots = [asyncio.create_task(self._keep(e)) for e in self.plan.environments]
        # One that ends because the service stops must not end those which finish their task.
        ended = asyncio.create_task(asyncio.wait(slots, return_when=asyncio.FIRST_EXCEPTION))
        refused = asyncio.create_task(self._refused.wait())
        try:
            await asyncio.wait((ended, refused), return_when=asyncio.FIRST_COMPLETED)
            for slot in slots:
                if slot.done():
                    slot.result()
        finally:
            for task in (ended, refused, *slots):
                task.cancel()
            await asyncio.gather(ended, refused, *slots, return_exceptions=True)

    async def _keep(self, environment: Mapping[str, str]) -> None:
        failures = 0
        while not self.tasks.is_stopping and self.refusal is None:
            worker = await Worker.start(self.plan.command, environment)
            listener = asyncio.create_task(worker.listen(self.tasks))
            try:
                if await self._is_ready(worker):
                    failures = 0
                    await self._hand_out(worker)
                else:
                    failures += 1
            finally:
                self.ready.discard(worker)
                await finish(asyncio.gather(listener, worker.end()))
            if failures == STARTS and not self._was_ready:
                self._refuse(f"the worker died {STARTS} times while it loaded; see its messages")
            if self.refusal is None and not self.tasks.is_stopping:
                self.metrics.restarted()
                await asyncio.sleep(PAUSES[min(failures, len(PAUSES) - 1)])

    async def _is_ready(self, worker: Worker) -> bool:
        message = await worker.receive()
        if message is not None and message["kind"] == "ready":
            lines = message.get("lines")
            for line in lines if isinstance(lines, list) else ():
                log.info("worker %d: %s", worker.process.pid, line)
            self.ready.add(worker)
            self._was_ready = True
            return True
        if message is not None and message["kind"] != "unusable":
            worker.kill()
        elif message is not None and not self._was_ready:
            self._refuse(str(message.get("error")))
        code = await worker.process.wait()
        if code == ENDED_BY_ARGUMENTS and not self._was_ready:
            self._refuse("the worker does not take these arguments; see its message")
        log.error("worker %d ended with code %d before it was ready", worker.process.pid, code)
        return False

    def _refuse(self, why: str) -> None:
        self.refusal = self.refusal or why
        self._refused.set()

    async def _hand_out(self, worker: Worker) -> None:
        while task := await self.tasks.next(lambda: worker.is_alive):
            canceller = asyncio.create_task(self._cancel(worker, task))
            answer = None
            try:
                answer = await self._follow(worker, task)
            except asyncio.CancelledError:
                if task.record.status == PROCESSING:
                    self.tasks.fail(task, INTERRUPTED_TEXT, INTERRUPTED)
                raise
            finally:
                canceller.cancel()
                worker.is_alive = worker.is_alive and answer is not None
                try:
                    if not worker.is_alive:
                        await finish(worker.end())  # before its files are touched
                finally:
                    self._settle(task, answer)

    async def _follow(self, worker: Worker, task: Task) -> dict[str, object] | None:
        """The last message on a task; None when the worker died of it."""
        record = task.record
        request = {**record.wish, **{name: str(path) for name, path in task.pictures.items()}}
        output = str(self.tasks.folders.result(record))
        await worker.send({"kind": "run", "id": record.id, "request": request, "output": output})
        last = time.perf_counter()
        while (message := await worker.receive()) is not None:
            if message.get("id") != record.id:
                log.error("worker %d answers to another task", worker.process.pid)
                return None
            if message["kind"] != "progress":
                return message
            now = time.perf_counter()
            stage, done, total = (message.get(key) for key in ("stage", "done", "total"))
            task.progress = {"stage": stage, "done": done, "total": total}
            self.metrics.stepped(str(stage), done, total, now - last)
            last = now
        return None

    async def _cancel(self, worker: Worker, task: Task) -> None:
        await task.cancelled.wait()
        await worker.send({"kind": "cancel", "id": task.record.id})
        await asyncio.sleep(self.plan.cancel_seconds)
        log.warning("worker %d does not stop and is killed", worker.process.pid)
        worker.kill()

    def _settle(self, task: Task, answer: Mapping[str, object] | None) -> None:
        record, kind = task.record, answer["kind"] if answer else "died"
        seconds = time.time() - (record.started or record.created)
        if record.status != PROCESSING:  # cancelled or interrupted in the meantime
            self.tasks.drop_files(task)
            self.metrics.ended("cancelled" if record.status == CANCELLED else INTERRUPTED, seconds)
        elif kind == "done" and answer and self.tasks.folders.result(record).is_file():
            facts = answer.get("facts")
            self.tasks.complete(task, facts if isinstance(facts, dict) else {})
            self.metrics.ended("completed", seconds, record.facts)
        elif kind == "failed" and answer:
            self.tasks.fail(task, str(answer.get("error")), str(answer.get("error_type")))
            self.tasks.drop_files(task)
            self.metrics.ended(str(record.error_type), seconds)
        elif record.attempts < ATTEMPTS:
            log.warning("the worker died on %s, which is tried again", record.id)
            self.tasks.folders.remove(record.file)
            self.tasks.again(task)
        else:
            self.tasks.fail(task, DIED, "WorkerDied")
            self.tasks.drop_files(task)
            self.metrics.ended("WorkerDied", seconds)


DIED = "the worker ended twice while making this; the service's log has its last words"
