"""Which device and number format to compute on. Asked at use, never at import."""

from __future__ import annotations

import torch

from .errors import CapabilityError


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
