"""A distillation LoRA of two checkpoints: `python -m training.extract BASE STUDENT OUT`.

Layout of the published SVD LoRAs: `diffusion_model.` + official name, then `.lora_up.weight` and
`.lora_down.weight` for matrices, `.diff` for other weights, `.diff_b` for biases, `.diff_m` for
modulation. A matrix whose pair would not be smaller than itself stays whole, as `.diff`.
Low-rank approximation by singular values: https://doi.org/10.1007/BF02288367
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightx2v_core.checkpoint.detect import detect
from lightx2v_core.checkpoint.layouts import official_names
from lightx2v_core.checkpoint.source import Checkpoint, open_checkpoint
from lightx2v_core.quant.schemes import PLAIN

PREFIX = "diffusion_model."
SHOWN_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
UNCHANGED = 1e-8
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(slots=True)
class Extraction:
    """The tensors of the LoRA, and what the ranks of its matrices leave out."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    spectra: list[Tensor] = field(default_factory=list)  # singular values of each matrix
    missed: float = 0.0  # squared, of everything, as written
    total: float = 0.0  # squared norm of all differences

    def error_at(self, rank: int) -> float:
        """Relative error of all matrices together when each keeps `rank` singular values."""
        left = sum(float(values[rank:].square().sum()) for values in self.spectra)
        whole = sum(float(values.square().sum()) for values in self.spectra)
        return math.sqrt(left / whole) if whole else 0.0

    @property
    def error(self) -> float:
        """Relative error of the whole difference, rounding of the file included."""
        return math.sqrt(self.missed / self.total) if self.total else 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.extract", description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("student", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of the file")
    parser.add_argument(
        "--whole-below",
        type=int,
        default=0,
        metavar="N",
        help="matrices of fewer elements stay whole; the published files were made with 1000000",
    )
    options = parser.parse_args(arguments)
    base, student = Weights(options.base), Weights(options.student)
    made = extract(base, student, options.rank, DTYPES[options.dtype], options.whole_below)
    save_lora(options.out, made.tensors, student.metadata | {"lightx2v.base": options.base.stem})
    for rank in (r for r in SHOWN_RANKS if r <= max(map(len, made.spectra), default=0)):
        print(f"rank {rank:4d}: relative error of the matrices {made.error_at(rank):.4f}")
    print(
        f"{options.out}: rank {options.rank}, {len(made.tensors)} tensors, "
        f"{options.out.stat().st_size / 1e6:.2f} MB, "
        f"relative error of the difference as written {made.error:.4f}"
    )


class Weights:
    """The tensors of a checkpoint under official names, read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._checkpoint: Checkpoint = open_checkpoint(path)
        info = detect(self._checkpoint)
        if info.refusal or info.scheme not in PLAIN:
            cause = info.refusal or f"its weights are {info.scheme}"
            raise SystemExit(f"{path} cannot be compared: {cause}; give a {'/'.join(PLAIN)} file")
        _, self.names = official_names(self._checkpoint.headers) or ("", {})

    def __getitem__(self, name: str) -> Tensor:
        stored = self.names[name]
        return self._checkpoint.tensors({name: stored})[name]

    @property
    def metadata(self) -> dict[str, str]:
        """Family and task, as far as the file says."""
        known = self._checkpoint.metadata
        return {key: known[key] for key in ("lightx2v.family", "lightx2v.task") if key in known}


def extract(
    base: Weights, student: Weights, rank: int, dtype: torch.dtype, whole_below: int = 0
) -> Extraction:
    """Every tensor both have and that differs, in float32 on the fastest device there is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = Extraction()
    for name in sorted(student.names.keys() & base.names.keys()):
        target, source = student[name], base[name]
        if target.shape != source.shape:
            shapes = f"{tuple(source.shape)} and {tuple(target.shape)}"
            raise SystemExit(f"{name} is {shapes}: the two files are not of one model")
        difference = target.to(device).float() - source.to(device).float()
        if difference.abs().max() <= UNCHANGED:
            continue
        stem, ending = _ending(name)
        stored = difference.to(dtype)
        if name.endswith(".weight") and _is_worth_a_pair(difference, rank, whole_below):
            down, up, values = split(difference, rank, dtype)
            result.spectra.append(values.cpu())
            result.tensors[f"{PREFIX}{stem}.lora_down.weight"] = down.cpu()
            result.tensors[f"{PREFIX}{stem}.lora_up.weight"] = up.cpu()
            stored = up.float() @ down.float()
        else:
            result.tensors[f"{PREFIX}{stem}{ending}"] = stored.cpu()
        result.missed += float((difference - stored.float()).square().sum())
        result.total += float(difference.square().sum())
    return result


def _is_worth_a_pair(difference: Tensor, rank: int, whole_below: int) -> bool:
    """Only matrices, and only where the pair is smaller."""
    elements = difference.numel()
    is_smaller = rank * sum(difference.shape) < elements
    return difference.ndim == 2 and is_smaller and elements >= whole_below


def split(difference_MK: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(down RK, up MR, all singular values); both take the root of the values they keep."""
    up, values, down = torch.linalg.svd(difference_MK, full_matrices=False)
    roots = values[:rank].sqrt()
    pair = (roots[:, None] * down[:rank], up[:, :rank] * roots)
    return pair[0].to(dtype).contiguous(), pair[1].to(dtype).contiguous(), values


def _ending(name: str) -> tuple[str, str]:
    """(module, ending of the published layout) for a whole difference."""
    stem, _, leaf = name.rpartition(".")
    endings = {"weight": ".diff", "bias": ".diff_b", "modulation": ".diff_m"}
    if leaf not in endings:
        raise SystemExit(f"{name} differs and the LoRA layout has no place for it")
    return stem, endings[leaf]


def save_lora(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    ours = {"format": "pt", "modelspec.title": path.stem, "modelspec.license": "Apache-2.0"}
    save_file(dict(tensors), part, metadata=ours | dict(metadata))
    part.chmod(0o644)
    part.replace(path)


if __name__ == "__main__":
    main()
