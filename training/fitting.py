"""The training loop that every stage uses: until the time is up, safe against bad steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .muon import Muon
from .progress import Average, Clock, Journal, cosine, is_finite
from .ranks import average_gradients, shared, start_equal
from .replay import forget_gradients

LEAST_STEPS = 2  # even where the time was used up before
SAVE_SECONDS = 45.0
NOTE_SECONDS = 5.0
MOST_BAD_STEPS = 50  # in a row


@dataclass(frozen=True, slots=True)
class Recipe:
    """Optimiser settings of one stage."""

    lr: float
    matrix_lr: float | None = None  # of Muon, for the matrices of blocks; None is AdamW throughout
    warmup: int = 200
    decay: float = 0.999  # of the averages
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0


@dataclass(slots=True, eq=False)
class Fit:
    """What a finished training knows."""

    averages: list[nn.Module]
    steps: int = 0
    bad_steps: int = 0
    losses: list[float] = field(default_factory=list)


def fit(
    stage: str,
    modules: Sequence[nn.Module],
    loss_at: Callable[[float], Tensor],
    recipe: Recipe,
    clock: Clock,
    journal: Journal,
    save: Callable[[list[nn.Module]], None],
) -> Fit:
    """Minimise `loss_at(fraction of the time)`; `save` gets the averages every SAVE_SECONDS.

    A loss that is detached has left its gradients in the parameters already.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    start_equal(parameters)
    averages = [Average(module, recipe.decay) for module in modules]
    result = Fit([average.module for average in averages])
    optimizers = make_optimizers(modules, recipe)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    full_rates = [group["lr"] for group in groups]
    saved = noted = time.monotonic()
    noted_step, bad_in_a_row = 0, 0
    while (fraction := shared(clock.fraction)) < 1 or result.steps < LEAST_STEPS:
        share = cosine(fraction, result.steps, recipe.warmup)
        for group, rate in zip(groups, full_rates, strict=True):
            group["lr"] = rate * share
        loss = loss_at(fraction)
        if loss.requires_grad:
            loss.backward()
        loss = average_gradients(parameters, loss)
        norm = nn.utils.clip_grad_norm_(parameters, recipe.clip)
        if is_finite(loss.detach() + norm):
            for optimizer in optimizers:
                optimizer.step()
            for average in averages:
                average.update()
            result.losses.append(float(loss.detach()))
            bad_in_a_row = 0
        else:
            result.bad_steps += 1
            bad_in_a_row += 1
            if bad_in_a_row > MOST_BAD_STEPS:
                raise RuntimeError(f"{stage}: the loss is not finite any more")
        forget_gradients(parameters)
        result.steps += 1
        now = time.monotonic()
        if now - noted > NOTE_SECONDS:
            rate = (result.steps - noted_step) / (now - noted)
            _note(journal, stage, result, rate, noted_step)
            noted, noted_step = now, result.steps
        if now - saved > SAVE_SECONDS:
            save(result.averages)
            saved = time.monotonic()
    _note(journal, stage, result, result.steps / clock.elapsed, noted_step)
    save(result.averages)
    return result


def make_optimizers(modules: Sequence[nn.Module], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices of blocks and AdamW for the rest."""
    matrices, rest = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                is_matrix = parameter.ndim == 2 and name.startswith("blocks.")
                use_muon = recipe.matrix_lr is not None and is_matrix
                (matrices if use_muon else rest).append(parameter)
    adam = torch.optim.AdamW(
        rest,
        lr=recipe.lr,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=rest[0].is_cuda,
    )
    if recipe.matrix_lr is None:
        return [adam]
    return [adam, Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay)]


def _note(journal: Journal, stage: str, result: Fit, rate: float, since: int) -> None:
    recent = result.losses[-max(1, min(result.steps - since, len(result.losses))) :]
    journal.note(
        stage,
        step=result.steps,
        loss=sum(recent) / max(1, len(recent)),
        steps_per_second=round(rate, 2),
        bad_steps=result.bad_steps,
    )
