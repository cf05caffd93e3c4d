"""The plain rows of attention and matmul, put in place of fast ones that broke a latent."""

from __future__ import annotations

from collections.abc import Sequence

from .ops.attention import name_of, sdpa
from .quant.linear import QuantisedLinear
from .sampling.loop import Rescue
from .wan.model import WanModel


def describe_rows(model: WanModel) -> str:
    """What computes this model: attention sdpa, matmul fp8_row."""
    rows = sorted(
        {
            getattr(linear.multiply, "__name__", "unknown")
            for linear in model.modules()
            if isinstance(linear, QuantisedLinear) and linear.multiply is not None
        }
    )
    return f"attention {name_of(model.attend)}" + (f", matmul {', '.join(rows)}" if rows else "")


def use_plain_rows(model: WanModel) -> bool:
    """Attention by PyTorch's own, weights dequantised, from now on; whether that changed anything.

    Both stay until the model is loaded again: what overflowed once would do so again.
    """
    changed = model.attend is not sdpa
    model.attend = sdpa
    for linear in model.modules():
        if isinstance(linear, QuantisedLinear) and linear.multiply is not None:
            linear.multiply, changed = None, True
    return changed


def rescue_of(models: Sequence[WanModel]) -> Rescue:
    """For the core's loop."""

    def switch() -> bool:
        changed = [use_plain_rows(model) for model in models]
        return any(changed)

    return Rescue(describe_rows(models[0]), switch)
