"""The service as a person starts it, with the demo model in a worker of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.service_load import call
from lightx2v_core.media import read_metadata

ROOT = Path(__file__).parents[3]
CONFIGURATION = {
    "infer_steps": 4,
    "target_video_length": 5,
    "target_height": 32,
    "target_width": 32,
    "sample_shift": 5,
    "enable_cfg": False,
    "denoising_step_list": [1000, 750, 500, 250],
}
LAST_LINES = re.compile(r"^worker \d+: (.*): 5 frames; prompt .* s/step", re.MULTILINE)
PROMPT = "a large red circle moving right on a dark background"


def until(base, path, wanted, seconds=120):
    deadline = time.monotonic() + seconds
    while True:
        status, data = call(base, "GET", path)
        if wanted(status, json.loads(data)):
            return json.loads(data)
        assert time.monotonic() < deadline, data
        time.sleep(0.02)


@pytest.mark.skipif(os.name == "nt", reason="SIGTERM ends a process at once on Windows")
def test_the_demo_is_made_cancelled_between_blocks_and_finished_on_sigterm(tmp_path):
    configuration = tmp_path / "demo.json"
    configuration.write_text(json.dumps(CONFIGURATION))
    command = [sys.executable, "-m", "lightx2v_core.api_server", "--model_cls", "wan2.1_distill"]
    command += ["--task", "t2v", "--model_path", "demo", "--config_json", str(configuration)]
    command += ["--port", "0", "--nproc_per_node", "1", "--result-dir", str(tmp_path / "results")]
    log = tmp_path / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as target:
        server = subprocess.Popen(command, cwd=ROOT, stderr=target, env=environment)
    try:
        while not (found := re.search(r"listening on (\S+),", log.read_text())):
            assert server.poll() is None, log.read_text()
            time.sleep(0.05)
        base = found[1]
        until(base, "/ready", lambda status, _: status == 200)

        def post(**body):
            return json.loads(call(base, "POST", "/v1/tasks/video/", {"prompt": PROMPT, **body})[1])

        def state(name, *wanted):
            path = f"/v1/tasks/{name}/status"
            return until(base, path, lambda _, body: body["status"] in wanted)

        first = post(seed=7, infer_steps=5)["task_id"]
        made = state(first, "completed", "failed")
        long = post(target_shape=[256, 256], target_video_length=49)["task_id"]
        until(base, f"/v1/tasks/{long}/status", lambda _, body: body["progress"])
        call(base, "DELETE", f"/v1/tasks/{long}")
        refused = state(post(target_video_length=6)["task_id"], "failed")
        last = post(seed=8)["task_id"]
        state(last, "processing", "completed")
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    finally:
        server.kill()
        server.wait()

    assert made["status"] == "completed", made
    assert made["facts"]["notes"] and made["facts"]["frames"] == 5
    assert refused["error"] == "6 frames is not 4*n + 1; use 5"
    assert code == 0
    assert len(re.findall("worker .* computing in", log.read_text())) <= 2, "it was loaded once"
    videos = list((tmp_path / "results" / "outputs").iterdir())
    assert sorted(read_metadata(video)["seed"] for video in videos) == [7, 8]
    assert sorted(LAST_LINES.findall(log.read_text())) == sorted(map(str, videos))
