"""Several processes that train one model: `torchrun --nproc-per-node N -m training.run ...`.

Each draws clips of its own; gradients are averaged before every step, so weights stay equal. One
process alone, started without torchrun, does none of this.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

SEED_STRIDE = 1_000_003  # between the draws of two ranks; stages add thousands


def join() -> int:
    """This process's rank, 0 when alone. Binds it to its GPU where there is one."""
    if "WORLD_SIZE" not in os.environ:
        return 0
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # gloo carries the numbers of the processor, without waiting for the card.
    dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo")
    return dist.get_rank()


def leave() -> None:
    """At the end of the program, once every rank has come here: none closes its connections while
    another still reads."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(()))
        dist.destroy_process_group()


def shared(value: float) -> float:
    """The first rank's number: clocks differ, and decisions must not."""
    if not dist.is_initialized():
        return value
    told = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(told, src=0)
    return float(told)


def start_equal(parameters: Sequence[Tensor]) -> None:
    """In place: the first rank's values."""
    if dist.is_initialized():
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)


def average_gradients(parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
    """Gradients in place, over all ranks; the mean loss."""
    if not dist.is_initialized():
        return loss
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([loss.detach().float().reshape(1), *(g.flatten() for g in gradients)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat[1:].split([gradient.numel() for gradient in gradients])
    shaped = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
    torch._foreach_copy_(gradients, shaped)
    return flat[0]
