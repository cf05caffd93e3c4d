"""Our pack inside a real ComfyUI on a card: the checks of tests/host, where they were faked on a
CPU, and those of inprocess_card in half precision.

LIGHTX2V_COMFYUI names the folder of a ComfyUI; its packages are those of COMFYUI_PYTHON, or of the
Python that runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.host.test_inside import checks

COMFYUI = os.environ.get("LIGHTX2V_COMFYUI", "")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
    pytest.mark.skipif(not COMFYUI, reason="needs a ComfyUI in LIGHTX2V_COMFYUI"),
]
FOLDER = Path(__file__).parents[1] / "host"
MARK = "RESULTS "
SECONDS, AT_ONCE = 500, 6
# A script, and what ComfyUI is started with. The older scripts compare in float32.
STARTS = {
    "dynamic": ("inprocess_card.py", ""),
    "static": ("inprocess_card.py", "--disable-dynamic-vram"),
    "model": ("inprocess_model.py", "--force-fp32"),
    "memory": ("inprocess_memory.py", "--force-fp32"),
    "settings": ("inprocess_settings.py", "--force-fp32"),
    "codecs": ("inprocess_codecs.py", "--force-fp32"),
}
CLAIMS = [(start, claim) for start, (script, _) in STARTS.items() for claim in checks(script)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[dict]]]:
    """Of every script, as it comes: they run beside each other."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            start: pool.submit(run, script, flags, tmp_path_factory.mktemp(start))
            for start, (script, flags) in STARTS.items()
        }


def run(script: str, flags: str, work: Path) -> dict:
    added = {"COMFYUI_PATH": COMFYUI, "LIGHTX2V_HOST_FLAGS": flags}
    done = subprocess.run(
        [os.environ.get("COMFYUI_PYTHON", sys.executable), FOLDER / script, work],
        cwd=COMFYUI,
        env={**os.environ, **added},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert lines, f"{script} {flags} did not end:\n{done.stdout[-1500:]}{done.stderr[-2500:]}"
    return json.loads(lines[-1].removeprefix(MARK))


@pytest.mark.parametrize(("start", "claim"), CLAIMS)
def test_on_a_card_in_comfyui(results, start, claim):
    result = results[start].result()[claim]

    assert result["ok"], result["detail"]
