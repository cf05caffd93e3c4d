"""ComfyUI's real frontend in headless Chromium: drive.mjs makes the claims, one test for each.

`make test-browser`; not in the default suite, since it takes two minutes. SHOTS=folder keeps
screenshots.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.conftest import HOSTS, PACK, host_environment, interpreter, version_of

pytestmark = pytest.mark.browser

HERE = Path(__file__).parent
WORKFLOWS = sorted(path.stem for path in (PACK / "workflows").glob("*.json"))
SEARCHES = ("wan", "4 step", "lightx2v", "distill")
LEAST_FRONTEND = (
    0,
    18,
)  # ComfyUI's version; the driver's commands and ids are those of its frontend
SECONDS = 400


def claims() -> list[str]:
    """As drive.mjs names them, with what it puts into the names."""
    found = []
    for name in re.findall(r"claim\(['`]([\w${}.(), ' ]+)['`],", (HERE / "drive.mjs").read_text()):
        if "${name}" in name:
            found += [name.replace("${name}", workflow) for workflow in WORKFLOWS]
        elif "${" in name:
            stem = name.partition("${")[0]
            found += [stem + words.replace(" ", "_") for words in SEARCHES]
        else:
            found.append(name)
    return found


def chromium() -> str | None:
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


def lacking() -> str:
    """Why no browser can be driven here, or nothing."""
    hosts = [h for h in HOSTS if tuple(map(int, version_of(h).split(".")[:2])) >= LEAST_FRONTEND]
    wanted = {
        "ComfyUI 0.18 or newer": hosts,
        "node": shutil.which("node"),
        "Chromium (CHROMIUM=path)": chromium(),
        "playwright-core (make test-browser installs it)": (HERE / "node_modules").is_dir(),
    }
    return ", ".join(what for what, found in wanted.items() if not found)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict]]:
    if missing := lacking():
        pytest.skip(f"no browser was driven; this machine lacks {missing}")
    sys.path.insert(0, str(PACK / "tests/host"))
    try:
        from live_server import Server
    finally:
        sys.path.remove(str(PACK / "tests/host"))
    host = next(h for h in HOSTS if tuple(map(int, version_of(h).split(".")[:2])) >= LEAST_FRONTEND)
    folder = tmp_path_factory.mktemp("browser")
    with Server(host, interpreter(host), PACK, folder, host_environment()) as server:
        fill(folder)
        yield drive(f"http://127.0.0.1:{server.port}/")


def fill(folder: Path) -> None:
    """Empty files under the names of the large models, so that no workflow lacks one."""
    from PIL import Image

    for name in WORKFLOWS:
        for node in json.loads((PACK / f"workflows/{name}.json").read_text("utf-8"))["nodes"]:
            for model in node["properties"].get("models", []):
                (folder / "models" / model["directory"]).mkdir(exist_ok=True)
                (folder / "models" / model["directory"] / model["name"]).touch()
    Image.new("RGB", (64, 48), (200, 40, 40)).save(folder / "input/example.png")


def drive(url: str) -> dict[str, dict]:
    shots = os.environ.get("SHOTS")
    asked = {
        **{"url": url, "chromium": chromium(), "workflows": WORKFLOWS, "searches": SEARCHES},
        "shots": str(Path(shots).resolve()) if shots else None,
    }
    done = subprocess.run(
        ["node", HERE / "drive.mjs", json.dumps(asked)],
        **{"capture_output": True, "text": True, "timeout": SECONDS, "cwd": HERE},
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    assert found, done.stdout[-1500:] + done.stderr[-1500:]
    return json.loads(found[0].removeprefix("RESULTS "))


@pytest.mark.parametrize("claim", claims())
def test_in_the_browser(results, claim):
    result = results[claim]

    assert result["ok"], result["detail"]


def test_the_driver_makes_no_other_claim(results):
    assert set(results) == set(claims())
