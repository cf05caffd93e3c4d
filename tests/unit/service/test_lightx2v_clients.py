"""LightX2V's own client scripts, unchanged but for the port, where a checkout of it is at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.service.running import Running

HOME = Path(os.environ.get("LIGHTX2V_PATH", "/nowhere"))
SCRIPTS = HOME / "scripts" / "server"
LOGURU = """
import types
logger = types.SimpleNamespace(**{n: print for n in ("info", "warning", "error")})
"""

if not SCRIPTS.is_dir():
    pytest.skip("LIGHTX2V_PATH names no checkout of LightX2V", allow_module_level=True)


def run(folder, service, script, *arguments):
    (folder / "loguru.py").write_text(LOGURU)
    for path in SCRIPTS.glob("*.py"):
        text = path.read_text("utf-8").replace("localhost:8000", f"localhost:{service.port}")
        text = text.replace("range(8000, 8008)", f"range({service.port}, {service.port + 1})")
        (folder / path.name).write_text(text, "utf-8")
    done = subprocess.run(
        [sys.executable, str(folder / script), *arguments],
        cwd=HOME,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_clients_for_words_post_follow_and_stop(tmp_path):
    with Running(tmp_path / "results") as service:
        posted = run(tmp_path, service, "post.py")
        many = run(tmp_path, service, "post_multi_servers_t2v.py")
        seen = run(tmp_path, service, "check_status.py")
        stopped = run(tmp_path, service, "stop_running_task.py")
        state = service.get("/v1/service/status")[1]

    assert "'task_status': 'pending'" in posted and "cat_boxing_seed42.mp4" in posted
    assert "All tasks completed successfully!" in many
    assert "'service_status': 'idle'" in seen and "'status': 'completed'" in seen
    assert "'stop_status'" in stopped
    assert state["completed_tasks"] == state["total_tasks"] == 7


def test_clients_for_pictures_post_and_follow(tmp_path):
    with Running(tmp_path / "results", task="i2v") as service:
        posted = run(tmp_path, service, "post_i2v.py")
        many = run(tmp_path, service, "post_multi_servers_i2v.py")
        state = service.get("/v1/service/status")[1]

    assert "'task_status': 'pending'" in posted
    assert "All tasks completed successfully!" in many
    assert state["completed_tasks"] == state["total_tasks"] == 3
