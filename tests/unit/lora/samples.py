"""What the LoRA tests share: a folder for files, and small LoRAs of one or a few layers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightx2v_core.wan.model import WanModel
from tests.conftest import tiny_inputs


def written(
    folder: Path, tensors: dict[str, Tensor], name: str = "lora.safetensors", **metadata: str
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {k: v.contiguous().clone() for k, v in tensors.items()}
    save_file(contiguous, folder / name, metadata=metadata or None)
    return folder / name


@torch.inference_mode()
def run(model: WanModel) -> Tensor:
    return model(**tiny_inputs(model.config, batch=1))


def pair(stem: str, up: int = 256, down: int = 256, rank: int = 4, seed: int = 1) -> dict:
    """One layer's matrices under diffusion_model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"diffusion_model.{stem}.lora_up.weight": 0.1 * torch.randn(up, rank, generator=generator),
        f"diffusion_model.{stem}.lora_down.weight": 0.1
        * torch.randn(rank, down, generator=generator),
    }


def every_kind(model: WanModel, seed: int = 2) -> dict[str, Tensor]:
    """Pairs of all block linears, and differences of every kind of tensor that has none."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}
    tensors = {}
    for number, (name, weight) in enumerate(model.state_dict().items()):
        stem, _, leaf = name.rpartition(".")
        if name.startswith("blocks.") and leaf == "weight" and weight.ndim == 2:
            tensors |= pair(stem, *weight.shape, seed=seed + number)
        elif "norm" in name or leaf in ("bias", "modulation") or weight.ndim == 5:
            added = 0.05 * torch.randn(weight.shape, generator=generator)
            tensors[f"diffusion_model.{stem}.{leaves[leaf]}"] = added
    return tensors
