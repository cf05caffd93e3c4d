"""LoRA files of every naming in use, as up and down pairs and differences under official names.

Knows names and shapes; touches no model. Scale is alpha / rank where the file has alpha, else 1.
LoRA: https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..checkpoint.layouts import from_diffusers
from ..checkpoint.source import open_checkpoint
from ..errors import CheckpointError, preview

# (ending of the up matrix, ending of the down matrix)
PAIRS = (
    (".lora_up.weight", ".lora_down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B", ".lora_A"),
)
# (ending, ending of the tensor it is added to)
DIFFERENCES = ((".diff_b", ".bias"), (".diff_m", ".modulation"), (".diff", ".weight"))
ALPHA = ".alpha"
PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "unet.",
    "model.",
)
KOHYA = "lora_unet_"
OTHER_ADAPTERS = (
    ("lokr_", "LoKr"),
    ("hada_", "LoHa"),
    ("dora_scale", "DoRA"),
    ("oft_", "OFT"),
    ("lora_mid", "LoCon with a middle matrix"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """up MR, down RK, and alpha / rank."""

    up_MR: Tensor
    down_RK: Tensor
    alpha: float | None = None

    @property
    def rank(self) -> int:
        return self.down_RK.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True, slots=True, eq=False)
class LoraFile:
    """Pairs by module name, differences by tensor name; `kohya` names have lost their dots."""

    name: str
    pairs: dict[str, Pair] = field(default_factory=dict)
    differences: dict[str, Tensor] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()


def read_lora(path: str | Path) -> LoraFile:
    """Raises CheckpointError for half a pair, another kind of adapter, or no LoRA at all."""
    checkpoint = open_checkpoint(path)
    names = set(checkpoint.headers)
    for mark, kind in OTHER_ADAPTERS:
        if any(mark in name for name in names):
            raise CheckpointError(
                f"{checkpoint.name} is a {kind} adapter, which this version does not apply; "
                "use a LoRA of up and down pairs"
            )
    tensors = checkpoint.tensors({name: name for name in names})
    pairs, used = _read_pairs(tensors, checkpoint.name)
    differences: dict[str, Tensor] = {}
    for name in names - used:
        for ending, target in DIFFERENCES:
            if name.endswith(ending):
                differences[official(name.removesuffix(ending)) + target] = tensors[name]
                used.add(name)
                break
    if not pairs and not differences:
        raise CheckpointError(
            f"{checkpoint.name} is not a LoRA this version knows: it holds {preview(names)}"
        )
    return LoraFile(checkpoint.name, pairs, differences, tuple(sorted(names - used)))


def _read_pairs(tensors: dict[str, Tensor], source: str) -> tuple[dict[str, Pair], set[str]]:
    pairs: dict[str, Pair] = {}
    used: set[str] = set()
    for up, down in PAIRS:
        for name in [n for n in tensors if n.endswith(up) and n not in used]:
            stem = name.removesuffix(up)
            if stem + down not in tensors:
                raise CheckpointError(f"{source} holds {name} without {stem}{down}; it is damaged")
            alpha = tensors.get(stem + ALPHA)
            number = None if alpha is None else float(alpha)
            matrices = (tensors[name].flatten(1), tensors[stem + down].flatten(1))
            pairs[official(stem)] = Pair(*matrices, number)
            used |= {name, stem + down, stem + ALPHA}
    return pairs, used


def official(stem: str) -> str:
    """The official module name of a LoRA stem, as far as names alone tell."""
    for prefix in PREFIXES:
        stem = stem.removeprefix(prefix)
    return from_diffusers(stem) or stem


def without_dots(names: Iterable[str]) -> dict[str, str]:
    """kohya's spelling of module names -> the names."""
    return {KOHYA + re.sub(r"\.", "_", name): name for name in names}
