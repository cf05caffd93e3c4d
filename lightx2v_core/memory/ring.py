"""Two buffers on the card, and which streamed block is in which.

The order is known: blocks run one after another, and after the last comes the first of the next
step. So each buffer is refilled as soon as its block is done, while the other one computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle, islice

from torch import Tensor

from .transport import HostBlock, Transport


class Ring:
    """`blocks` are those that stream, by index; `buffers` hold the largest of them."""

    def __init__(
        self, transport: Transport, blocks: Mapping[int, HostBlock], buffers: list[Tensor]
    ) -> None:
        self._transport = transport
        self._blocks = dict(sorted(blocks.items()))
        self._buffers = buffers
        self._held: list[int | None] = [None] * len(buffers)
        for slot in range(len(buffers)):
            transport.done(slot)  # what used this memory before comes first

    def fetch_ahead(self, index: int) -> None:
        """Begin to fill the buffers with `index` and what follows, where they do not hold it."""
        wanted = self._from(index)
        for block in wanted:
            if block not in self._held:
                slot = next(s for s, held in enumerate(self._held) if held not in wanted)
                self._held[slot] = None
                host = self._blocks[block]
                self._transport.start(slot, host, self._buffers[slot])
                self._held[slot] = block

    def acquire(self, index: int) -> list[Tensor]:
        """The tensors of block `index` on the card, valid for what is computed from now on."""
        self.fetch_ahead(index)
        slot = self._held.index(index)
        self._held[slot] = None  # forgotten if the copy failed
        self._transport.wait(slot)
        self._held[slot] = index
        return self._blocks[index].layout.views(self._buffers[slot])

    def done(self, index: int, go_on: bool = True) -> None:
        """Block `index` has been computed, or given up: its buffer is free for the next one.

        Without `go_on` nothing more is fetched until the next `acquire`.
        """
        if index in self._held:
            self._transport.done(self._held.index(index))
        if go_on:
            self.fetch_ahead(self._after(index))

    def close(self) -> None:
        self._transport.close()
        self._buffers.clear()

    def _from(self, index: int) -> list[int]:
        """`index` and the blocks after it, as many as there are buffers."""
        indices = list(self._blocks)
        start = indices.index(index)
        return list(islice(cycle(indices), start, start + min(len(self._buffers), len(indices))))

    def _after(self, index: int) -> int:
        indices = list(self._blocks)
        return indices[(indices.index(index) + 1) % len(indices)]
