"""How fast the denoiser runs on this machine, with which kernels and why, and what it holds.

Random latents, text states and CLIP features stand in for real ones: the time does not depend on
them. Nothing is encoded, decoded or written.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .assemble import LoadedTransformer, load_transformer
from .datatypes import VideoSize
from .device import select_dtype
from .errors import RequestError
from .memory.plan import Job, card_room, forward_bytes, place_within, video_tokens
from .presets import make_plan, preset_for
from .quant.quantise import KEEP
from .wan.config import CLIP_DIM, TEXT_LEN, WanConfig

SEED = 0
TIMESTEP = 937.5  # the second of the trained four
OnForward = Callable[[int, int], None]  # done, total


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What to time: a transformer, at a size (None: its preset's), `forwards` times after one."""

    model: Path
    size: VideoSize | None = None
    forwards: int = 4
    attention: str = "auto"
    quantisation: str = KEEP
    matmul: str = "auto"
    vram_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Seconds of forwards at `size`; `attention` and `matmul` as loading logged them, with why."""

    model: str
    card: str
    torch: str
    size: tuple[int, int, int]  # width, height, frames
    tokens: int
    forwards: int
    seconds_per_step: float  # median
    first_seconds: float  # with what only the first forward does: compiling, filling buffers
    steps: int  # of the preset
    tflops: float  # counted operations over the median
    peak_bytes: int | None  # of the card; None off CUDA
    placed: str
    attention: str
    matmul: str  # empty where no weight is quantised

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    def lines(self) -> list[str]:
        width, height, frames = self.size
        clip = f"{width}x{height}, {frames} frames, {self.tokens} tokens"
        peak = "" if self.peak_bytes is None else f", peak {self.peak_bytes / 1e9:.2f} GB"
        return [
            self.model,  # which names the matmul
            f"attention: {self.attention}",
            self.placed,
            f"{self.card}, PyTorch {self.torch}: {clip}",
            f"{self.seconds_per_step:.3f} s/step (median of {self.forwards}; first "
            f"{self.first_seconds:.2f} s), {self.tflops:.1f} TFLOP/s{peak}",
            f"{self.steps} steps: {self.steps * self.seconds_per_step:.2f} s, without text encoder "
            "and VAE",
        ]


@torch.inference_mode()
def bench(
    request: BenchRequest, device: torch.device, on_forward: OnForward = lambda done, total: None
) -> BenchReport:
    """Load, place, run one forward to warm up and the rest by the clock.

    Raises RequestError for a number of forwards below 1 or a size that does not fit the model,
    CheckpointError and CapabilityError as loading does.
    """
    if request.forwards < 1:
        raise RequestError(f"{request.forwards} forwards cannot be timed; use 1 or more")
    if request.size is not None:
        request.size.check()
    with _noted() as choices:
        loaded = load_transformer(
            request.model,
            select_dtype(device),
            request.attention,
            device,
            quantisation=request.quantisation,
            matmul=request.matmul,
        )
    preset = preset_for(loaded.info)
    size = request.size or preset.size
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    placed = _place(loaded, size, device, request.vram_bytes)
    inputs = _random_inputs(loaded.model.config, size, device)
    seconds = []
    for done in range(request.forwards + 1):
        seconds.append(_clock(lambda: loaded.model(*inputs), device))
        on_forward(done + 1, request.forwards + 1)
    median = statistics.median(seconds[1:])
    on_card = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if on_card else None
    loaded.residency.release()
    tokens = video_tokens(size)
    return BenchReport(
        model=loaded.summary,
        card=torch.cuda.get_device_name(device) if on_card else device.type,
        torch=torch.__version__,
        size=(size.width, size.height, size.frames),
        tokens=tokens,
        forwards=request.forwards,
        seconds_per_step=median,
        first_seconds=seconds[0],
        steps=make_plan(preset).steps,
        tflops=forward_flops(loaded.model.config, tokens) / median / 1e12,
        peak_bytes=peak,
        placed=placed,
        attention=choices.get("attention", "unknown"),
        matmul=choices.get("matmul", ""),
    )


def forward_flops(config: WanConfig, tokens: int, batch: int = 1) -> int:
    """Multiplications and additions of one forward, those of matmuls and attention.

    Each block: six square linears and the feed-forward over `tokens`, keys and values of the
    context, attention of the video with itself and with the context.
    """
    dim, context = config.dim, TEXT_LEN + config.clip_tokens
    linears = tokens * (6 * dim * dim + 2 * dim * config.ffn_dim) + 2 * context * dim * dim
    attention = 2 * tokens * dim * (tokens + context)
    return 2 * batch * config.num_layers * (linears + attention)


def _place(
    loaded: LoadedTransformer, size: VideoSize, device: torch.device, vram_bytes: int | None
) -> str:
    activations = forward_bytes(loaded.model, video_tokens(size), device)
    job = Job("transformer", activations, "use a smaller --width, --height or --frames")
    return place_within(loaded.residency, device, card_room(device, vram_bytes), job)


def _random_inputs(
    config: WanConfig, size: VideoSize, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(SEED)
    _, _, T, H, W = size.latent_shape()
    x = torch.randn(1, config.in_dim, T, H, W, generator=generator)
    text = torch.randn(1, TEXT_LEN, config.text_dim, generator=generator)
    clip = None
    if config.clip_tokens:
        clip = torch.randn(1, config.clip_tokens, CLIP_DIM, generator=generator).to(device)
    return x.to(device), torch.tensor([TIMESTEP], device=device), text.to(device), clip


def _clock(work: Callable[[], Tensor], device: torch.device) -> float:
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    del result
    return time.perf_counter() - started


class _Notes(logging.Handler):
    """Keeps what lines like "attention: sdpa" say, the last of each kind."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        kind, _, what = record.getMessage().partition(": ")
        self.said[kind] = what


@contextmanager
def _noted() -> Iterator[dict[str, str]]:
    """The pack's own lines about its choices, whatever the level of its log is."""
    logger, notes = logging.getLogger(__package__), _Notes()
    level, propagates = logger.level, logger.propagate
    is_shown = logger.isEnabledFor(logging.INFO)
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    logger.propagate = propagates and is_shown
    try:
        yield notes.said
    finally:
        logger.removeHandler(notes)
        logger.setLevel(level)
        logger.propagate = propagates
