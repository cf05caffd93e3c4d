"""The service from its start to a graceful stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web

from ..errors import CapabilityError, RequestError
from .application import make_application
from .journal import INTERRUPTED, INTERRUPTED_TEXT, Journal
from .metrics import Metrics
from .options import Options
from .service import Service
from .tasks import Folders, Tasks
from .workers import Plan, Pool, environments

log = logging.getLogger(__name__)

DECODERS = 2
LARGE_BODIES = 4
LAST_SECONDS = 2.0  # for replies in flight at the end


class Server:
    """One service: `start`, then `wait` or `stop`. `command` replaces the worker in tests."""

    def __init__(self, options: Options, command: Sequence[str] | None = None) -> None:
        self.options, self.address = options, ""
        self._is_hurried = False
        root = options.result_dir
        self.journal = Journal(root / "journal.sqlite")
        metrics = Metrics(options.model_cls)
        folders = Folders(root)
        self.tasks = Tasks(self.journal, folders, options.queue_size, self._on_change, options.keep)
        worker = command or (sys.executable, "-m", "lightx2v_core.worker", *options.model)
        plan = Plan(worker, _environments(options.processes), options.cancel_seconds)
        self.pool = Pool(self.tasks, plan, metrics)
        gates = (asyncio.Semaphore(DECODERS), asyncio.Semaphore(LARGE_BODIES))
        self.service = Service(options, self.tasks, self.pool, metrics, *gates)
        self._on_change()

    def _on_change(self) -> None:
        if hasattr(self, "service"):
            tasks = self.tasks
            self.service.metrics.queued(tasks.pending, len(tasks.active), tasks.capacity)

    async def start(self) -> None:
        """Listen and start the workers. CapabilityError when the port cannot be had."""
        options = self.options
        self._runner = web.AppRunner(
            make_application(self.service),
            access_log=None,
            handle_signals=False,
            keepalive_timeout=options.header_seconds,
            shutdown_timeout=LAST_SECONDS,
        )
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, options.host, options.port).start()
        except OSError as error:
            await self._runner.cleanup()
            self.journal.close()
            raise CapabilityError(
                f"{options.host}:{options.port} cannot be listened on ({error.strerror}); choose "
                "another --port or --host"
            ) from error
        host, port = self._runner.addresses[0][:2]
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        log.info("listening on %s, results in %s", self.address, options.result_dir.resolve())
        if not options.is_local and not options.token:
            log.warning("everybody who reaches %s may use it: no token is set", options.host)
        self._working = asyncio.create_task(self.pool.run())

    async def wait(self, stop: asyncio.Event) -> None:
        """Until `stop` is set. CapabilityError when no worker can ever run."""
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((stopped, self._working), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        if self._working.done():
            self._working.result()
            raise CapabilityError(self.pool.refusal or "the workers ended")

    def hurry(self) -> None:
        """Make a `stop` that waits for running tasks wait no longer."""
        self._is_hurried = True

    async def stop(self, seconds: float) -> None:
        """Take nothing more, let running tasks finish within `seconds`, mark the rest, close."""
        tasks = self.tasks
        tasks.stop()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while tasks.active and not self._is_hurried and loop.time() < deadline:
            await asyncio.sleep(0.05)
        self._working.cancel()
        await asyncio.gather(self._working, return_exceptions=True)
        for task in list(tasks.active.values()):
            tasks.fail(task, INTERRUPTED_TEXT, INTERRUPTED)
        await self._runner.cleanup()
        self.journal.close()


def _environments(count: int) -> list[dict[str, str]]:
    """Each worker finds this package wherever the service was started."""
    home = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    return [{"PYTHONPATH": path, **environment} for environment in environments(count)]


async def serve(options: Options) -> None:
    """Run until SIGTERM or Ctrl-C; a second one cuts running tasks short."""
    server = Server(options)
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            server.hurry()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, on_signal)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(on_signal))
    await server.start()
    try:
        await server.wait(stop)
        log.info("stopping: %d tasks run", len(server.tasks.processing))
    except (CapabilityError, RequestError):
        await server.stop(0)
        raise
    await server.stop(options.stop_seconds)
