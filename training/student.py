"""Stages `t2v-student` and `i2v-student`: the teacher's guided path, walked in four steps.

The teacher's probability-flow path is sampled finely and kept at the student's four sigmas. At each
of them the student learns the chord to the next, so that four Euler steps end where the teacher's
path does. Later it also starts from where its own steps lead and aims back at the path.
ODE regression as a start of distillation: https://arxiv.org/abs/2412.07772
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn

from .bank import bank_of
from .context import Context
from .denoising import STUDENT_SIGMAS, Denoiser, path_sigmas, per_clip
from .exam import load_judges, make_exam, note_scores, show_clips, sit_exam
from .files import STUDENTS, TEACHERS, find, read_transformer, save_weights
from .fitting import Recipe, fit
from .progress import Clock
from .replay import gradients_of
from .text import TextStates, empty_rows, encode_rows

PATH_PART = 0.38  # of the time, for the teacher's paths
OWN_FROM = 0.35  # of the rest; from here on half of the batches start from the student's own states
STEP_SHARES = (0.15, 0.20, 0.25, 0.40)  # how often each of the four steps is trained
SOFTNESS = 0.1  # below this an error counts squared, above it by its size
RECIPE = Recipe(lr=2.5e-4, matrix_lr=5e-4, warmup=50, decay=0.995)


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    """States at the student's sigmas, float16, and the conditions that led there."""

    states_KNCTHW: Tensor  # K = 5: noise, three in between, clean
    text: TextStates  # N rows, float16
    image_NCTHW: Tensor | None

    def __len__(self) -> int:
        return self.states_KNCTHW.shape[1]


def train_student(context: Context, task: str, minutes: float) -> None:
    clock = Clock(minutes, reserve=10)
    vae, text = load_judges(context)
    path = find(TEACHERS[task], context.out, context.source)
    teacher = read_transformer(path, context.sizes, task == "i2v").to(context.device)
    denoiser = Denoiser(teacher, context.dtype, context.compiles)
    paths = walk_paths(context, task, denoiser, text, Clock(minutes * PATH_PART, reserve=1))
    student = read_transformer(path, context.sizes, task == "i2v").to(context.device)
    walker = Denoiser(student, context.dtype, context.compiles)
    rng = Generator(context.device).manual_seed(context.draws + 5000)
    picks = Generator().manual_seed(context.seed + 5001)
    parameters, batch = list(student.parameters()), context.sizes.student_batch
    from_path = gradients_of(lambda: chord_loss(walker, paths, batch, False, rng), parameters, rng)
    from_own = gradients_of(lambda: chord_loss(walker, paths, batch, True, rng), parameters, rng)

    def loss_at(fraction: float) -> Tensor:
        own = fraction > OWN_FROM and float(torch.rand((), generator=picks)) < 0.5
        return from_own() if own else from_path()

    def save(averages: list[nn.Module]) -> None:
        save_weights(context.out / STUDENTS[task], averages[0].state_dict(), task)

    name = f"{task}-student"
    fit(name, [student], loss_at, RECIPE, clock, context.journal, save)
    exam = make_exam(context, task, context.sizes.exam_clips, vae, text)
    model = read_transformer(context.out / STUDENTS[task], context.sizes, task == "i2v")
    judged = Denoiser(model.to(context.device).eval(), context.dtype)
    scores, clips = sit_exam(context, exam, judged, vae)
    note_scores(context, f"{task} student, 4 steps", scores)
    show_clips(context, task, exam, {"student, 4 steps": clips}, f"sheet_student_{task}.png")


