"""LoRA files of every spelling as up and down pairs and differences, under names without prefix.

Knows names and shapes; touches no model. Scale is alpha / rank where alpha is known, else 1; alpha
/ sqrt(rank) where the file, or the adapter_config.json beside it, declares rank-stabilised scaling.
LoRA: https://arxiv.org/abs/2106.09685. rsLoRA: https://arxiv.org/abs/2312.03732
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.source import Checkpoint, open_checkpoint
from ..errors import CheckpointError, preview
from .names import OTHER_ADAPTERS, Part, bare, parse

DIFFUSERS_CONFIG = "lora_adapter_metadata"  # the metadata key diffusers writes
PEFT_CONFIG = "adapter_config.json"  # the file PEFT writes beside adapter_model.safetensors


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """up MR, down RK, and what scales them. `shape` is that of a convolution's weight."""

    up_MR: Tensor
    down_RK: Tensor
    alpha: float | None = None
    rank_stabilised: bool = False
    shape: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        return self.down_RK.shape[0]

    @property
    def scale(self) -> float:
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


@dataclass(frozen=True, slots=True, eq=False)
class LoraFile:
    """Pairs by stem, differences by stem and last part of the tensor; stems as the file has them,
    without prefix. `unknown` are names that no role was found for."""

    name: str
    pairs: dict[str, Pair] = field(default_factory=dict)
    differences: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    path: Path = Path()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def stems(self) -> set[str]:
        return {*self.pairs, *(stem for stem, _ in self.differences), *map(bare, self.unknown)}


@dataclass(frozen=True, slots=True)
class _Declared:
    """Scaling that stands in a config and not in the tensors, as PEFT means it."""

    alpha: float | None = None
    rank_stabilised: bool = False
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def alpha_of(self, stem: str) -> float | None:
        for pattern, alpha in self.alpha_pattern.items():
            if stem == pattern or stem.endswith(f".{pattern}") or _matches(pattern, stem):
                return alpha
        return self.alpha


def _matches(pattern: str, stem: str) -> bool:
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", stem) is not None
    except re.error:
        return False


def read_lora(path: str | Path) -> LoraFile:
    """Raises CheckpointError for a damaged file, another kind of adapter, or no LoRA at all."""
    checkpoint = open_checkpoint(path)
    name = checkpoint.name
    _refuse_other_adapters(checkpoint)
    declared = _read_declared(checkpoint)
    parts = {stored: parse(stored) for stored in checkpoint.headers}
    known = {stored: part for stored, part in parts.items() if part is not None}
    _refuse_twice(known, name)
    tensors = checkpoint.tensors({stored: stored for stored in known})
    for stored, tensor in tensors.items():
        _check_numbers(stored, tensor, name)
    by_part = {part: (stored, tensors[stored]) for stored, part in known.items()}
    pairs, used = _read_pairs(by_part, declared, name)
    differences = {
        (part.stem, part.leaf): tensor
        for part, (_, tensor) in by_part.items()
        if part.role == "difference"
    }
    for part, (stored, tensor) in by_part.items():
        if part.role == "up_bias" and part.stem in pairs:
            bias, key = tensor.float() * pairs[part.stem].scale, (part.stem, "bias")
            differences[key] = bias + differences[key].float() if key in differences else bias
            used.add(stored)
    used |= {stored for part, (stored, _) in by_part.items() if part.role == "difference"}
    if not pairs and not differences:
        raise CheckpointError(
            f"{name} is not a LoRA this version knows: it holds "
            f"{preview(checkpoint.headers) or 'no tensors'}"
        )
    unknown = tuple(sorted(checkpoint.headers.keys() - used))
    source = Path(path)
    return LoraFile(name, pairs, differences, unknown, source, checkpoint.metadata)


def outline(checkpoint: Checkpoint) -> LoraFile:
    """Names and shapes alone, on ``meta``: of any file, without a check and without scales."""
    shapes = {
        part: torch.empty(checkpoint.headers[stored].shape, device="meta")
        for stored in checkpoint.headers
        if (part := parse(stored)) is not None
    }
    pairs = {}
    for part, up in shapes.items():
        down = shapes.get(Part(part.stem, "down"))
        if part.role == "up" and down is not None and up.ndim == down.ndim >= 2:
            shape = (up.shape[0], *down.shape[1:]) if down.ndim > 2 else None
            pairs[part.stem] = Pair(up.flatten(1), down.flatten(1), shape=shape)
    differences = {(p.stem, p.leaf): t for p, t in shapes.items() if p.role == "difference"}
    named = {"path": checkpoint.path, "metadata": checkpoint.metadata}
    return LoraFile(checkpoint.name, pairs, differences, **named)


def _refuse_other_adapters(checkpoint: Checkpoint) -> None:
    for mark, kind in OTHER_ADAPTERS:
        found = next((name for name in checkpoint.headers if mark.search(name)), None)
        if found is None:
            continue
        if found.endswith("oft_blocks") and len(checkpoint.headers[found].shape) == 4:
            kind = "BOFT"  # LyCORIS gives both the same name
        raise CheckpointError(
            f"{checkpoint.name} is a {kind} adapter, which this version does not apply (it holds "
            f"{found}); use a LoRA of up and down pairs"
        )


