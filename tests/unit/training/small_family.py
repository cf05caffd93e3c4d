"""A family of tiny files under the names that training gives them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Generator

from lightx2v_core.wan.model import WanModel
from tests.conftest import fill
from training.autoencoder import new_vae
from training.extract import main as extract_main
from training.family import METRICS
from training.files import STUDENTS, TEACHERS, VAE, save_weights
from training.sizes import SMOKE
from training.text import new_encoder, save_encoder
from training.vocabulary import CaptionRows, learn_pieces


def write_family(folder: Path) -> Path:
    """VAE, text encoder, bases, and students that differ in every tensor; of the plain world."""
    rows = CaptionRows(learn_pieces(seed=3, count=300))
    text = new_encoder(SMOKE, rows.model, rows.size, seed=1).transformer
    save_encoder(folder, text, rows.model)
    save_weights(folder / VAE, new_vae(SMOKE, seed=1).state_dict())
    for task in ("t2v", "i2v"):
        base = fill(WanModel(SMOKE.transformer(task == "i2v"))).state_dict()
        save_weights(folder / TEACHERS[task], base, task)
        rng = Generator().manual_seed(5)
        changed = {n: t + 0.02 * torch.randn(t.shape, generator=rng) for n, t in base.items()}
        save_weights(folder / STUDENTS[task], changed, task)
    (folder / METRICS).write_text('{"world": "plain"}')
    return folder


def extracted(folder: Path, rank: int, dtype: str = "fp32", name: str | None = None) -> Path:
    """The LoRA of the text-to-video student."""
    out = folder / (name or f"lora_{rank}_{dtype}.safetensors")
    files = (folder / TEACHERS["t2v"], folder / STUDENTS["t2v"], out)
    extract_main([*map(str, files), "--rank", str(rank), "--dtype", dtype])
    return out
