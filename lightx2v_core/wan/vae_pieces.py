"""A clip on its way through the stages of the VAE, piece by piece, and what stands still in it.

An image-to-video clip is a picture and then eighty equal frames. A causal layer whose last frames
were all equal gives equal frames, so each stage computes a stretch of equal frames until nothing
in it changes any more, and passes the rest on as one frame that stays. Nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .vae_layers import Downsample, Stage, Stream, lookback

Run = Callable[[tuple[nn.Module, ...], Tensor, Stream], Tensor]
Stills = list[tuple[int, int]]  # stretches of equal frames: (first of them, behind the last)

SHORTEST_STILL = 8  # frames; a shorter stretch is computed like any other
COMPARED = 16  # frames at once


class Piece(NamedTuple):
    """Frames that follow each other, BCTHW, or one frame that stays for `times` frames."""

    frames: Tensor
    times: int = 1

    @property
    def length(self) -> int:
        return self.times if self.times > 1 else self.frames.shape[2]


def find_stills(frames_BCFHW: Tensor) -> Stills:
    """Where frames are equal, bit for bit, to the one before, as far as it is worth it."""
    first_rows = _equal_to_next(frames_BCFHW[..., :1, :])
    stills = []
    for start, stop in _runs(first_rows):
        equal = [
            same
            for at in range(start, stop - 1, COMPARED)
            for same in _equal_to_next(frames_BCFHW[:, :, at : min(at + COMPARED + 1, stop)])
        ]
        stills += [(start + a, start + b) for a, b in _runs(equal)]
    return stills


def stills_between(taken: Iterable[int], frames: int) -> Stills:
    """The same of `frames` frames that are all equal but those `taken`, without looking."""
    taken = set(taken)
    free = [frame not in taken for frame in range(frames)]
    return _runs([a and b for a, b in pairwise(free)])


def _equal_to_next(frames_BCFHW: Tensor) -> list[bool]:
    equal = frames_BCFHW[:, :, 1:] == frames_BCFHW[:, :, :-1]
    return equal.flatten(3).all(dim=3).flatten(0, 1).all(dim=0).tolist()


def _runs(equal: list[bool]) -> Stills:
    """Stretches of equal frames that are worth it, from whether each is equal to the next."""
    runs, start = [], 0
    for frame, same in enumerate([*equal, False]):
        if not same:
            runs.append((start, frame + 1))
            start = frame + 1
    return [(start, stop) for start, stop in runs if stop - start >= SHORTEST_STILL]


def cut(chunks: Iterable[tuple[int, int]], stills: Stills) -> Iterator[slice]:
    """Frames start to stop of each chunk without those within a still, and each still whole."""
    for start, stop in chunks:
        at = start
        for first, end in stills:
            if first < stop and end > at:
                if at < first:
                    yield slice(at, first)
                if first >= start:
                    yield slice(first, end)
                at = max(at, min(end, stop))
        if at < stop:
            yield slice(at, stop)


def through(
    stages: list[Stage],
    pieces: Iterable[Piece],
    limits: list[int],
    run: Run,
    stream: Stream,
) -> Iterator[Piece]:
    """`pieces` through all stages, each given at most its limit of frames at once.

    Lazy: a piece reaches the end before the next one is taken in, but for what a stage gathers.
    """
    for stage, limit in zip(stages, limits, strict=True):
        pieces = _stage(stage.layers, _gather(pieces, limit), limit, run, stream)
    yield from pieces


def _gather(pieces: Iterable[Piece], limit: int) -> Iterator[Piece]:
    """Short pieces joined, up to `limit` frames: a card wants much work at a time."""
    waiting: list[Tensor] = []
    for piece in pieces:
        if piece.length == 0:
            continue  # halving the frames left one to wait for the next chunk
        length = sum(frames.shape[2] for frames in waiting)
        if waiting and (piece.times > 1 or length + piece.length > limit):
            yield Piece(_joined(waiting))
            waiting = []
        if piece.times > 1:
            yield piece
        else:
            waiting.append(piece.frames)
    if waiting:
        yield Piece(_joined(waiting))


def _joined(frames: list[Tensor]) -> Tensor:
    return frames[0] if len(frames) == 1 else torch.cat(frames, dim=2)


def _stage(
    layers: tuple[nn.Module, ...], pieces: Iterable[Piece], limit: int, run: Run, stream: Stream
) -> Iterator[Piece]:
    step = 2 if any(isinstance(x, Downsample) and x.time_conv for x in layers) else 1
    settled = sum(lookback(layer) for layer in layers)  # frames after which all pasts are equal

    def compute(frames: Tensor) -> Iterator[Piece]:
        for part in frames.split(limit, dim=2):
            yield Piece(run(layers, part, stream))

    for frames, times in pieces:
        groups = (times - settled) // step - 1  # of frames that need not be computed
        if groups < 1:
            yield from compute(_repeated(frames, times))
            continue
        yield from compute(_repeated(frames, settled))
        # Each further `step` frames give one frame, always the same, and leave every past as is.
        still = run(layers, _repeated(frames, step), stream)
        yield Piece(still, 1 + groups)
        if rest := times - settled - (1 + groups) * step:
            yield from compute(_repeated(frames, rest))


def _repeated(frames: Tensor, times: int) -> Tensor:
    return frames if times == 1 else frames.expand(-1, -1, times, -1, -1)
