"""Frames collected where they are wanted while the card goes on with the next ones."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)

IN_FLIGHT = 2  # pieces on their way to the host; each holds page-locked RAM of its size


class Collector:
    """A float32 tensor filled piece by piece along its third axis; the last piece needs `finish`.

    From a CUDA card to the host, pieces travel on a stream of their own through page-locked memory,
    and are put in place when their turn comes. Between any other devices they are copied at once.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device | str) -> None:
        self.result = torch.empty(shape, dtype=torch.float32, device=device)
        self.filled = 0
        self._flying: list[tuple[torch.cuda.Event, Tensor, Tensor]] = []
        self._stream: torch.cuda.Stream | None = None

    def put(self, piece_BCTHW: Tensor) -> None:
        frames = piece_BCTHW.shape[2]
        place = self.result[:, :, self.filled : self.filled + frames]
        self.filled += frames
        if not piece_BCTHW.is_cuda or place.device.type != "cpu":
            place.copy_(piece_BCTHW)
            return
        while len(self._flying) >= IN_FLIGHT:
            self._land()
        if (staged := _page_locked(piece_BCTHW)) is None:
            place.copy_(piece_BCTHW)
        else:
            self._send(piece_BCTHW.contiguous(), staged, place)

    def finish(self) -> Tensor:
        while self._flying:
            self._land()
        return self.result

    def _send(self, piece: Tensor, staged: Tensor, place: Tensor) -> None:
        if self._stream is None:
            self._stream = torch.cuda.Stream(piece.device)
        self._stream.wait_stream(torch.cuda.current_stream(piece.device))
        with torch.cuda.stream(self._stream):
            staged.copy_(piece, non_blocking=True)
        piece.record_stream(self._stream)
        arrived = torch.cuda.Event()
        arrived.record(self._stream)
        self._flying.append((arrived, staged, place))

    def _land(self) -> None:
        arrived, staged, place = self._flying.pop(0)
        arrived.synchronize()
        place.copy_(staged)


def _page_locked(like: Tensor) -> Tensor | None:
    """Room on the host for `like`; None where the driver locks no more pages."""
    try:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
    except RuntimeError as error:
        log.info("frames are copied while the card waits: %s", error)
        return None
