"""Distribution matching distillation with self-rollout: the losses, for any three networks.

The student is run as it will be used, up to a random one of its steps; where it ends, a frozen
score of the data and a score trained on the student's own clips say in which direction its clips
look too much like the student's. T. Yin et al., "Improved Distribution Matching Distillation",
https://arxiv.org/abs/2405.14867; X. Huang et al., "Self Forcing", https://arxiv.org/abs/2506.08009.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .denoising import STUDENT_SIGMAS, per_clip, shift_sigmas
from .text import TextStates

LEAST_SIGMA, MOST_SIGMA = 0.02, 0.98  # where the scores are compared
LEAST_NORMALISER = 1e-4
ROLLOUTS = ("euler", "renoise")
STEPS = len(STUDENT_SIGMAS) - 1

# x BCTHW, sigma B, text, image condition BCTHW or None -> velocity BCTHW
Velocity = Callable[[Tensor, Tensor, TextStates, "Tensor | None"], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Three networks. In a full-parameter run they are three models, in a LoRA run one model
    whose adapters are switched by whoever calls."""

    student: Velocity
    fake: Velocity
    real: Velocity  # with guidance already in it


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What clips are to be made of."""

    noise_BCTHW: Tensor
    text: TextStates
    image_BCTHW: Tensor | None
    clip_BSE: Tensor | None = None  # picture features for whoever makes the `Scores`


def roll_out(
    student: Velocity, question: Question, exit_step: int, rollout: str, rng: Generator
) -> Tensor:
    """The student's clean estimate at `exit_step`; gradients flow through that step alone.

    rollout "euler" follows the velocity between steps, "renoise" adds fresh noise to each
    estimate. BCTHW float32.
    """
    if rollout not in ROLLOUTS:
        raise ValueError(f"rollout {rollout!r} is none of {', '.join(ROLLOUTS)}")
    x = question.noise_BCTHW
    for step in range(exit_step):
        sigma, to = STUDENT_SIGMAS[step], STUDENT_SIGMAS[step + 1]
        with torch.no_grad():
            velocity = student(x, sigma_row(x, sigma), question.text, question.image_BCTHW)
        if rollout == "euler":
            x = x + (to - sigma) * velocity
        else:
            fresh = torch.randn(x.shape, generator=rng, device=x.device)
            x = (1 - to) * (x - sigma * velocity) + to * fresh
    sigma = STUDENT_SIGMAS[exit_step]
    return x - sigma * student(x, sigma_row(x, sigma), question.text, question.image_BCTHW)


def student_loss(scores: Scores, clean_BCTHW: Tensor, question: Question, rng: Generator) -> Tensor:
    """Its gradient with respect to `clean` is (fake estimate - real estimate) / normaliser, over
    the number of values; its value says how far the two scores are apart."""
    with torch.no_grad():
        noisy, _, sigma_B = renoised(clean_BCTHW, rng)
        sigma = per_clip(sigma_B)
        condition = (question.text, question.image_BCTHW)
        fake = noisy - sigma * scores.fake(noisy, sigma_B, *condition)
        real = noisy - sigma * scores.real(noisy, sigma_B, *condition)
        normaliser = (clean_BCTHW - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        direction = (fake - real) / normaliser.clamp_min(LEAST_NORMALISER)
        target = clean_BCTHW - torch.nan_to_num(direction)
    return 0.5 * (clean_BCTHW - target).square().mean()


def critic_loss(scores: Scores, clean_BCTHW: Tensor, question: Question, rng: Generator) -> Tensor:
    """Flow matching of the fake score on the student's clips."""
    noisy, noise, sigma_B = renoised(clean_BCTHW, rng)
    velocity = scores.fake(noisy, sigma_B, question.text, question.image_BCTHW)
    return (velocity - (noise - clean_BCTHW)).square().mean()


def renoised(clean_BCTHW: Tensor, rng: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(noisy clips, the noise, sigmas B): shift 5 of a uniform draw, away from both ends."""
    device = clean_BCTHW.device
    drawn_B = torch.rand(len(clean_BCTHW), generator=rng, device=device)
    sigma_B = shift_sigmas(drawn_B).clamp(LEAST_SIGMA, MOST_SIGMA)
    noise = torch.randn(clean_BCTHW.shape, generator=rng, device=device)
    sigma = per_clip(sigma_B)
    return (1 - sigma) * clean_BCTHW + sigma * noise, noise, sigma_B


def sigma_row(x: Tensor, sigma: float) -> Tensor:
    return torch.full((len(x),), sigma, device=x.device)
