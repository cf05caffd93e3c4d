"""The transformers of one pipeline on one card: who is placed, who may stay, who leaves when."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from .assemble import LoadedTransformer
from .datatypes import VideoSize
from .memory.plan import (
    WORKSPACE_BYTES,
    Job,
    cheaper,
    forward_bytes,
    is_ram_short,
    place_within,
    video_tokens,
)
from .quant.linear import holds_codes

log = logging.getLogger(__name__)


class Turns:
    """`room` tells how many bytes may still be allocated on `device`; None: nobody knows."""

    def __init__(
        self,
        experts: Sequence[LoadedTransformer],
        device: torch.device,
        room: Callable[[], float | None],
    ) -> None:
        self._experts, self._device, self._room = experts, device, room
        self.placed: list[str] = []  # a line for each placing
        self._made_room = False

    def place(self, expert: LoadedTransformer, size: VideoSize) -> None:
        """`expert` onto the device if it is not there, and what left for others back; others
        leave where both do not fit."""
        engine = expert.residency
        if engine.device is not None and not self._made_room:
            return
        activations = self.activations(expert, size)
        if engine.device is None and not self._fits_beside(engine.total_bytes + activations):
            self.release(self._ram_of(expert), expert)
        self._made_room = False
        if not self._leaves(activations):  # a larger video than the one before
            engine.release(keep_pinned=True)
        job = Job(_name(expert), activations, self.advice(expert, size))
        room = self._room()
        room = None if room is None else room + engine.loaded_bytes
        self.placed.append(place_within(engine, self._device, room, job))

    def make_room(self, nbytes: float) -> None:
        """Room on the card for `nbytes` of others: of a single model only so many blocks leave it,
        and come back with the next `place`; of two experts the other one is next, and all leave."""
        engine, room = self._experts[0].residency, self._room()
        if len(self._experts) > 1 or room is None or not self.is_any_on_card:
            self.release(0)
            return
        self._made_room, short = True, nbytes - room
        if short > 0 and engine.shrink(short) < short:
            self.release(0)

    def release(self, next_bytes: int, next_expert: LoadedTransformer | None = None) -> None:
        """The experts off the card, and all but the next one out of RAM too where `next_bytes`
        would not fit beside them; they can be read again from their files."""
        for expert in self._experts:
            engine = expert.residency
            holds_ram = engine.device is not None or engine.pinned_bytes > 0
            engine.release(keep_pinned=True)
            if holds_ram and expert is not next_expert and is_ram_short(next_bytes):
                log.info(
                    "%.2f GB of RAM of the %s given back", engine.forget() / 1e9, _name(expert)
                )

    @property
    def leave_no_ram(self) -> bool:
        """Whether the weights of an expert that is yet to be placed would not fit into RAM."""
        away = (e for e in self._experts if e.residency.device is None)
        return is_ram_short(max(map(self._ram_of, away), default=0))

    def _ram_of(self, expert: LoadedTransformer) -> int:
        """What placing it may take anew: what was forgotten, and on a card page-locked copies."""
        engine = expert.residency
        locked = max(engine.total_bytes - engine.pinned_bytes, 0) if self._on_card else 0
        return engine.ram_bytes() + locked

    @property
    def is_any_on_card(self) -> bool:
        return self._on_card and any(e.residency.loaded_bytes for e in self._experts)

    @property
    def is_whole_on_card(self) -> bool:
        placed = [e.residency for e in self._experts if e.residency.device is not None]
        return self.is_any_on_card and not any(engine.streamed for engine in placed)

    def may_stay(self, size: VideoSize, others_bytes: int) -> bool:
        """Whether the experts can be left on the card: all whole, with room for a forward at
        `size` and for `others_bytes` of what takes turns with it."""
        placed = [e for e in self._experts if e.residency.device is not None]
        if not placed or any(e.residency.streamed for e in placed):
            return False
        return self._fits_beside(max(others_bytes, *(self.activations(e, size) for e in placed)))

    def activations(self, expert: LoadedTransformer, size: VideoSize) -> int:
        return forward_bytes(expert.model, video_tokens(size), self._device)

    def advice(self, expert: LoadedTransformer, size: VideoSize) -> str:
        """The cheapest changes that would fit into what may be used now."""
        engine, room = expert.residency, self._room()
        least = engine.least_bytes - engine.loaded_bytes + WORKSPACE_BYTES

        def fits(size: VideoSize) -> bool:
            return room is None or least + self.activations(expert, size) <= room

        return cheaper(size, fits, "" if holds_codes(expert.model) else "an fp8 file")

    @property
    def _on_card(self) -> bool:
        return self._device.type == "cuda"

    def _fits_beside(self, nbytes: int) -> bool:
        """Whether so much fits on the card beside the experts that are there already."""
        return self.is_any_on_card and self._room() is not None and self._leaves(nbytes)

    def _leaves(self, nbytes: int) -> bool:
        """Whether so much may be allocated now."""
        room = self._room()
        return room is None or nbytes + WORKSPACE_BYTES <= room


def _name(expert: LoadedTransformer) -> str:
    return f"{expert.info.expert}-noise transformer" if expert.info.expert else "transformer"