@torch.no_grad()
def walk_paths(
    context: Context, task: str, denoiser: Denoiser, text: nn.Module, clock: Clock
) -> Paths:
    """As many of the teacher's paths as the time allows, at least two batches."""
    sizes, bank = context.sizes, bank_of(context)
    if bank.states_NWSE is None:
        bank = context.bank = bank.with_states(text)
    rng = Generator(context.device).manual_seed(context.draws + 4000)
    sigmas = path_sigmas(sizes.teacher_steps)
    quarter = sizes.teacher_steps // 4
    empty = encode_rows(text, empty_rows(1, context.device, context.world)).expanded(
        sizes.path_batch
    )
    states, texts, images = [], [], []
    while len(states) < 2 or not clock.is_over:
        batch = bank.sample(sizes.path_batch, rng, with_image=task == "i2v")
        assert batch.text is not None, "the bank's captions are encoded"
        noise = torch.randn(batch.latent_BCTHW.shape, generator=rng, device=context.device)
        x, kept = noise, [noise.half()]
        for step, (sigma, to) in enumerate(pairwise(sigmas), start=1):
            sigma_B = torch.full((len(x),), sigma, device=x.device)
            both = (batch.text, empty)
            x = x + (to - sigma) * denoiser.guided(x, sigma_B, both, batch.image_BCTHW, context.cfg)
            if step % quarter == 0:
                kept.append(x.half())
        states.append(torch.stack(kept))
        texts.append(batch.text.half())
        if batch.image_BCTHW is not None:
            images.append(batch.image_BCTHW.half())
    joined = TextStates(
        torch.cat([t.states_BSE for t in texts]), torch.cat([t.bias_BS for t in texts])
    )
    paths = Paths(torch.cat(states, dim=1), joined, torch.cat(images) if images else None)
    bad = int((~paths.states_KNCTHW[-1].flatten(1).isfinite().all(dim=1)).sum())
    if bad:
        raise RuntimeError(f"{bad} of {len(paths)} paths of the teacher are not finite")
    context.journal.note(
        f"{task}-student",
        paths=len(paths),
        seconds=round(clock.elapsed, 1),
        final_std=float(paths.states_KNCTHW[-1][:256].float().std()),
    )
    return paths


def chord_loss(
    walker: Denoiser,
    paths: Paths,
    count: int,
    own: bool,
    rng: Generator,
    shares: Sequence[float] = STEP_SHARES,
) -> Tensor:
    """How far one Euler step from a state on the path (or the student's own) misses the next.

    `shares` says how often each step is taken.
    """
    device = paths.states_KNCTHW.device
    rows = torch.randint(len(paths), (count,), generator=rng, device=device)
    step_B = torch.multinomial(
        numbers(tuple(shares), device), count, replacement=True, generator=rng
    )
    image = None if paths.image_NCTHW is None else paths.image_NCTHW[rows].float()
    states = paths.text[rows].float()
    if own:
        x = own_states(walker, paths.states_KNCTHW[0, rows].float(), step_B, states, image)
    else:
        x = paths.states_KNCTHW[step_B, rows].float()
    sigmas = numbers(STUDENT_SIGMAS, device)
    sigma_B = sigmas[step_B]
    drop = per_clip(sigma_B - sigmas[step_B + 1])
    wanted = (x - paths.states_KNCTHW[step_B + 1, rows].float()) / drop
    return softened(walker(x, sigma_B, states, image) - wanted)


def softened(error: Tensor) -> Tensor:
    """Mean of errors, squared below SOFTNESS and by size above."""
    return ((error.square() + SOFTNESS**2).sqrt() - SOFTNESS).mean()


@torch.no_grad()
def own_states(
    walker: Denoiser,
    noise_BCTHW: Tensor,
    step_B: Tensor,
    text: TextStates,
    image_BCTHW: Tensor | None,
) -> Tensor:
    """Where the student's own Euler steps have led each clip before its step `step_B`."""
    x = result = noise_BCTHW
    for step in range(len(STUDENT_SIGMAS) - 2):
        sigma, to = STUDENT_SIGMAS[step], STUDENT_SIGMAS[step + 1]
        sigma_B = torch.full((len(x),), sigma, device=x.device)
        x = x + (to - sigma) * walker(x, sigma_B, text, image_BCTHW)
        result = torch.where(per_clip(step_B) == step + 1, x, result)
    return result


@cache
def numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """On the device once: a CUDA graph cannot copy them there."""
    return torch.tensor(values, device=device)
