"""What happens when workers die, do not listen, or cannot load, and when the service ends."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightx2v_core.api_server.metrics import Metrics
from lightx2v_core.api_server.workers import environments
from lightx2v_core.errors import CapabilityError, RequestError
from lightx2v_core.wire import MAX_LINE, decode, encode
from tests.unit.service.running import FAKE, Running, left_open, wait_until

WITH_CORE = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}


def test_a_request_whose_worker_dies_is_tried_once_more_and_then_told(tmp_path):
    with Running(tmp_path, queue_size=4) as service:
        once = service.post({"prompt": "die-once", "seed": 5})[1]["task_id"]
        twice = service.post({"prompt": "die"})[1]["task_id"]
        after = service.post({"prompt": "a"})[1]["task_id"]

        revived, failed = service.until(once, "completed"), service.until(twice, "failed")
        unharmed = service.until(after, "completed")

        assert revived["attempts"] == 2 and unharmed["attempts"] == 1
        assert failed["error_type"] == "WorkerDied" and failed["attempts"] == 2
        assert not list((tmp_path / "outputs").glob("*.part.mp4"))


def test_a_worker_that_does_not_listen_to_a_cancel_is_killed_and_replaced(tmp_path):
    with Running(tmp_path) as service:
        deaf = service.post({"prompt": "deaf"})[1]["task_id"]
        wait_until(lambda: service.status(deaf)["progress"])
        pid = service.a_worker().process.pid

        service.delete(f"/v1/tasks/{deaf}")
        after = service.made(prompt="a")
        new = service.a_worker().process.pid

        assert service.status(deaf)["status"] == "cancelled"
        assert after["status"] == "completed" and new != pid


def test_an_idle_worker_that_dies_is_replaced(tmp_path):
    with Running(tmp_path) as service:
        service.made(prompt="a")
        service.a_worker().process.kill()

        assert service.made(prompt="a")["status"] == "completed"


def test_two_workers_make_two_videos_at_once(tmp_path):
    with Running(tmp_path, processes=2) as service:
        names = [service.post({"prompt": "slow"})[1]["task_id"] for _ in range(2)]
        for name in names:
            service.until(name, "processing")

        assert sorted(service.get("/v1/service/status")[1]["active_tasks"]) == sorted(names)
        service.delete("/v1/tasks/all/running")


def test_each_worker_gets_a_card_of_those_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")

    assert environments(2) == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    assert environments(1) == [{}]
    with pytest.raises(RequestError, match="3 workers need a card each"):
        environments(3)


@pytest.mark.parametrize(
    ("argument", "words"),
    [("--unusable", "no model at this place"), ("--dies", "died 3 times while it loaded")],
)
def test_a_model_that_cannot_be_used_ends_the_service_with_the_reason(tmp_path, argument, words):
    with Running(tmp_path, command=(*FAKE, argument)) as service:
        service.wait_ended()

    assert isinstance(service.problem, CapabilityError) and words in str(service.problem)


def test_a_stop_finishes_what_runs_and_marks_what_waits(tmp_path):
    with Running(tmp_path) as service:
        running = service.post({"prompt": "short"})[1]["task_id"]
        waiting = service.post({"prompt": "a"})[1]["task_id"]
        service.until(running, "processing")

    with Running(tmp_path) as service:
        assert service.status(running)["status"] == "completed"
        assert service.call("GET", f"/v1/tasks/{running}/result")[0] == 200
        assert service.status(waiting)["status"] == "failed"
        assert service.status(waiting)["error_type"] == "Interrupted"


def test_a_stop_lets_one_worker_finish_while_the_other_has_nothing_to_do(tmp_path):
    with Running(tmp_path, processes=2) as service:
        name = service.post({"prompt": "short"})[1]["task_id"]
        service.until(name, "processing")

    with Running(tmp_path) as service:
        assert service.status(name)["status"] == "completed"


def test_a_stop_marks_what_does_not_end_in_time_and_leaves_no_process(tmp_path):
    with Running(tmp_path, stop_seconds=0.1) as service:
        name = service.post({"prompt": "deaf"})[1]["task_id"]
        service.until(name, "processing")
        process = service.a_worker().process

    with Running(tmp_path) as service:
        assert service.status(name)["error_type"] == "Interrupted"
    assert process.returncode is not None


def test_a_service_that_was_killed_keeps_results_and_marks_the_rest(tmp_path):
    with Running(tmp_path, stop_seconds=0.0) as service:
        kept = service.made(prompt="a")["task_id"]
        name = service.post({"prompt": "slow"})[1]["task_id"]
        service.until(name, "processing")
        journal = service.server.journal
        journal.write = lambda record: None  # as if it were gone: nothing is marked any more
    (tmp_path / "outputs" / f"{'0' * 32}.part.mp4").touch()
    (tmp_path / "outputs" / "of somebody else.mp4").touch()

    with Running(tmp_path) as service:
        assert service.status(kept)["status"] == "completed"
        assert service.status(name)["error_type"] == "Interrupted"
        left = {path.name for path in (tmp_path / "outputs").iterdir()}
        assert len(left) == 2 and "of somebody else.mp4" in left


def test_two_services_do_not_share_a_folder(tmp_path):
    with Running(tmp_path), pytest.raises(CapabilityError, match="its own --result-dir"):
        Running(tmp_path).__enter__()


def test_the_oldest_results_make_room(tmp_path):
    with Running(tmp_path, keep=2) as service:
        names = [service.made(prompt="a")["task_id"] for _ in range(4)]

        assert list(service.get("/v1/tasks/")[1]) == names[2:]
        assert len(list((tmp_path / "outputs").iterdir())) == 2


# A worker whose child holds both pipes a while longer than the worker lives.
HOLDING = f"""
import os, runpy, subprocess, sys
outlive = f"while kill -0 {{os.getpid()}}; do sleep 0.02; done 2>/dev/null; sleep 0.1"
subprocess.Popen(["sh", "-c", outlive])
print("garbage", flush=True) if "--garbage" in sys.argv else None
sys.argv[0] = {FAKE[1]!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def say_garbage(service):
    wait_until(lambda: b"worker_restarts_total 1.0" in service.server.pool.metrics.text())


def kill_it(service):
    service.a_worker().process.kill()


def let_it_die(service):
    service.made(prompt="die")


def let_it_end(service):
    service.made(prompt="a")


def let_it_wait(service):
    service.a_worker()


def stop_at_once(service):
    pass


@pytest.mark.parametrize(
    "act", [say_garbage, kill_it, let_it_die, let_it_end, let_it_wait, stop_at_once]
)
def test_a_service_leaves_no_pipe_open_whatever_becomes_of_its_worker(tmp_path, act):
    arguments = ("--garbage",) if act is say_garbage else ()
    command = (sys.executable, "-c", HOLDING, *arguments)

    def use():
        with Running(tmp_path, command=command) as service:
            act(service)

    assert left_open(use) == []


@pytest.mark.parametrize("is_cancelled", [True, False], ids=["cancelled", "late"])
def test_a_question_to_nvidia_smi_that_is_not_answered_leaves_nothing_open(
    tmp_path, monkeypatch, is_cancelled
):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 0, 1, 2, 3\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("lightx2v_core.api_server.metrics.GPU_PAUSE", 0.2)

    async def ask():
        seconds = 0.1 if is_cancelled else 10
        await asyncio.wait_for(Metrics().see_gpus(), seconds)

    def use():
        try:
            asyncio.run(ask())
        except TimeoutError:
            assert is_cancelled

    assert left_open(use) == []


def test_a_worker_ends_when_nobody_is_left_to_answer_to():
    process = subprocess.Popen(FAKE, env=WITH_CORE, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert decode(process.stdout.readline())["kind"] == "ready"
    job = {"kind": "run", "id": "a", "request": {"prompt": "deaf", "seed": 1}, "output": "x.mp4"}
    process.stdin.write(encode(job))
    process.stdin.flush()
    assert decode(process.stdout.readline())["kind"] == "progress"

    process.stdin.close()

    assert process.wait(10) == 0
    process.stdout.close()


@pytest.mark.parametrize("line", [b"", b"[]\n", b'{"kind": 1}\n', b"{" * 5000, b"\x80\x04."])
def test_what_is_no_message_is_refused(line):
    with pytest.raises(RequestError, match="is not a message"):
        decode(line)


def test_a_message_is_one_line_and_not_longer_than_the_limit():
    assert encode({"kind": "run", "text": "a\nb é"}).count(b"\n") == 1
    with pytest.raises(RequestError, match="over the limit"):
        encode({"kind": "run", "text": "a" * MAX_LINE})


def test_the_service_says_what_to_install_when_its_packages_are_missing():
    script = """
import sys
sys.modules["aiohttp"] = None
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *a: None if name == "aiohttp" else find(name, *a)
del sys.modules["aiohttp"]
from lightx2v_core.api_server.__main__ import main
sys.exit(main(["--model_path", "demo"]))
"""

    done = subprocess.run(
        [sys.executable, "-c", script], env=WITH_CORE, capture_output=True, text=True, check=False
    )

    assert done.returncode == 1, done.stderr
    assert "packages that are not installed here (aiohttp)" in done.stderr
