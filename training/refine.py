"""Stages `distill-lora` and `experts`: the student as LoRAs on its teacher.

First cut out of the difference of their weights by singular values (`extract.py`), then taught to
answer as the student does in the states that the student's own steps lead to. `distill-lora` is one
set for all four steps, the counterpart of the published distill LoRAs. `experts` are two, as Wan
2.2 A14B divides its work: the first walks the two steps above sigma 0.9, the second the two below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from lightx2v_core.wan.model import WanModel

from .adapters import Adapters
from .bank import Batch, bank_of
from .context import Context
from .denoising import STUDENT_SIGMAS, Denoiser
from .exam import load_judges
from .extract import PREFIX, Weights, extract, save_lora
from .files import STUDENTS, TEACHERS, find, read_transformer
from .fitting import Recipe, fit
from .progress import Clock
from .replay import gradients_of
from .student import STEP_SHARES, numbers, own_states, softened

BOUNDARY = 0.9
RECIPE = Recipe(lr=1e-3, warmup=50, decay=0.995, weight_decay=0.0)


@dataclass(frozen=True, slots=True)
class Cut:
    """One LoRA: its file, its rank, how often it is trained at each step."""

    stem: str
    rank: int
    shares: tuple[float, ...]


def step_shares(expert: str) -> tuple[float, ...]:
    """The expert's own steps equally often, the others never."""
    is_high = [sigma >= BOUNDARY for sigma in STUDENT_SIGMAS[:-1]]
    mine = [flag == (expert == "high") for flag in is_high]
    return tuple(float(flag) for flag in mine)


EXPERTS = tuple(Cut(f"demo_{name}_noise_lora", 16, step_shares(name)) for name in ("high", "low"))
WHOLE = Cut("demo_distill_lora", 32, STEP_SHARES)


def train_experts(context: Context, minutes: float) -> None:
    """Text to video; the halves of the time are for one each."""
    _train(context, minutes, EXPERTS)


def train_distill_lora(context: Context, minutes: float) -> None:
    _train(context, minutes, (WHOLE,))


def _train(context: Context, minutes: float, cuts: tuple[Cut, ...]) -> None:
    _, text = load_judges(context)
    if bank_of(context).states_NWSE is None:
        context.bank = bank_of(context).with_states(text)
    for cut in cuts:
        _train_one(context, cut, Clock(minutes / len(cuts), reserve=4))


def _train_one(context: Context, cut: Cut, clock: Clock) -> None:
    folders = (context.out, context.source)
    paths = find(TEACHERS["t2v"], *folders), find(STUDENTS["t2v"], *folders)
    base, student = (read_transformer(path, context.sizes, False) for path in paths)
    base.to(context.device).requires_grad_(False)
    student.to(context.device).requires_grad_(False)
    found = extract(Weights(paths[0]), Weights(paths[1]), cut.rank, torch.float32).tensors
    adapters = Adapters(base, cut.rank, seed=context.seed)
    rest = take_pairs(adapters, found)
    add_differences(base, rest)
    adapters.attach(base)
    walker = Denoiser(base, context.dtype, context.compiles)
    guide = Denoiser(student, context.dtype, context.compiles)
    rng = Generator(context.device).manual_seed(context.draws + 7000)
    bank, batch = bank_of(context), context.sizes.student_batch

    def loss_of() -> Tensor:
        drawn = bank.sample(batch, rng, with_image=False)
        return matching_loss(walker, guide, drawn, cut.shares, rng)

    loss = gradients_of(loss_of, list(adapters.parameters()), rng)

    def save(averages: list[nn.Module]) -> None:
        average = averages[0]
        assert isinstance(average, Adapters)
        kept = {name: tensor.half() for name, tensor in rest.items()}
        about = {"lightx2v.base": TEACHERS["t2v"].removesuffix(".safetensors")}
        about |= Weights(paths[1]).metadata
        save_lora(context.out / f"{cut.stem}.safetensors", kept | average.published(), about)

    fit(cut.stem, [adapters], lambda _fraction: loss(), RECIPE, clock, context.journal, save)


@torch.no_grad()
def take_pairs(adapters: Adapters, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Set the adapters to the pairs of their linears; what belongs to other tensors is returned.

    A linear without a pair, which is one that does not differ, keeps its start: no difference.
    """
    rest = dict(tensors)
    for name, down, up in zip(adapters.names, adapters.down, adapters.up, strict=True):
        if (key := f"{PREFIX}{name}.lora_down.weight") in rest:
            down.copy_(rest.pop(key))
            up.copy_(rest.pop(f"{PREFIX}{name}.lora_up.weight"))
    return rest


@torch.no_grad()
def add_differences(model: WanModel, tensors: Mapping[str, Tensor]) -> None:
    """In place: pairs and whole differences, under the published names."""
    parameters = dict(model.named_parameters())
    endings = {
        ".lora_down.weight": ".weight",
        ".diff": ".weight",
        ".diff_b": ".bias",
        ".diff_m": ".modulation",
    }
    for name, tensor in tensors.items():
        if name.endswith(".lora_up.weight"):
            continue
        ending = next(ending for ending in endings if name.endswith(ending))
        stem = name.removeprefix(PREFIX).removesuffix(ending)
        if ending == ".lora_down.weight":
            tensor = tensors[f"{PREFIX}{stem}.lora_up.weight"] @ tensor
        target = parameters[f"{stem}{endings[ending]}"]
        target.add_(tensor.to(target))


def matching_loss(
    walker: Denoiser, guide: Denoiser, batch: Batch, shares: tuple[float, ...], rng: Generator
) -> Tensor:
    """How far the walker's velocity is from the guide's where the guide's own steps lead."""
    assert batch.text is not None, "the bank's captions are encoded"
    clean, device = batch.latent_BCTHW, batch.latent_BCTHW.device
    noise = torch.randn(clean.shape, generator=rng, device=device)
    step_B = torch.multinomial(
        numbers(tuple(shares), device), len(clean), replacement=True, generator=rng
    )
    sigma_B = numbers(STUDENT_SIGMAS, device)[step_B]
    with torch.no_grad():
        x = own_states(guide, noise, step_B, batch.text, batch.image_BCTHW)
        wanted = guide(x, sigma_B, batch.text, batch.image_BCTHW)
    return softened(walker(x, sigma_B, batch.text, batch.image_BCTHW) - wanted)
