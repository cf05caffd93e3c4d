"""Stage `t2v-lora`: a student that is a LoRA set on the frozen teacher, taught by chords alone."""

from __future__ import annotations

from itertools import count

from torch import Generator, Tensor, nn

from .adapters import Adapters
from .context import Context
from .denoising import Denoiser
from .exam import load_judges
from .files import TEACHERS, find, read_transformer
from .fitting import Recipe, fit
from .progress import Clock
from .replay import gradients_of
from .student import OWN_FROM, chord_loss, walk_paths

STEM, RANK = "demo_trained_lora", 32
PATH_PART = 0.25  # of the time
RECIPE = Recipe(lr=2e-3, warmup=50, decay=0.995, weight_decay=0.0)


def train_lora(context: Context, minutes: float) -> None:
    """One set for all four steps, half of its time on states of its own."""
    _, text = load_judges(context)
    path = find(TEACHERS["t2v"], context.out, context.source)
    base = read_transformer(path, context.sizes, False).to(context.device).requires_grad_(False)
    denoiser = Denoiser(base, context.dtype, context.compiles)
    clock = Clock(minutes, reserve=4)
    paths = walk_paths(context, "t2v", denoiser, text, Clock(minutes * PATH_PART, reserve=1))
    adapters = Adapters(base, RANK, seed=context.seed)
    adapters.attach(base)
    parameters = list(adapters.parameters())
    rng = Generator(context.device).manual_seed(context.draws + 7000)
    batch = context.sizes.student_batch

    def loss_of(own: bool) -> Tensor:
        return chord_loss(denoiser, paths, batch, own, rng)

    from_path = gradients_of(lambda: loss_of(False), parameters, rng)
    from_own = gradients_of(lambda: loss_of(True), parameters, rng)
    turns = count()

    def loss_at(fraction: float) -> Tensor:
        is_own_turn = fraction > OWN_FROM and next(turns) % 2 == 0
        return from_own() if is_own_turn else from_path()

    def save(averages: list[nn.Module]) -> None:
        average = averages[0]
        assert isinstance(average, Adapters)
        average.save(context.out / f"{STEM}.safetensors", "LightX2V demo, LoRA student, 4 steps")

    fit(STEM, [adapters], loss_at, RECIPE, clock, context.journal, save)
