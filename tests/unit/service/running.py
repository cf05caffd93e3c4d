"""A service in a thread of this process, with fake workers, and a client for it."""

from __future__ import annotations

import asyncio
import base64
import gc
import http.client
import io
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from PIL import Image

from lightx2v_core.api_server.options import Options
from lightx2v_core.api_server.run import Server
from lightx2v_core.errors import LightX2VError

FAKE = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))


class Running:
    """`with Running(folder, task="i2v") as service: service.post({...})`."""

    def __init__(self, folder, command=FAKE, **options):
        fast = {"cancel_seconds": 0.4, "stop_seconds": 5.0}
        self.options = Options(
            (), "wan2.1_distill", "demo", port=0, result_dir=folder, **(fast | options)
        )
        self.command, self.problem = command, None
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self):
        try:
            self.server = Server(self.options, self.command)
            await self.server.start()
            self.port = int(self.server.address.rpartition(":")[2])
            self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
            self._started.set()
            await self.server.wait(self.stop)
            await self.server.stop(self.options.stop_seconds)
        except LightX2VError as error:
            self.problem = error
            if self._started.is_set():
                await self.server.stop(0)
        finally:
            self._started.set()

    def __enter__(self):
        self._thread.start()
        assert self._started.wait(20)
        if self.problem:
            raise self.problem
        return self

    def __exit__(self, *_):
        self.end()

    def end(self):
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.stop.set)
            self._thread.join(20)
        assert not self._thread.is_alive()

    def wait_ended(self):
        self._thread.join(20)
        assert not self._thread.is_alive()

    def call(self, method, path, body=None, headers=(), timeout=20):
        """(status, headers, bytes)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, dict(headers))
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read()
        finally:
            connection.close()

    def get(self, path, **headers):
        status, _, data = self.call("GET", path, headers=headers)
        return status, json.loads(data)

    def delete(self, path):
        status, _, data = self.call("DELETE", path)
        return status, json.loads(data)

    def post(self, body, path="/v1/tasks/video/", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        status, _, reply = self.call("POST", path, data, headers)
        return status, json.loads(reply)

    def form(self, fields, files=(), path="/v1/tasks/video/form"):
        boundary, parts = "xx7xx", []
        for name, text in fields.items():
            parts.append(f'name="{name}"\r\n\r\n'.encode() + text.encode())
        for name, filename, data in files:
            head = f'name="{name}"; filename="{filename}"\r\nContent-Type: image/png\r\n\r\n'
            parts.append(head.encode() + data)
        head = f"--{boundary}\r\nContent-Disposition: form-data; ".encode()
        body = b"".join(head + part + b"\r\n" for part in parts) + f"--{boundary}--\r\n".encode()
        content_type = f"multipart/form-data; boundary={boundary}"
        status, _, reply = self.call("POST", path, body, {"Content-Type": content_type})
        return status, json.loads(reply)

    def status(self, task_id):
        return self.get(f"/v1/tasks/{task_id}/status")[1]

    def until(self, task_id, *states):
        """The status once it is one of `states`, which have ten seconds to come."""
        deadline = time.monotonic() + 10
        while (status := self.status(task_id))["status"] not in states:
            assert time.monotonic() < deadline, status
            time.sleep(0.01)
        return status

    def a_worker(self):
        """One that is ready, which has ten seconds to come."""
        wait_until(lambda: self.server.pool.ready)
        return next(iter(self.server.pool.ready))

    def made(self, **body):
        """Post a request and wait for its end."""
        status, reply = self.post(body)
        assert status == 200, reply
        return self.until(reply["task_id"], "completed", "failed", "cancelled")


def wait_until(is_so: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def open_pipes() -> set[str]:
    """Names of the pipes this process holds an end of."""
    names = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            names.add(os.readlink(f"/proc/self/fd/{fd}"))
    return {name for name in names if name.startswith("pipe:")}


def left_open(use: Callable[[], object]) -> list[str]:
    """Pipes that `use` left open, and what the garbage collector then warns of."""
    before = open_pipes()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        use()
        left = open_pipes() - before
        gc.collect()
    return [*left, *(str(warning.message) for warning in seen)]


def png(width=8, height=8):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def base64_png():
    return base64.b64encode(png()).decode()
