"""A family with the demo's sizes and random weights: what compares two programs on it, not what the
models have learnt, does not change when the demo is trained anew."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightx2v_core.wan.model import WanModel
from lightx2v_core.wan.vae import VaeConfig, WanVae
from tests.conftest import fill
from tests.layouts import Files
from training.files import FAMILIES
from training.sizes import DEMO
from training.text import NEARNESS, bytes_tensor, new_encoder, official_tensors
from training.vocabulary import CaptionRows


def random_files(folder: Path, pieces: bytes) -> Files:
    """Each file written when it is asked for first."""
    return cache(lambda part: write_random_demo(part, folder, pieces))


def write_random_demo(part: str, folder: Path, pieces: bytes) -> Path:
    """t2v, i2v, vae or text in float16; `pieces` is a SentencePiece model."""
    metadata = {"lightx2v.release": "demo"}
    if part in FAMILIES:
        tensors = fill(WanModel(DEMO.transformer(part == "i2v"))).state_dict()
        metadata |= {"lightx2v.task": part, "lightx2v.family": FAMILIES[part]}
    elif part == "vae":
        tensors = fill(WanVae(VaeConfig(DEMO.vae_dim, DEMO.vae_dim))).state_dict()
    else:
        encoder = new_encoder(DEMO, pieces, CaptionRows(pieces).size, seed=1).transformer
        tensors = official_tensors(encoder) | {"spiece_model": bytes_tensor(pieces)}
        for name in tensors:  # as small as when another program's latents of it were recorded
            if "pos_embedding" in name:
                tensors[name] = tensors[name] * (DEMO.text_dim**-0.5 / NEARNESS)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"random_{part}.safetensors"
    save_file({name: _half(tensor) for name, tensor in tensors.items()}, path, metadata=metadata)
    return path


def _half(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype == torch.uint8 else tensor.half()).contiguous()
