"""Stages `t2v` and `i2v`: flow-matching teachers, sampled later in many steps with guidance."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count

import torch
from torch import Generator, Tensor, nn

from lightx2v_core.wan.model import WanModel

from .bank import Batch, bank_of
from .context import Context
from .denoising import Denoiser, per_clip, training_sigmas
from .exam import examine_teacher
from .files import TEACHERS, TEXT, find, parameters_of, read_transformer, save_weights, widen_input
from .fitting import Recipe, fit
from .progress import Clock, release_memory
from .replay import gradients_of
from .text import TextStates, empty_rows, encode_rows, read_encoder

CAPTION_DROPOUT = 0.15
TRIALS, WARM_TRIALS = 6, 3
LEAST_GAIN = 0.92  # of the plain time, to be worth its compilations
T2V_RECIPE = Recipe(lr=6e-4, matrix_lr=1.2e-3, warmup=200, decay=0.999)
I2V_RECIPE = Recipe(lr=6e-4, matrix_lr=1.2e-3, warmup=200, decay=0.999)
# Still pictures teach shapes, colours and places at a fifth of the cost of clips.
STILLS_UNTIL = 0.15  # of the time of a text-to-video teacher: only first frames
STILLS_EVERY = 6  # steps after that: one with first frames


def train_t2v(context: Context, minutes: float) -> None:
    """From random weights or from those of an earlier command."""
    _train(context, "t2v", minutes, _start(context, "t2v"), T2V_RECIPE)


def train_i2v(context: Context, minutes: float) -> None:
    """From an earlier command's weights, else the text-to-video teacher's, else random ones."""
    _train(context, "i2v", minutes, _start(context, "i2v"), I2V_RECIPE)


def _start(context: Context, task: str) -> WanModel:
    takes_image = task == "i2v"
    for folder in (context.out, context.source):
        if folder is None:
            continue
        if (path := folder / TEACHERS[task]).is_file():
            return read_transformer(path, context.sizes, takes_image).to(context.device)
        if takes_image and (path := folder / TEACHERS["t2v"]).is_file():
            narrow = read_transformer(path, context.sizes, False)
            return widen_input(narrow, context.sizes).to(context.device)
    torch.manual_seed(context.seed)
    return new_transformer(context, takes_image).to(context.device)


def new_transformer(context: Context, takes_image: bool) -> WanModel:
    """Linears start as in the published code: Xavier, and a head that says zero."""
    model = WanModel(context.sizes.transformer(takes_image))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    for part in (model.text_embedding, model.time_embedding):
        for linear in (part[0], part[2]):
            nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(model.head.head.weight)
    return model


def _train(context: Context, task: str, minutes: float, model: WanModel, recipe: Recipe) -> None:
    clock = Clock(minutes, reserve=12)
    encoder = read_encoder(find(TEXT, context.out, context.source)).to(context.device)
    text = encoder.transformer.requires_grad_(False)
    context.bank = bank_of(context).with_states(text)
    bank, batch, latent_frames = (
        context.bank,
        context.sizes.teacher_batch,
        context.sizes.latent_shape[1],
    )
    empty = encode_rows(text, empty_rows(1, context.device, context.world))
    rng = Generator(context.device).manual_seed(context.draws + seed_of(task))
    is_image = task == "i2v"
    context.journal.note(task, parameters=parameters_of(model), batch=batch)

    def loss_of(denoiser: Denoiser) -> Tensor:
        return flow_loss(denoiser, empty, bank.sample(batch, rng, is_image), rng)

    def loss_of_stills() -> Tensor:
        stills = bank.sample(batch * (latent_frames - 1), rng, False, frames=1)
        return flow_loss(denoiser, empty, stills, rng)

    if context.compiles is None:
        choose_compilation(context, model, loss_of)
    denoiser = Denoiser(model, context.dtype, context.compiles)

    def save(averages: list[nn.Module]) -> None:
        save_weights(context.out / TEACHERS[task], averages[0].state_dict(), task)

    parameters = list(model.parameters())
    of_clips = gradients_of(lambda: loss_of(denoiser), parameters, rng)
    of_stills = None if is_image else gradients_of(loss_of_stills, parameters, rng)
    counter = count()

    def loss_at(fraction: float) -> Tensor:
        is_turn = next(counter) % STILLS_EVERY == 0 or fraction < STILLS_UNTIL
        return of_stills() if is_turn and of_stills is not None else of_clips()

    fit(task, [model], loss_at, recipe, clock, context.journal, save)
    release_memory(context.device)
    context.cfg = examine_teacher(context, task)


def choose_compilation(
    context: Context, model: WanModel, loss_of: Callable[[Denoiser], Tensor]
) -> None:
    """Keep torch.compile where it makes training steps faster; never on a CPU."""
    context.compiles = False
    if context.device.type != "cuda":
        return
    seconds = {}
    for compiles in (False, True):
        denoiser, started = Denoiser(model, context.dtype, compiles), time.perf_counter()
        for trial in range(TRIALS + WARM_TRIALS):
            if trial == WARM_TRIALS:
                torch.cuda.synchronize()
                started = time.perf_counter()
            loss_of(denoiser).backward()
        torch.cuda.synchronize()
        seconds[compiles] = (time.perf_counter() - started) / TRIALS
    model.zero_grad(set_to_none=True)
    context.compiles = seconds[True] < LEAST_GAIN * seconds[False]
    context.journal.note("compile", plain_seconds=seconds[False], compiled_seconds=seconds[True])


def seed_of(task: str) -> int:
    return {"t2v": 2000, "i2v": 3000}[task]


def flow_loss(denoiser: Denoiser, empty: TextStates, batch: Batch, rng: Generator) -> Tensor:
    """Mean squared error of the velocity eps - x0 on noisy clips, some of them without caption."""
    assert batch.text is not None, "the bank's captions are encoded before"
    clean, device = batch.latent_BCTHW, batch.latent_BCTHW.device
    is_dropped_B = torch.rand(len(clean), generator=rng, device=device) < CAPTION_DROPOUT
    states = batch.text.replaced(is_dropped_B, empty)
    sigma_B = training_sigmas(len(clean), rng, device)
    noise = torch.randn(clean.shape, generator=rng, device=device)
    sigma = per_clip(sigma_B)
    noisy = (1 - sigma) * clean + sigma * noise
    velocity = denoiser(noisy, sigma_B, states, batch.image_BCTHW)
    return (velocity - (noise - clean)).square().mean()
