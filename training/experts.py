"""Stages `t2v-lora` and `experts`: students as LoRA sets on the frozen teacher, by chords alone.

`t2v-lora` is one set for all four steps, the counterpart of the published distill LoRAs. `experts`
are two, as Wan 2.2 A14B divides its work: the first walks the two steps above sigma 0.9, the second
the two below.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from torch import Generator, Tensor, nn

from .adapters import Adapters
from .context import Context
from .denoising import STUDENT_SIGMAS, Denoiser
from .exam import load_judges
from .files import TEACHERS, find, read_transformer
from .fitting import Recipe, fit
from .progress import Clock
from .replay import gradients_of
from .student import OWN_FROM, STEP_SHARES, Paths, chord_loss, walk_paths

BOUNDARY = 0.9
PATH_PART = 0.25  # of the time
RECIPE = Recipe(lr=2e-3, warmup=50, decay=0.995, weight_decay=0.0)


@dataclass(frozen=True, slots=True)
class LoraStudent:
    """One LoRA set: how often it is trained at each step, and on states of its own too."""

    stem: str
    title: str
    rank: int
    shares: tuple[float, ...]
    sees_own: bool = False


def step_shares(expert: str) -> tuple[float, ...]:
    """The expert's own steps equally often, the others never."""
    is_high = [sigma >= BOUNDARY for sigma in STUDENT_SIGMAS[:-1]]
    mine = [flag == (expert == "high") for flag in is_high]
    return tuple(float(flag) for flag in mine)


EXPERTS = tuple(
    LoraStudent(
        f"demo_{name}_noise_lora",
        f"LightX2V demo, {name} noise expert, 4 steps",
        rank=16,
        shares=step_shares(name),
    )
    for name in ("high", "low")
)
WHOLE = LoraStudent(
    "demo_trained_lora", "LightX2V demo, LoRA student, 4 steps", 32, STEP_SHARES, sees_own=True
)


def train_experts(context: Context, minutes: float) -> None:
    """Text to video; the halves of the time are for one each."""
    _train(context, minutes, EXPERTS)


def train_lora(context: Context, minutes: float) -> None:
    _train(context, minutes, (WHOLE,))


def _train(context: Context, minutes: float, students: tuple[LoraStudent, ...]) -> None:
    _, text = load_judges(context)
    path = find(TEACHERS["t2v"], context.out, context.source)
    base = read_transformer(path, context.sizes, False).to(context.device).requires_grad_(False)
    denoiser = Denoiser(base, context.dtype, context.compiles)
    clock = Clock(minutes * PATH_PART, reserve=1)
    paths = walk_paths(context, "t2v", denoiser, text, clock)
    for student in students:
        part = Clock(minutes * (1 - PATH_PART) / len(students), reserve=4)
        _train_one(context, student, denoiser, paths, part)


def _train_one(
    context: Context, student: LoraStudent, denoiser: Denoiser, paths: Paths, clock: Clock
) -> None:
    adapters = Adapters(denoiser.model, student.rank, seed=context.seed)
    adapters.attach(denoiser.model)
    parameters = list(adapters.parameters())
    rng = Generator(context.device).manual_seed(context.seed + 7000)
    batch = context.sizes.student_batch

    def loss_of(own: bool) -> Tensor:
        return chord_loss(denoiser, paths, batch, own, rng, student.shares)

    from_path = gradients_of(lambda: loss_of(False), parameters, rng)
    from_own = gradients_of(lambda: loss_of(True), parameters, rng) if student.sees_own else None
    turns = count()

    def loss_at(fraction: float) -> Tensor:
        is_own_turn = fraction > OWN_FROM and next(turns) % 2 == 0
        return from_own() if from_own is not None and is_own_turn else from_path()

    def save(averages: list[nn.Module]) -> None:
        average = averages[0]
        assert isinstance(average, Adapters)
        average.save(context.out / f"{student.stem}.safetensors", student.title)

    fit(student.stem, [adapters], loss_at, RECIPE, clock, context.journal, save)
