"""Shapes of the weights that codes stand for: what a LoRA must fit, however they are packed."""

from __future__ import annotations

from torch import nn


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape by tensor name, of every tensor of `model`; linears as (outputs, inputs)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if hasattr(module, "out_features"):
            shapes[f"{name}.weight"] = (module.out_features, module.in_features)
    return shapes
