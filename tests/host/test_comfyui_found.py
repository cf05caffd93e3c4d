"""Says in one line when there is no ComfyUI to test in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.host


def test_every_comfyui_found_has_its_interpreter(request):
    finder = next(
        m
        for m in sys.modules.values()
        if getattr(m, "__file__", None) == str(Path(__file__).parent / "conftest.py")
    )
    if not finder.HOSTS:
        pytest.skip(finder.NO_HOST)

    missing = [host for host in finder.HOSTS if not finder.interpreter(host).is_file()]

    assert not missing, f"no .venv in {missing}; set COMFYUI_PYTHON"