def _refuse_twice(parts: Mapping[str, Part], source: str) -> None:
    """Two prefixes or two adapters in one file would overwrite each other."""
    seen: dict[Part, str] = {}
    for stored, part in parts.items():
        if part in seen:
            raise CheckpointError(
                f"{source} names {part.stem} twice ({seen[part]} and {stored}); it holds two "
                "adapters: save them as two files"
            )
        seen[part] = stored


def _check_numbers(stored: str, tensor: Tensor, source: str) -> None:
    if not tensor.is_floating_point() and tensor.numel() > 1:  # alpha may be a whole number
        raise CheckpointError(
            f"{source}: {stored} is stored as {str(tensor.dtype).removeprefix('torch.')}; "
            "use a LoRA in bf16, fp16 or fp32"
        )
    if tensor.is_floating_point() and tensor.itemsize < 2:
        tensor = tensor.to(torch.bfloat16)  # fp8 has no order of its own
    # One pass without a mask: NaN spreads to both ends.
    if tensor.numel() and not all(math.isfinite(end) for end in torch.aminmax(tensor)):
        raise CheckpointError(
            f"{source}: {stored} is not finite (NaN or infinity); the file is damaged or its "
            "training failed: use another one"
        )


def _read_pairs(
    by_part: Mapping[Part, tuple[str, Tensor]], declared: _Declared, source: str
) -> tuple[dict[str, Pair], set[str]]:
    pairs: dict[str, Pair] = {}
    used: set[str] = set()
    for part, (stored, tensor) in by_part.items():
        if part.role not in ("up", "down"):
            continue
        other = by_part.get(Part(part.stem, "down" if part.role == "up" else "up"))
        if other is None:
            missing = "down (lora_down, lora_A)" if part.role == "up" else "up (lora_up, lora_B)"
            raise CheckpointError(
                f"{source} holds {stored} without its {missing} matrix; it is damaged: "
                "download it again"
            )
        used.add(stored)
        if part.role == "up":
            alpha = by_part.get(Part(part.stem, "alpha"))
            used |= {alpha[0]} if alpha else set()
            pairs[part.stem] = _make_pair(part.stem, tensor, other[1], alpha, declared, source)
    return pairs, used


def _make_pair(
    stem: str,
    up: Tensor,
    down: Tensor,
    alpha: tuple[str, Tensor] | None,
    declared: _Declared,
    source: str,
) -> Pair:
    flat = up.ndim == down.ndim >= 2 and up[0].numel() == up.shape[1]
    if not flat or up.shape[1] != down.shape[0] or not up.numel() or not down.numel():
        raise CheckpointError(
            f"{source}: the two matrices of {stem} do not fit together "
            f"(up {_sides(up)}, down {_sides(down)}); it is damaged: download it again"
        )
    shape = (up.shape[0], *down.shape[1:]) if down.ndim > 2 else None
    matrices = (up.flatten(1), down.flatten(1))
    if alpha is None:
        return Pair(*matrices, declared.alpha_of(stem), declared.rank_stabilised, shape)
    if alpha[1].numel() != 1:
        raise CheckpointError(f"{source}: {alpha[0]} holds {alpha[1].numel()} numbers, not one")
    # kohya's and LyCORIS's rule, also for rs_lora: there alpha is stored multiplied by sqrt(rank).
    return Pair(*matrices, float(alpha[1]), shape=shape)


def _sides(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "one number"


def _read_declared(checkpoint: Checkpoint) -> _Declared:
    """From the metadata diffusers writes, or PEFT's config beside the file."""
    text = checkpoint.metadata.get(DIFFUSERS_CONFIG)
    where = f"{checkpoint.name}: its metadata {DIFFUSERS_CONFIG}"
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    is_peft = checkpoint.path.is_dir() or checkpoint.path.stem == "adapter_model"
    if text is None and is_peft and (folder / PEFT_CONFIG).is_file():
        text, where = (folder / PEFT_CONFIG).read_text("utf-8", "replace"), PEFT_CONFIG
    if text is None:
        return _Declared()
    try:
        fields = json.loads(text)
        inside = {k.removeprefix("transformer."): v for k, v in fields.items()}
        if inside.get("use_dora"):
            raise CheckpointError(
                f"{checkpoint.name} is a DoRA adapter, which this version does not apply; "
                "use a LoRA of up and down pairs"
            )
        alpha = inside.get("lora_alpha")
        patterns = dict(inside.get("alpha_pattern") or {})
        return _Declared(
            None if alpha is None else float(alpha),
            bool(inside.get("use_rslora")),
            {bare(pattern): float(value) for pattern, value in patterns.items()},
        )
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{where} is not readable ({error}), and it decides how strong the LoRA is; "
            "download the file again"
        ) from error
