"""Frames collected where they are wanted while the card goes on with the next ones."""

from __future__ import annotations

import torch
from torch import Tensor

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
        self._send(piece_BCTHW.contiguous(), place)

    def finish(self) -> Tensor:
        while self._flying:
            self._land()
        return self.result

    def _send(self, piece: Tensor, place: Tensor) -> None:
        if self._stream is None:
            self._stream = torch.cuda.Stream(piece.device)
        staged = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=True)
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
