"""Finds the ComfyUIs to test in, and runs the pack in the Python and in the server of each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACK = HERE.parents[1]
MARK = "RESULTS "
SCRIPT = "inprocess.py"
SCRIPT_SECONDS = 900


def find_hosts() -> list[Path]:
    """COMFYUI_PATH, the folder this pack is installed in, and comfy-cli's default with others
    beside it; each found one once."""
    home = Path.home() / "comfy"
    given = os.environ.get("COMFYUI_PATH")
    places = [Path(given)] if given else [PACK.parent.parent, home / "ComfyUI"]
    if not given and home.is_dir():
        places += sorted(home.glob("ComfyUI-*"))
    return [p for p in dict.fromkeys(places) if (p / "comfyui_version.py").is_file()]


def version_of(host: Path) -> str:
    found = re.search(r'"([\d.]+)"', (host / "comfyui_version.py").read_text("utf-8"))
    return found.group(1) if found else host.name


def interpreter(host: Path) -> Path:
    given = os.environ.get("COMFYUI_PYTHON")
    return Path(given) if given else host / ".venv" / "bin" / "python"


def host_environment() -> dict[str, str]:
    """Ours, and with bytecode kept as ComfyUI keeps it: compiling it costs two seconds a start."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


HOSTS = find_hosts()
NO_HOST = (
    "no ComfyUI was found (COMFYUI_PATH, ../.., ~/comfy/ComfyUI), so nothing was tested inside one"
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "host" in metafunc.fixturenames:
        metafunc.parametrize(
            "host", HOSTS or [None], ids=version_of if HOSTS else None, scope="session"
        )


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without a ComfyUI one test alone says so, and what needs none runs."""
    needs_host = collection_path.name.startswith("test_") and collection_path.name not in (
        "test_comfyui_found.py",
        "test_workflow_files.py",
    )
    return True if needs_host and not HOSTS else None


class Inside:
    """Runs all checks in a ComfyUI's Python, once for all tests that ask."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[Path, dict] = {}

    def run(self, host: Path) -> dict:
        if host not in self.results:
            self.results[host] = self._run(host)
        return self.results[host]

    def _run(self, host: Path) -> dict:
        work = self.folder / version_of(host)
        work.mkdir()
        done = subprocess.run(
            [interpreter(host), HERE / SCRIPT, work],
            cwd=host,
            env={**host_environment(), "COMFYUI_PATH": str(host)},
            capture_output=True,
            text=True,
            timeout=SCRIPT_SECONDS,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if not lines:
            pytest.fail(
                f"{SCRIPT} did not end in {host}:\n{done.stdout[-1500:]}{done.stderr[-2500:]}"
            )
        return json.loads(lines[-1].removeprefix(MARK))


@pytest.fixture(scope="session")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Inside:
    return Inside(tmp_path_factory.mktemp("inside"))


@pytest.fixture(scope="session")
def server(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A running ComfyUI with this pack alone and small random model files."""
    sys.path.insert(0, str(HERE))
    try:
        from live_server import Server
    finally:
        sys.path.remove(str(HERE))
    folder = tmp_path_factory.mktemp(f"server-{version_of(host)}")
    with Server(host, interpreter(host), PACK, folder, host_environment()) as running:
        yield running
