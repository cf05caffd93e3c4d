"""Stages `t2v-dmd` and `i2v-dmd`: the student by distribution matching, from its ODE start.

Every step trains the fake score on fresh clips of the student; every fifth also the student, with
some of the chord loss beside it, which keeps it from giving up variety. The best average by the
judge, on prompts of its own, is what stays.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from lightx2v_core.wan.model import WanModel

from .bank import bank_of
from .context import Context
from .denoising import Denoiser
from .dmd import STEPS, Question, Scores, Velocity, critic_loss, roll_out, student_loss
from .exam import VALIDATION_SEED, load_judges, make_exam, note_scores, sit_exam
from .files import STUDENTS, TEACHERS, find, read_transformer, save_weights
from .progress import Average, Clock, is_finite
from .ranks import average_gradients, shared
from .replay import Plain, Replay, forget_gradients, gradients_of
from .student import chord_loss, walk_paths
from .text import TextStates, empty_rows, encode_rows

PATH_PART = 0.12  # of the time, for the paths of the chord loss
LOOK_SECONDS = 20.0  # between two looks of the judge
LOOK_CLIPS = 128


@dataclass(frozen=True, slots=True)
class DmdRecipe:
    """Learning rates suit a small model; the published recipe for 14B uses 2e-6 and 4e-7."""

    student_lr: float = 5e-5
    fake_lr: float = 5e-5
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    clip: float = 10.0
    critic_per_student: int = 5
    chord_weight: float = 0.25
    decay: float = 0.995
    rollout: str = "euler"


@dataclass(slots=True, eq=False)
class Side:
    """One of the two that learn: its parameters, optimiser, and gradients for each exit step."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    losses: list[Replay | Plain]
    clip: float
    bad_steps: int = 0

    def step(self, exit_step: int) -> Tensor:
        loss = average_gradients(self.parameters, self.losses[exit_step]())
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        if is_finite(loss + norm):
            self.optimizer.step()
        else:
            self.bad_steps += 1
        forget_gradients(self.parameters)
        return loss


def train_dmd(context: Context, task: str, minutes: float, recipe: DmdRecipe | None = None) -> None:
    """Goes on from the student in the folders; the teacher is the real score."""
    clock, recipe = Clock(minutes, reserve=8), recipe or DmdRecipe(rollout=context.rollout)
    vae, text = load_judges(context)
    teacher = load(context, TEACHERS[task], task).requires_grad_(False)
    real = Denoiser(teacher, context.dtype, context.compiles)
    paths = walk_paths(context, task, real, text, Clock(minutes * PATH_PART, reserve=1))
    student = load(context, STUDENTS[task], task)
    fake = load(context, TEACHERS[task], task)
    rng = Generator(context.device).manual_seed(context.draws + 6000)
    empty = encode_rows(text, empty_rows(1, context.device, context.world)).expanded(
        context.sizes.dmd_batch
    )
    walker = Denoiser(student, context.dtype, context.compiles)
    critic = Denoiser(fake, context.dtype, context.compiles)
    scores = Scores(walker, critic, guided_score(real, empty, context.cfg))

    def of_student(exit_step: int) -> Tensor:
        question = ask(context, task, rng)
        clean = roll_out(walker, question, exit_step, recipe.rollout, rng)
        chord = chord_loss(walker, paths, context.sizes.dmd_batch, False, rng)
        return student_loss(scores, clean, question, rng) + recipe.chord_weight * chord

    def of_fake(exit_step: int) -> Tensor:
        question = ask(context, task, rng)
        with torch.no_grad():
            clean = roll_out(walker, question, exit_step, recipe.rollout, rng)
        return critic_loss(scores, clean, question, rng)

    sides = (
        make_side(student, of_student, recipe.student_lr, recipe, rng),
        make_side(fake, of_fake, recipe.fake_lr, recipe, rng),
    )
    average = Average(student, recipe.decay)
    clips = min(LOOK_CLIPS, context.sizes.exam_clips)
    exam = make_exam(context, task, clips, vae, text, seed=VALIDATION_SEED)

    def score(model: WanModel) -> dict[str, float]:
        return sit_exam(context, exam, Denoiser(model.eval(), context.dtype), vae)[0]

    keeper = Keeper(context, task, score)
    alternate(context, f"{task}-dmd", sides, average, keeper, recipe, clock)


