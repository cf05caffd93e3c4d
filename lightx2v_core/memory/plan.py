"""What will fit before anything is loaded: activations counted from shapes, weights from bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from ..datatypes import VideoSize
from ..errors import CapabilityError
from ..ops.glue import computes_in_one_pass
from ..quant.linear import holds_codes
from ..wan.config import PATCH, TEXT_LEN, WanConfig
from ..wan.model import WanModel
from ..wan.vae_card import FILLED
from .ram import available_bytes, margin_bytes, pinnable_bytes
from .residency import Residency

log = logging.getLogger(__name__)

T = TypeVar("T")
Advice = Callable[[], str]

GB = 10**9
# The allocator's rounding, cuBLAS and cuDNN workspaces; beside every count below.
WORKSPACE_BYTES = 256 * 2**20
# Of `vae_bytes`. Seen: 60 maps at one latent frame (float32 on a CPU); 55, 78 and 117 at one, two
# and four (bfloat16 on an H200, decoding 81 frames of 832x480; 54 and 77 at 1280x720).
PAST_MAPS, WORKING_MAPS = 36, 24
FILLED_MAPS = 12  # of the past, and as many at work on each latent frame: inputs of convolutions
LEAST_SHRINK = GB // 2  # after an out-of-memory error
SHRINK_SHARE = 0.25
LESS_SHARE = 0.75  # of the weights planned, when loading them ran out of memory


def video_tokens(size: VideoSize) -> int:
    _, _, T, H, W = size.latent_shape()
    return T * (H // PATCH[1]) * (W // PATCH[2])


def activation_bytes(
    config: WanConfig,
    tokens: int,
    itemsize: int,
    batch: int = 1,
    quantised: bool = False,
    one_pass: bool = False,
) -> int:
    """The most that one forward holds beside the weights; monotone in sizes.

    Counted from the tensors alive at once in one block, E and F being model and hidden width and
    s `itemsize`, and checked against the allocations of a real forward. For each token:
    attention (18 + 4 s) E: while k is turned there are the float32 residual, the block's input, q,
    k, k in float32 with both products and their stack;
    feed-forward (8 + s) E + 3 s F: the residual twice, the input, and the hidden layer with what
    GELU or a LoRA branch makes of it.
    `one_pass` is for our kernels without LoRA branches, see `forward_bytes`. Then it is
    cross-attention, (8 + 5 s) E: the residual twice, its input, the query, and the two results
    with their sum; or (8 + s) E + (s + 1) F: the hidden layer beside its codes.
    Dequantising adds the largest matrix twice in float32. Text and picture keys, rotary tables,
    and the latents in and out are small and counted too.
    """
    dim, hidden = config.dim, config.ffn_dim
    rotary, latents = 2 * 64 * 4, 16 * (2 * config.in_dim + 4 * config.out_dim)
    maps, hidden_bytes = 18 + 4 * itemsize, 3 * itemsize
    if one_pass:
        maps, hidden_bytes = 8 + 5 * itemsize, itemsize + 1
    attention = tokens * batch * maps * dim
    feed_forward = tokens * batch * ((8 + itemsize) * dim + hidden_bytes * hidden)
    if quantised:
        feed_forward += 8 * dim * hidden
    context = batch * (TEXT_LEN + config.clip_tokens) * dim * 2 * itemsize
    return max(attention, feed_forward) + tokens * (rotary + batch * latents) + context


def forward_bytes(model: WanModel, tokens: int, device: torch.device) -> int:
    """`activation_bytes` of `model` as it is now: its dtype, codes, LoRA branches and kernels."""
    has_branches = any(getattr(module, "branches", ()) for module in model.modules())
    one_pass = not has_branches and computes_in_one_pass(device, model.compute_dtype)
    itemsize, quantised = model.compute_dtype.itemsize, holds_codes(model)
    return activation_bytes(model.config, tokens, itemsize, quantised=quantised, one_pass=one_pass)


def text_bytes(heads: int, ffn_dim: int, tokens: int, prompts: int) -> int:
    """Activations of UMT5: scores and biases in float32 four times, or the gated hidden layers."""
    return 4 * prompts * tokens * (4 * heads * tokens + 4 * ffn_dim)


def vae_bytes(width: int, size: VideoSize, itemsize: int, latents: int = 1) -> int:
    """Activations of the causal VAE at `latents` latent frames at once; `width` is 96 for Wan's.

    Counted in maps of full resolution with that many channels: those of the past of every layer,
    and those at work on the four frames of each latent frame; what a card fills some of them up
    with is added. The frames collected and the clip are not in it.
    """
    channels = (PAST_MAPS + latents * WORKING_MAPS) * width
    channels += FILLED_MAPS * (1 + latents) * (FILLED.get(width, width) - width)
    return channels * size.width * size.height * itemsize


def card_room(device: torch.device, limit_bytes: float | None = None) -> float | None:
    """Bytes that may still be allocated on `device`: what is free, at most `limit_bytes` in all.

    None where nothing is known and nothing was asked for.
    """
    if device.type != "cuda":
        return limit_bytes
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - held
    return free if limit_bytes is None else min(limit_bytes - held, free)


@dataclass(frozen=True, slots=True)
class Job:
    """One use of a model on a device: its name in messages, and what it needs beside weights."""

    what: str
    activations: int
    advice: str = ""


def place_within(engine: Residency, device: torch.device, room: float | None, job: Job) -> str:
    """Place as much as `room` holds beside the activations; logs and returns one line about it.

    Raises CapabilityError with numbers, before anything is loaded, when not even one block at a
    time fits, or RAM is too short to read the weights.
    """
    check_ram(engine.ram_bytes(), job.what)
    budget = None if room is None else room - job.activations - WORKSPACE_BYTES
    if room is not None and budget is not None and engine.device is None:
        least = engine.least_bytes
        if least > budget:
            raise CapabilityError(
                f"{job.what} needs {(room - budget + least) / GB:.1f} GB on {device} "
                f"({least / GB:.1f} GB of weights with every block streamed, "
                f"{job.activations / GB:.1f} GB of activations) and {max(room, 0) / GB:.1f} GB may "
                f"be used; {job.advice or 'free memory on the card, or allow more of it'}"
            )
    place_or_less(engine, device, budget)
    line = f"{job.what}: {engine.describe()}, {job.activations / GB:.2f} GB activations"
    log.info("%s", line)
    return line


def place_or_less(engine: Residency, device: torch.device, budget: float | None) -> None:
    """`engine.place`, and once more with fewer blocks where memory runs out in it.

    Raises the out-of-memory error of the second time, with nothing left behind on the card.
    """
    wanted = engine.total_bytes if budget is None else min(budget, engine.total_bytes)
    less = max(LESS_SHARE * wanted, engine.least_bytes)
    try:
        engine.place(device, budget)
        return
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error)
    # Outside the handler, where what the failed attempt held is gone.
    engine.release()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    log.warning("out of memory while loading (%s); once more with fewer blocks", reason)
    try:
        engine.place(device, less)
    except torch.cuda.OutOfMemoryError:
        engine.release()
        raise


def check_ram(needed_bytes: int, what: str) -> None:
    """Raise CapabilityError when `needed_bytes` of RAM are not there, in place of a killed run."""
    free = available_bytes()
    if not needed_bytes or free is None or needed_bytes <= free:
        return
    raise CapabilityError(
        f"{what} needs {needed_bytes / GB:.1f} GB of RAM and {free / GB:.1f} GB are free; close "
        "other programs, or use a file in the number format that is computed in (bf16 on a card), "
        "or an fp8 one: those stay mapped and need none"
    )


def can_lock(engine: Residency, nbytes: int) -> bool:
    """Whether `nbytes` of its blocks are page-locked, or can be."""
    return nbytes <= engine.pinned_bytes + pinnable_bytes()


def is_ram_short(next_bytes: int) -> bool:
    """Whether `next_bytes` more would eat into what is left to other programs."""
    free = available_bytes()
    return free is not None and next_bytes + margin_bytes() > free


def cheaper(size: VideoSize, fits: Callable[[VideoSize], bool], other: str = "") -> str:
    """The cheapest changes that fit: fewer frames, a smaller picture, then `other`."""
    changes = []
    fewer = [replace(size, frames=f) for f in range(size.frames - 4, 0, -4)]
    if (found := next((s for s in fewer if fits(s)), None)) is not None:
        changes.append(f"{found.frames} frames in place of {size.frames}")
    smaller = (
        VideoSize(int(size.width * k / 20), int(size.height * k / 20), size.frames).snapped()
        for k in range(19, 3, -1)
    )
    less = (s for s in smaller if s.width * s.height < size.width * size.height)
    if (found := next((s for s in less if fits(s)), None)) is not None:
        changes.append(f"{found.width}x{found.height} in place of {size.width}x{size.height}")
    return "; or ".join([*changes, *([other] if other else [])])


def with_one_retry(engine: Residency, action: Callable[[], T], advice: Advice | None = None) -> T:
    """`action`, and once more with fewer blocks on the card when memory runs out in it.

    `action` must give the same result from the start. The second time the error is raised as one
    of the same kind, so that a host recognises it, with `advice` in its message and in the log.
    """
    try:
        return action()
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error)
    # Outside the handler, where the failed call's tensors are gone.
    freed = engine.shrink(max(LEAST_SHRINK, SHRINK_SHARE * engine.loaded_bytes))
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    log.warning(
        "out of memory (%s); %.2f GB of weights given back, this step once more: %s",
        reason.splitlines()[0] if reason else "no reason given",
        freed / GB,
        engine.describe(),
    )
    try:
        return action()
    except torch.cuda.OutOfMemoryError as error:
        told = f"out of memory again; {advice() if advice else 'use a smaller size'}"
        log.error("%s", told)
        raise type(error)(f"{str(error).rstrip()}\n{told}") from error
