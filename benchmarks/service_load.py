"""Many clients at one service, while tasks are cancelled and workers killed: is anything lost,
doubled or mixed up, and does memory stay flat?

    python -m benchmarks.service_load --config_json configs/... --out load.jsonl

starts the service on the demo model at a tiny size. Each client posts a request, waits for its end,
and checks what it got; some are cancelled on the way. Meanwhile workers are killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ENDED = ("completed", "failed", "cancelled")


@dataclass
class Report:
    """What the clients saw."""

    posted: dict[str, int] = field(default_factory=dict)  # task -> seed
    ends: dict[str, dict[str, object]] = field(default_factory=dict)
    results: dict[str, bytes] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)  # by a client, with success
    refused: int = 0  # 503: the queue was full, the client came back later
    kills: int = 0
    memory: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


def call(base: str, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    """Status and body of one request."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} if data else {}
    request = urllib.request.Request(base + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@dataclass
class Load:
    """`tasks` requests from `clients` threads, a share of them cancelled on the way."""

    base: str
    tasks: int
    clients: int
    body: dict[str, object]
    cancel_share: float = 0.15
    pause: float = 0.2
    report: Report = field(default_factory=Report)
    problems: list[BaseException] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, kill: Callable[[], None], kill_every: int) -> Report:
        """Call `kill` once for each `kill_every` tasks that ended. A client's error is raised."""
        report, started = self.report, time.perf_counter()
        self.numbers = iter(range(self.tasks))
        threads = [threading.Thread(target=self._client, args=(n,)) for n in range(self.clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if len(report.ends) >= (report.kills + 1) * kill_every:
                kill()
                report.kills += 1
            if len(report.ends) >= len(report.memory) * max(self.tasks // 10, 1):
                self._measure()
            time.sleep(self.pause)
        report.seconds = time.perf_counter() - started
        self._measure()
        if self.problems:
            raise self.problems[0]
        return report

    def _measure(self) -> None:
        self.report.memory.append({"ended": len(self.report.ends), **memory(self.base)})

    def _client(self, number: int) -> None:
        try:
            self._work(random.Random(number))
        except BaseException as error:  # noqa: BLE001 - raised where the load is waited for
            self.problems.append(error)

    def _work(self, chance: random.Random) -> None:
        while True:
            with self.lock:
                seed = next(self.numbers, None)
            if seed is None:
                return
            name = self._post(seed)
            if chance.random() < self.cancel_share:
                time.sleep(chance.random() * self.pause * 5)
                answer = json.loads(call(self.base, "DELETE", f"/v1/tasks/{name}")[1])
                if answer["stop_status"] == "success":
                    self.report.cancelled.add(name)
            self._follow(name)

    def _post(self, seed: int) -> str:
        while True:
            status, data = call(self.base, "POST", "/v1/tasks/video/", {**self.body, "seed": seed})
            if status == 200:
                name = json.loads(data)["task_id"]
                self.report.posted[name] = seed
                return name
            if status != 503:
                raise RuntimeError(f"{status}: {data[:300]!r}")
            with self.lock:
                self.report.refused += 1
            time.sleep(self.pause)

    def _follow(self, name: str) -> None:
        while True:
            state = json.loads(call(self.base, "GET", f"/v1/tasks/{name}/status")[1])
            if state["status"] in ENDED:
                break
            time.sleep(self.pause)
        status, data = call(self.base, "GET", f"/v1/tasks/{name}/result")
        if (status == 200) != (state["status"] == "completed"):
            raise RuntimeError(f"{name} is {state['status']} and its result answers {status}")
        if status == 200:
            self.report.results[name] = data
        self.report.ends[name] = state


def memory(base: str) -> dict[str, float]:
    """MB of the service and of its workers together, where Linux tells them."""
    found = {"service": 0.0, "workers": 0.0}
    names = {"process_resident_memory_bytes": "service", "lightx2v_worker_resident": "workers"}
    for line in call(base, "GET", "/metrics")[1].decode().splitlines():
        for start, name in names.items():
            if line.startswith(start):
                found[name] += float(line.split()[-1]) / 1e6
    return {name: round(value, 1) for name, value in found.items()}


def check(report: Report, base: str, seed_of: Callable[[bytes], int]) -> list[str]:
    """What is wrong, in sentences: lost, doubled, mixed up, or failed without a reason."""
    listed = json.loads(call(base, "GET", "/v1/tasks/")[1])
    wrong = []
    if set(listed) != set(report.posted):
        wrong.append(f"{len(report.posted)} posted, {len(listed)} known to the service")
    for name, seed in report.posted.items():
        end = report.ends.get(name, {})
        state = end.get("status")
        if state not in ENDED or listed.get(name, {}).get("status") != state:
            wrong.append(f"{name} is lost: {state}")
        if (name in report.cancelled) != (state == "cancelled"):
            wrong.append(f"{name} is {state}, cancelled by its client: {name in report.cancelled}")
        if state == "failed" and end.get("error_type") != "WorkerDied":
            wrong.append(f"{name} failed: {end.get('error')}")
        if state == "completed" and seed_of(report.results[name]) != seed:
            wrong.append(f"{name} holds the video of another request")
    return wrong


def summary(report: Report) -> dict[str, object]:
    """One line for the results."""
    states = Counter(str(end["status"]) for end in report.ends.values())
    retried = sum(end["attempts"] == 2 for end in report.ends.values())
    return {
        "tasks": len(report.posted),
        "states": dict(states),
        "retried": retried,
        "workers_killed": report.kills,
        "refused_503": report.refused,
        "seconds": round(report.seconds, 1),
        "per_minute": round(60 * states["completed"] / report.seconds, 1),
        "memory_mb": report.memory,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Start a service on the demo model, load it, print and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config_json", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--kill-every", type=int, default=40)
    parser.add_argument("--port", type=int, default=8010)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    base = f"http://127.0.0.1:{options.port}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lightx2v_core.api_server", "--model_path", "demo"]
        command += ["--config_json", str(options.config_json), "--port", str(options.port)]
        command += ["--result-dir", folder, "--queue-size", "15"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(command, env=environment)
        try:
            _wait_ready(base, server)
            body: dict[str, object] = {
                "prompt": "a large red circle moving right on a dark background",
                "target_shape": [16, 16],
                "target_video_length": 5,
            }
            load = Load(base, options.tasks, options.clients, body)
            report = load.run(lambda: _kill_a_child(server.pid), options.kill_every)
            wrong = check(report, base, _seed_in_video)
            files = len(list(Path(folder, "outputs").iterdir()))
            if files != len(report.results):
                wrong.append(f"{files} files for {len(report.results)} results")
        finally:
            server.terminate()
            code = server.wait(90)
    line = {**summary(report), "exit_code": code, "wrong": wrong}
    print(json.dumps(line))
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return int(bool(wrong))


def _wait_ready(base: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            if call(base, "GET", "/ready")[0] == 200:
                return
        except urllib.error.URLError:
            pass
        time.sleep(0.5)
    raise RuntimeError("the service ended before it was ready")


def _kill_a_child(pid: int) -> None:
    """Linux: a worker of the service, in the middle of its work."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
    for child in children:
        if b"lightx2v_core.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), 9)
            return


def _seed_in_video(data: bytes) -> int:
    from lightx2v_core.media import read_metadata

    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(data)
        file.flush()
        seed = read_metadata(Path(file.name))["seed"]
    return seed if isinstance(seed, int) else -1


if __name__ == "__main__":
    sys.exit(main())
