"""One test for each check of the scripts that run inside a ComfyUI's Python."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

HERE = Path(__file__).parent


def checks(script: str) -> list[str]:
    """Names of the functions decorated with @check, also in the modules `..._checks` it imports."""
    tree = ast.parse((HERE / script).read_text("utf-8"))
    imported = [n.names[0].name for n in tree.body if isinstance(n, ast.Import)]
    registered = [c for name in imported if name.endswith("_checks") for c in checks(f"{name}.py")]
    return registered + [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id == "check" for d in node.decorator_list)
    ]


def expect(result: dict) -> None:
    assert result["ok"], result["detail"]


@pytest.mark.parametrize("claim", checks("inprocess_model.py"))
def test_our_model_and_native_nodes(host, inside, claim):
    expect(inside.run(host)[claim])


@pytest.mark.parametrize("claim", checks("inprocess_memory.py"))
def test_our_patcher_lora_and_memory(host, inside, claim):
    expect(inside.run(host)[claim])


@pytest.mark.parametrize("claim", checks("inprocess_codecs.py"))
def test_our_vae_clip_and_nodes(host, inside, claim):
    expect(inside.run(host)[claim])


@pytest.mark.parametrize("claim", checks("inprocess_settings.py"))
def test_settings_guards_and_what_others_patch(host, inside, claim):
    expect(inside.run(host)[claim])
