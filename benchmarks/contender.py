"""What one setting of one program is to a benchmark, and what all of them need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from lightx2v_core.errors import RequestError
from lightx2v_core.wan.config import WanConfig

# (noise with condition, timestep, text, CLIP features) to a velocity, both float32 B C T H W.
Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Weights = dict[str, Tensor]
# FlashAttention 3 built for the forward alone: the package fa3-fwd, by its module.
FA3_FORWARD = "fa3_fwd_interface"


@dataclass(frozen=True)
class Contender:
    """One setting of one program. `load` turns official weights (bf16) into its forward."""

    who: str
    setting: str
    version: str
    tier: str  # 16bit or 8bit
    attention: str
    scheme: str
    load: Callable[[WanConfig, Weights], Forward]
    # Whether the program has this setting by itself; else a package was put in through its hook.
    stock: bool = True

    def facts(self) -> dict[str, object]:
        return {
            "who": self.who,
            "setting": self.setting,
            "version": self.version,
            "attention": self.attention,
            "scheme": self.scheme,
            "stock": self.stock,
        }


def installed(package: str) -> str:
    """The version of a package, or "unknown"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def comfyui_version(root: Path) -> str:
    """Raises RequestError where `root` holds no ComfyUI."""
    path = root / "comfyui_version.py"
    if not path.is_file():
        raise RequestError(f"{root} holds no ComfyUI: {path.name} is not there")
    return path.read_text("utf-8").split('"')[1]


def allow_recompiles() -> None:
    """As many graphs of one function as a model has blocks: PyTorch gives up after eight."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64


def compile_blocks(blocks: Iterable[torch.nn.Module]) -> None:
    """Each block in place, as the nodes that users have for it do."""
    allow_recompiles()
    for block in blocks:
        block.compile(dynamic=False)


def half(*inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """In bfloat16, as a sampler hands them to a model of that type."""
    return tuple(None if part is None else part.bfloat16() for part in inputs)
