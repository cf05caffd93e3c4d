"""Stages `t2v` and `i2v`: flow-matching teachers, sampled later in many steps with guidance."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from lightx2v_core.wan.model import WanModel

from .bank import Bank, bank_of
from .context import Context
from .denoising import Denoiser, per_clip, training_sigmas
from .exam import examine_teacher
from .files import TEACHERS, TEXT, find, parameters_of, read_transformer, save_weights, widen_input
from .fitting import Recipe, fit
from .progress import Clock, release_memory
from .text import empty_rows, encode_rows, read_encoder

CAPTION_DROPOUT = 0.15
TRIALS, WARM_TRIALS = 6, 3
LEAST_GAIN = 0.92  # of the plain time, to be worth its compilations
T2V_RECIPE = Recipe(lr=6e-4, warmup=200, decay=0.999)
I2V_RECIPE = Recipe(lr=6e-4, warmup=200, decay=0.999)


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
    bank, batch = bank_of(context), context.sizes.teacher_batch
    rng = Generator(context.device).manual_seed(context.seed + seed_of(task))
    is_image = task == "i2v"
    context.journal.note(task, parameters=parameters_of(model), batch=batch)

    def loss_of(denoiser: Denoiser) -> Tensor:
        return flow_loss(denoiser, text, bank, batch, is_image, rng)

    if context.compiles is None:
        choose_compilation(context, model, loss_of)
    denoiser = Denoiser(model, context.dtype, context.compiles)

    def save(averages: list[nn.Module]) -> None:
        save_weights(context.out / TEACHERS[task], averages[0].state_dict(), task)

    fit(task, [model], lambda _: loss_of(denoiser), recipe, clock, context.journal, save)
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


def flow_loss(
    denoiser: Denoiser, text: nn.Module, bank: Bank, count: int, with_image: bool, rng: Generator
) -> Tensor:
    """Mean squared error of the velocity eps - x0 on noisy clips."""
    batch = bank.sample(count, rng, with_image)
    clean = batch.latent_BCTHW
    device = clean.device
    is_dropped = torch.rand(count, generator=rng, device=device) < CAPTION_DROPOUT
    ids = torch.where(is_dropped[:, None], empty_rows(count, device), batch.ids_BS)
    states = encode_rows(text, ids)
    sigma_B = training_sigmas(count, rng, device)
    noise = torch.randn(clean.shape, generator=rng, device=device)
    sigma = per_clip(sigma_B)
    noisy = (1 - sigma) * clean + sigma * noise
    velocity = denoiser(noisy, sigma_B, states, batch.image_BCTHW)
    return (velocity - (noise - clean)).square().mean()
