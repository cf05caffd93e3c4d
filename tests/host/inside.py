"""Runs inside a ComfyUI's own Python: starts its modules, loads the pack, runs named checks.

A script imports this first, registers functions with `check` and ends with `main()`, which prints
one JSON line. usage: SCRIPT WORK_FOLDER (with COMFYUI_PATH set). LIGHTX2V_HOST_FLAGS holds what
ComfyUI is started with, `--cpu` without it; tests/gpu runs the same checks on a card.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

HOST = Path(os.environ["COMFYUI_PATH"])
PACK = Path(__file__).resolve().parents[2]
WORK = Path(sys.argv[1])
MARK = "RESULTS "
FLAGS = os.environ.get("LIGHTX2V_HOST_FLAGS", "--cpu").split()

for folder in ("diffusion_models", "vae", "vae_approx", "text_encoders", "loras"):
    (WORK / "models" / folder).mkdir(parents=True, exist_ok=True)
for folder in ("input", "output", "temp", "user", "custom_nodes"):
    (WORK / folder).mkdir(exist_ok=True)
sys.argv = [sys.argv[0], *FLAGS, "--base-directory", str(WORK)]
# ComfyUI first: the pack's own folder nodes/ must not stand for ComfyUI's nodes.py.
sys.path[:] = [str(HOST)] + [p for p in sys.path if Path(p or ".").resolve() != PACK]
os.chdir(HOST)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
if "--cpu" not in FLAGS:
    import card

    card.before_torch()

import torch  # noqa: E402

torch.set_num_threads(1)

import comfy.model_management as mm  # noqa: E402, I001
import comfy.utils  # noqa: E402
import nodes as host_nodes  # noqa: E402

DEVICE = mm.get_torch_device()
IS_DYNAMIC = "--cpu" not in FLAGS and card.after_torch(DEVICE)
comfy.utils.PROGRESS_BAR_ENABLED = False
logging.getLogger().setLevel(logging.INFO)  # what main.py does
if asyncio.iscoroutinefunction(host_nodes.load_custom_node):
    loaded = asyncio.run(host_nodes.load_custom_node(str(PACK)))
else:
    loaded = host_nodes.load_custom_node(str(PACK))
assert loaded, "the pack did not load; the log above says why"

# The pack's modules live under a name made from its path.
_name = str(PACK).replace(".", "_x_")


def pack(module: str) -> object:
    """A module of the pack as ComfyUI loaded it, such as "nodes.bridge"."""
    from importlib import import_module

    return import_module(f"{_name}.{module}")


def node(name: str) -> type:
    return host_nodes.NODE_CLASS_MAPPINGS[name]


def run(name: str, **inputs: object) -> tuple:
    """A V3 node executed the way the host does, minus caching."""
    cls = node(name)
    hidden = cls.PREPARE_CLASS_CLONE(None)
    return hidden.EXECUTE_NORMALIZED(**inputs).result


CHECKS: list[Callable[[], str | None]] = []


def check(function: Callable[[], str | None]) -> Callable[[], str | None]:
    """Registers a check: it raises AssertionError, or returns what it measured."""
    assert all(known.__name__ != function.__name__ for known in CHECKS), function.__name__
    CHECKS.append(function)
    return function


class Heard(logging.Handler):
    """Log messages while it is open."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> Heard:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)


def sentence(action: Callable[[], object]) -> str:
    """The message of the error that `action` raises."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - whatever it is, its message is looked at
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def fill(module: torch.nn.Module, seed: int = 20) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(module.named_parameters()):
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name or name.endswith("gamma"):
                tensor.copy_(1.0 + 0.1 * noise)
            elif tensor.ndim > 1:
                tensor.copy_(noise / math.sqrt(tensor[0].numel()))
            else:
                tensor.copy_(0.1 * noise)
    return module.eval().requires_grad_(False)


def main() -> None:
    results, started = {}, time.perf_counter()
    gc.collect()
    gc.freeze()  # what the host itself loaded lives on: collections need not walk through it
    for function in CHECKS:
        begun = time.perf_counter()
        try:
            with torch.inference_mode():
                detail = function() or ""
            ok = True
        except Exception:  # noqa: BLE001 - one failed check must not hide the others
            ok, detail = False, traceback.format_exc()[-3000:]
        gc.collect()
        seconds = round(time.perf_counter() - begun, 2)
        results[function.__name__] = {"ok": ok, "detail": detail, "seconds": seconds}
    results["_seconds"] = round(time.perf_counter() - started, 1)
    print(MARK + json.dumps(results), flush=True)
