"""A loss and its gradients recorded once as a CUDA graph and replayed: the same kernels on the same
memory, without the time a processor needs to launch a thousand of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

Loss = Callable[[], Tensor]
WARM_UPS = 3  # compilation and tuning happen here


class Replay:
    """Call it for the loss; the gradients are then in the parameters."""

    def __init__(self, loss_of: Loss, parameters: Sequence[Tensor], rng: Generator) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                forget_gradients(parameters)
                loss_of().backward()
        torch.cuda.current_stream().wait_stream(side)
        forget_gradients(parameters)
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(rng)
        # Other threads may use the card meanwhile: NCCL's watchdog does.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._loss = loss_of()
            self._loss.backward()
        self._parameters = parameters
        self._gradients = [parameter.grad for parameter in parameters]

    def __call__(self) -> Tensor:
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._graph.replay()
        return self._loss.detach()


class Plain:
    """The same interface without a graph, for devices that have none."""

    def __init__(self, loss_of: Loss) -> None:
        self._loss_of = loss_of

    def __call__(self) -> Tensor:
        loss = self._loss_of()
        loss.backward()
        return loss.detach()


def gradients_of(loss_of: Loss, parameters: Sequence[Tensor], rng: Generator) -> Replay | Plain:
    """Recorded on CUDA, plain elsewhere."""
    if parameters[0].is_cuda:
        return Replay(loss_of, parameters, rng)
    return Plain(loss_of)


def forget_gradients(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
