"""Which device and number format to compute on. Asked at use, never at import."""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

import torch

from .errors import CapabilityError


class Card(NamedTuple):
    """What decides which kernels can run: the kind of device and the software on it."""

    kind: str  # cuda, rocm, mps, cpu, or what PyTorch calls another device
    capability: tuple[int, int] = (0, 0)  # CUDA compute capability
    torch: tuple[int, int] = (0, 0)
    windows: bool = False


def describe_card(device: torch.device | str) -> Card:
    """The Card behind `device`. Asking about a CUDA device initialises CUDA."""
    device = torch.device(device)
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    version, windows = (int(major), int(minor)), sys.platform == "win32"
    if device.type != "cuda":
        return Card(device.type, (0, 0), version, windows)
    kind = "cuda" if torch.version.hip is None else "rocm"
    return Card(kind, torch.cuda.get_device_capability(device), version, windows)


def select_device(name: str = "auto") -> torch.device:
    """cuda, else mps, else cpu. A named device is honoured or refused."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CapabilityError(f"device {name!r} is unknown; use auto, cuda, mps or cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CapabilityError("device 'cuda' cannot be used: PyTorch sees no GPU; use cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise CapabilityError("device 'mps' cannot be used: PyTorch sees no Apple GPU; use cpu")
    return device


def select_dtype(device: torch.device) -> torch.dtype:
    """What blocks compute in: float32 on a CPU, bfloat16 where the card has it, else float16."""
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float16
