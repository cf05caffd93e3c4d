"""Puts the tensors of a file into a module built on meta: all of them, or a sentence saying why.

Nothing is copied: a memory-mapped tensor stays one.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import CheckpointError, preview


def place(module: nn.Module, tensors: Mapping[str, Tensor], source: str, what: str) -> None:
    """Assign without copying. `tensors` carry the module's own names, shapes are compared."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if missing := expected.keys() - tensors.keys():
        raise CheckpointError(
            f"{source} is not a whole {what}: {len(missing)} of {len(expected)} tensors are "
            f"missing ({preview(missing)}); download the file again"
        )
    if unknown := tensors.keys() - expected.keys():
        raise CheckpointError(
            f"{source} holds {len(unknown)} tensors that no {what} has ({preview(unknown)}); "
            f"give the file of a {what} alone"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)}, the other tensors of "
                f"this {what} need {shape}; download the file again"
            )
    for name, _ in module.named_parameters():
        if not tensors[name].is_floating_point():
            raise CheckpointError(
                f"{source}: {name} is stored as {tensors[name].dtype}, and this {what} needs "
                "floating-point numbers there; download the file again"
            )
    module.load_state_dict(dict(tensors), assign=True)
    module.requires_grad_(False).eval()
