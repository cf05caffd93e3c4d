"""Trainable LoRA sets on one frozen model: a student, a fake score, and the teacher without any."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from lightx2v_core.lora.branches import Branch, set_lora
from lightx2v_core.wan.model import WanModel

TARGETS = (
    *(f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"),
    "ffn.0",
    "ffn.2",
)
CLIP_TARGETS = ("cross_attn.k_img", "cross_attn.v_img")  # of models with a CLIP branch


class Adapters(nn.Module):
    """One LoRA set for the linears of blocks: down starts random, up at zero. Float32.

    `attach` puts it on the frozen base, the function `detach` takes any off again.
    E. Hu et al., https://arxiv.org/abs/2106.09685, with gain alpha / rank and alpha = rank.
    """

    def __init__(self, model: WanModel, rank: int, seed: int) -> None:
        super().__init__()
        rng = Generator().manual_seed(seed)
        device = model.head.head.weight.device
        self.names: list[str] = []
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name, linear in linears_of(model):
            rows, columns = linear.weight.shape
            down = torch.randn(rank, columns, generator=rng) / math.sqrt(columns)
            self.names.append(name)
            self.down.append(nn.Parameter(down.to(device)))
            self.up.append(nn.Parameter(torch.zeros(rows, rank, device=device)))

    def attach(self, model: WanModel) -> None:
        parts = zip(self.names, self.down, self.up, strict=True)
        set_lora(model, {name: (Branch(down, up, 1.0),) for name, down, up in parts})

    def published(self) -> dict[str, Tensor]:
        """Under the names of published Wan LoRA files, float16."""
        tensors = {}
        for name, down, up in zip(self.names, self.down, self.up, strict=True):
            tensors[f"diffusion_model.{name}.lora_down.weight"] = _half(down)
            tensors[f"diffusion_model.{name}.lora_up.weight"] = _half(up)
        return tensors

    def save(self, path: Path, title: str, task: str = "t2v") -> None:
        """Whole or not at all."""
        part = path.with_suffix(".part")
        metadata = {
            "format": "pt",
            "lightx2v.task": task,
            "modelspec.title": title,
            "modelspec.license": "Apache-2.0",
        }
        save_file(self.published(), part, metadata=metadata)
        part.replace(path)


def detach(model: WanModel) -> None:
    set_lora(model, {})


def linears_of(model: WanModel) -> Iterable[tuple[str, nn.Linear]]:
    """The linears that LoRA training touches, in the order of the blocks."""
    targets = (*TARGETS, *(CLIP_TARGETS if model.config.clip_tokens else ()))
    for index, block in enumerate(model.blocks):
        for target in targets:
            linear = block.get_submodule(target)
            assert isinstance(linear, nn.Linear), f"{target} is quantised"
            yield f"blocks.{index}.{target}", linear


def _half(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().half().contiguous()
