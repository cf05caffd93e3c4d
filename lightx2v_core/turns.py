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
    can_lock,
    cheaper,
    forward_bytes,
    is_ram_short,
    place_within,
    video_tokens,
)
from .memory.residency import Residency
from .quant.linear import holds_codes

log = logging.getLogger(__name__)


class Turns:
    """`room` tells how many bytes may still be allocated on `device`; None: nobody knows. `others`
    is the most that the stages before and after take there for a video of a size."""

    def __init__(
        self,
        experts: Sequence[LoadedTransformer],
        device: torch.device,
        room: Callable[[], float | None],
        others: Callable[[VideoSize], float],
    ) -> None:
        self._experts, self._device, self._room = experts, device, room
        self._others = others
        self.placed: list[str] = []  # a line for each placing
        self._made_room = False
        self._placed_for: VideoSize | None = None

    def place(self, expert: LoadedTransformer, size: VideoSize) -> None:
        """`expert` onto the device if it is not there, and what left for others back; others
        leave where both do not fit."""
        engine = expert.residency
        if engine.device is not None and not self._made_room and size == self._placed_for:
            return
        activations = self.activations(expert, size)
        if engine.device is None and not self._fits_beside(engine.total_bytes + activations):
            self.release(self._ram_of(expert), expert)
        self._made_room, self._placed_for = False, size
        if not self._leaves(activations):  # a larger video than the one before
            engine.release(keep_pinned=True)
        job = Job(_name(expert), activations, self.advice(expert, size))
        room = self._room()
        if room is not None:
            room += engine.loaded_bytes
            room -= self._left_to_others(engine, room, activations, size)
        self.placed.append(place_within(engine, self._device, room, job))

    def _left_to_others(
        self, engine: Residency, room: float, activations: int, size: VideoSize
    ) -> float:
        """What of `room` the blocks of a single model leave to stages that take more than a
        forward; 0 where they take less.

        Those blocks stream in every video: hidden behind what is computed, where taking them off
        the card and bringing them back is not. 0 also where RAM is too short to keep them
        page-locked, and where not even both buffers would fit; then `make_room` takes off what is
        needed.
        """
        # What is held between videos is not quite the same each time.
        more = self._others(size) - activations
        budget = room - activations - WORKSPACE_BYTES - more
        alone = self._on_card and len(self._experts) == 1
        if not alone or more <= 0 or budget < engine.card_bytes(0):
            return 0
        resident, _ = engine.fit(budget)
        streamed = engine.total_bytes - engine.card_bytes(resident, 0)
        return more if can_lock(engine, streamed) else 0

    def make_room(self, nbytes: float) -> None:
        """Room on the card for `nbytes` of others: of a single model only so many blocks leave it,
        and come back with the next `place`; of two experts the other one is next, and all leave."""
        engine, room = self._experts[0].residency, self._room()
        if len(self._experts) > 1 or room is None or not self.is_any_on_card:
            self.release(0)
            return
        short = nbytes - room
        if short > 0:
            self._made_room = True
            if engine.shrink(short) < short:
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

    def may_stay(self, size: VideoSize, others_bytes: float) -> bool:
        """Whether the experts can be left on the card: all whole, with room for a forward at
        `size` and for `others_bytes` of what takes turns with it."""
        placed = [e for e in self._experts if e.residency.device is not None]
        if not placed or any(e.residency.streamed for e in placed):
            return False
        return self._fits_beside(max(others_bytes, *(self.activations(e, size) for e in placed)))

    def least_room(self, size: VideoSize) -> int:
        """What a forward takes beside the weights."""
        most = max(self.activations(expert, size) for expert in self._experts)
        return most + WORKSPACE_BYTES

    def is_plenty(self, size: VideoSize, nbytes: int) -> bool:
        """Whether the experts whole, `nbytes` more and any stage of a video fit at once."""
        room = self._room()
        engines = [expert.residency for expert in self._experts]
        missing = sum(engine.total_bytes - engine.loaded_bytes for engine in engines)
        most = max(self._others(size), self.least_room(size))
        return room is not None and room >= missing + nbytes + most

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

    def _fits_beside(self, nbytes: float) -> bool:
        """Whether so much fits on the card beside the experts that are there already."""
        return self.is_any_on_card and self._room() is not None and self._leaves(nbytes)

    def _leaves(self, nbytes: float) -> bool:
        """Whether so much may be allocated now."""
        room = self._room()
        return room is None or nbytes + WORKSPACE_BYTES <= room


def _name(expert: LoadedTransformer) -> str:
    return f"{expert.info.expert}-noise transformer" if expert.info.expert else "transformer"