def alternate(
    context: Context,
    stage: str,
    sides: tuple[Side, Side],
    average: Average,
    keeper: Keeper,
    recipe: DmdRecipe,
    clock: Clock,
) -> None:
    """The fake score every step, the student every few, the judge now and then."""
    student, fake = sides
    picks = Generator().manual_seed(context.seed + 6001)
    keeper.look(average.module)
    looked, step, losses = time.monotonic(), 0, (0.0, 0.0)
    while step < recipe.critic_per_student or shared(clock.fraction) < 1:
        exits = torch.randint(STEPS, (2,), generator=picks).tolist()
        of_fake = fake.step(exits[0])
        step += 1
        if step % recipe.critic_per_student == 0:
            of_student = student.step(exits[1])
            average.update()
            losses = (float(of_student), float(of_fake))
        if time.monotonic() - looked > LOOK_SECONDS:
            note_progress(context, stage, step, losses, sides, clock)
            keeper.look(average.module)
            looked = time.monotonic()
    note_progress(context, stage, step, losses, sides, clock)
    keeper.look(average.module)


def note_progress(
    context: Context,
    stage: str,
    step: int,
    losses: tuple[float, float],
    sides: tuple[Side, Side],
    clock: Clock,
) -> None:
    context.journal.note(
        stage,
        step=step,
        loss=losses[0],
        fake_loss=losses[1],
        steps_per_second=round(step / clock.elapsed, 2),
        bad_steps=sides[0].bad_steps + sides[1].bad_steps,
    )


class Keeper:
    """Holds the best weights by the judge on disk."""

    def __init__(
        self, context: Context, task: str, score: Callable[[WanModel], dict[str, float]]
    ) -> None:
        self._context, self._task, self._score = context, task, score
        self.best = -1.0
        self._looks = 0

    def look(self, model: nn.Module) -> None:
        assert isinstance(model, WanModel)
        scores = self._score(model)
        note_scores(self._context, f"{self._task} dmd look {self._looks}", scores)
        self._looks += 1
        if scores["all"] > self.best:
            self.best = scores["all"]
            path = self._context.out / STUDENTS[self._task]
            save_weights(path, model.state_dict(), self._task)


def make_side(
    model: WanModel,
    loss_of: Callable[[int], Tensor],
    lr: float,
    recipe: DmdRecipe,
    rng: Generator,
) -> Side:
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=lr,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=parameters[0].is_cuda,
    )
    losses = [
        gradients_of(lambda exit_step=exit_step: loss_of(exit_step), parameters, rng)
        for exit_step in range(STEPS)
    ]
    return Side(parameters, optimizer, losses, recipe.clip)


def ask(context: Context, task: str, rng: Generator) -> Question:
    """Captions, and first frames for image models, of random clips; their pixels are not used."""
    batch = bank_of(context).sample(context.sizes.dmd_batch, rng, with_image=task == "i2v")
    assert batch.text is not None, "the bank's captions are encoded"
    noise = torch.randn(batch.latent_BCTHW.shape, generator=rng, device=context.device)
    return Question(noise, batch.text, batch.image_BCTHW)


def guided_score(real: Denoiser, empty: TextStates, cfg: float) -> Velocity:
    """The teacher with its guidance, as one velocity."""

    def velocity(x: Tensor, sigma_B: Tensor, text: TextStates, image: Tensor | None) -> Tensor:
        return real.guided(x, sigma_B, (text, empty), image, cfg)

    return velocity


def load(context: Context, name: str, task: str) -> WanModel:
    path = find(name, context.out, context.source)
    return read_transformer(path, context.sizes, task == "i2v").to(context.device)
