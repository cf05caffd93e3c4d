"""Imports inside lightx2v_core go only to names further left in ORDER; importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "lightx2v_core"
ORDER = [
    *("errors", "device", "datatypes", "sizing"),
    *("ops", "quant"),
    *("wan", "text", "vision"),
    *("checkpoint", "lora", "memory", "parallel", "sampling", "media"),
    *("presets", "envelope", "plainly", "report", "conditioning", "request"),
    *("assemble", "adapters", "turns", "bench", "pipeline", "configuration"),
    *("wire", "api_server", "console", "worker", "infer", "options", "cli", "__main__"),
]
SOURCES = sorted(p for p in CORE.rglob("*.py") if p != CORE / "__init__.py")
KERNELS = CORE / "ops" / "kernels"  # imported where Triton is there, and only there
HOST_MODULES = {"comfy", "folder_paths", "comfy_api", "comfy_extras", "node_helpers", "server"}
# Third-party modules that only these files may import.
RESERVED = {
    "torch.distributed": "parallel/",
    "gguf": "quant/gguf_package.py",
    "sageattention": "ops/attention.py",
    "flash_attn": "ops/attention.py",
    "flash_attn_interface": "ops/attention.py",
    "triton": "ops/",
    "comfy_kitchen": "ops/",
}


def relative_targets(path: Path) -> set[str]:
    """Top-level names under lightx2v_core that this file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = path.relative_to(CORE).parts[: -node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found.update((*package, *name.split("."))[0] for name in names)
    return found


def absolute_targets(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(CORE).as_posix())
def test_imports_point_left(path):
    here = path.relative_to(CORE).parts[0].removesuffix(".py")

    for target in relative_targets(path) - {here}:
        assert ORDER.index(target) < ORDER.index(here), f"{here} must not import {target}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(CORE).as_posix())
def test_a_module_keeps_out_of_other_modules_territory(path):
    name = path.relative_to(CORE).as_posix()

    for target in absolute_targets(path):
        assert target.split(".")[0] not in HOST_MODULES, f"{name} must not import {target}"
        for module, home in RESERVED.items():
            if target == module or target.startswith(module + "."):
                assert name.startswith(home), f"only {home} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(CORE).as_posix())
def test_no_function_is_longer_than_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            # A kernel's arguments take a line each, and its registers one function.
            limit = 90 if path.parent == KERNELS else 60
            assert node.end_lineno - node.lineno < limit, f"{node.name} is too long"


def test_importing_everything_has_no_side_effect():
    modules = [
        "lightx2v_core." + ".".join(p.relative_to(CORE).with_suffix("").parts)
        for p in SOURCES
        if p.name not in ("__init__.py", "__main__.py") and p.parent != KERNELS
    ]
    script = f"""
import logging, os, sys, threading
before = (dict(os.environ), list(sys.path), threading.active_count(), os.getcwd())
import importlib
for name in {modules!r}:
    importlib.import_module(name)
import torch
assert before == (dict(os.environ), list(sys.path), threading.active_count(), os.getcwd())
assert not torch.cuda.is_initialized()
assert not logging.getLogger().handlers
heavy = ("transformers", "gguf", "imageio_ffmpeg", "PIL", "rich", "triton")
loaded = [m for m in heavy if m in sys.modules]
assert not loaded, loaded
print("clean")
"""

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.stdout.strip() == "clean", done.stderr


def test_the_root_file_imports_nothing_until_asked():
    script = "import sys, runpy; before = set(sys.modules); runpy.run_path('__init__.py');"
    script += (
        "print(sorted(m for m in set(sys.modules) - before if m.startswith(('torch', 'comfy'))))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(CORE).as_posix())
def test_kernels_are_imported_inside_functions_alone(path):
    if path.parent == KERNELS:
        return
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            assert "kernels" not in (node.module or "").split("."), "needs Triton at import"
            assert "kernels" not in [alias.name for alias in node.names], "needs Triton at import"
