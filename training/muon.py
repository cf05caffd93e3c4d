"""Muon: momentum whose matrices are made orthogonal before they are applied.

K. Jordan, https://kellerjordan.github.io/posts/muon/, with the step size of J. Liu et al.,
https://arxiv.org/abs/2502.16982, which gives each entry the size that AdamW's would have.
`torch.optim.Muon` does the same one matrix at a time, in a thousand small launches for this
model; here matrices of one shape go together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
ENTRY_SIZE = 0.2  # root mean square of AdamW's steps, in learning rates
LEAST_NORM = 1e-7


class Muon(Optimizer):
    """For matrices only; Nesterov momentum, decoupled weight decay."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for parameter in self._parameters():
            if parameter.ndim != 2:
                raise ValueError(f"Muon takes matrices and got {tuple(parameter.shape)}")

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._step_together(parameters, group["lr"], group)

    def _step_together(self, parameters: list[Tensor], lr: float, group: dict[str, float]) -> None:
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        updates = orthogonalised(torch.stack(ahead)).to(parameters[0].dtype)
        rate = lr * ENTRY_SIZE * max(parameters[0].shape) ** 0.5
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-rate)


def orthogonalised(matrices_NMK: Tensor) -> Tensor:
    """Each matrix with its singular values near 1, bfloat16, by five Newton-Schulz steps."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices_NMK.shape[1] > matrices_NMK.shape[2]
    x = matrices_NMK.bfloat16()
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(LEAST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
