"""Stage `experts`: a high-noise and a low-noise student, as two LoRA sets on one base.

As Wan 2.2 A14B divides its work: the first walks the two steps above sigma 0.9, the second the two
below, each taught by the chords of the teacher's path.
"""

from __future__ import annotations

from torch import Generator, Tensor, nn

from .adapters import Adapters
from .context import Context
from .denoising import STUDENT_SIGMAS, Denoiser
from .exam import load_judges
from .files import TEACHERS, find, read_transformer
from .fitting import Recipe, fit
from .progress import Clock
from .replay import gradients_of
from .student import Paths, chord_loss, walk_paths

BOUNDARY = 0.9
RANK = 16
PATH_PART = 0.25  # of the time
RECIPE = Recipe(lr=2e-3, warmup=50, decay=0.995, weight_decay=0.0)
EXPERTS = {"high": "demo_high_noise_lora", "low": "demo_low_noise_lora"}


def train_experts(context: Context, minutes: float) -> None:
    """Text to video; the two halves of the time are for one each."""
    _, text = load_judges(context)
    path = find(TEACHERS["t2v"], context.out, context.source)
    base = read_transformer(path, context.sizes, False).to(context.device).requires_grad_(False)
    denoiser = Denoiser(base, context.dtype, context.compiles)
    clock = Clock(minutes * PATH_PART, reserve=1)
    paths = walk_paths(context, "t2v", denoiser, text, clock)
    for index, name in enumerate(EXPERTS):
        part = Clock(minutes * (1 - PATH_PART) / 2, reserve=4)
        _train_one(context, name, index, denoiser, paths, part)


def _train_one(
    context: Context, name: str, index: int, denoiser: Denoiser, paths: Paths, clock: Clock
) -> None:
    adapters = Adapters(denoiser.model, RANK, seed=context.seed + index)
    adapters.attach(denoiser.model)
    rng = Generator(context.device).manual_seed(context.seed + 7000 + index)
    shares, batch = step_shares(name), context.sizes.student_batch

    def loss_of() -> Tensor:
        return chord_loss(denoiser, paths, batch, False, rng, shares)

    gradients = gradients_of(loss_of, list(adapters.parameters()), rng)

    def save(averages: list[nn.Module]) -> None:
        average = averages[0]
        assert isinstance(average, Adapters)
        path = context.out / f"{EXPERTS[name]}.safetensors"
        average.save(path, f"LightX2V demo, {name} noise expert, 4 steps")

    stage = f"{name}-noise expert"
    fit(stage, [adapters], lambda _: gradients(), RECIPE, clock, context.journal, save)


def step_shares(expert: str) -> tuple[float, ...]:
    """The expert's own steps equally often, the others never."""
    is_high = [sigma >= BOUNDARY for sigma in STUDENT_SIGMAS[:-1]]
    mine = [flag == (expert == "high") for flag in is_high]
    return tuple(float(flag) for flag in mine)
