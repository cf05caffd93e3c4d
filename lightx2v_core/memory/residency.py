"""Which weights of a transformer are on the card, and moving them. True byte counts throughout.

Three tiers: the card; page-locked RAM; RAM or the mapped file. Blocks that do not fit on the card
stream through two buffers there (`ring`, `transport`). The engine holds blocks and parameter slots,
never the model itself, so it adds no reference cycle, and a module's tree, keys and parameters are
the same before and after: only while a block runs do its slots show other tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CapabilityError, CheckpointError
from ..wan.model import BlockInputs, WanBlock
from .files import Mapped, stamps
from .ram import pinnable_bytes, trim
from .reading import to_device
from .ring import Ring
from .slots import Layout, Slot, slots_of
from .transport import HostBlock, Transport, make_transport

log = logging.getLogger(__name__)

BUFFERS = 2


class Residency:
    """Places the weights of one model. `model.blocks` are what can stream.

    A model either runs each block through `run_block`, or `hook` is called on its blocks.
    `files` are what the weights are mapped from; `reread` gives them again by name, which allows
    `forget`. `make_transport` moves bytes on a device. What the modules `apart` own stays as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        files: Iterable[Path] = (),
        reread: Callable[[], Mapping[str, Tensor]] | None = None,
        make_transport: Callable[[torch.device], Transport] = make_transport,
        apart: Sequence[nn.Module] = (),
    ) -> None:
        self._files, self._reread = stamps(files), reread
        self._make_transport = make_transport
        slots = {(s.owner, s.leaf): s for s in slots_of(model)}
        blocks: Iterable[Any] = model.blocks  # pyright: ignore[reportAssignmentType]
        self._blocks = [
            [slots.pop((s.owner, s.leaf)) for s in slots_of(block) if s.streams] for block in blocks
        ]
        self._rest = [slot for slot in slots.values() if slot.owner not in apart]
        self.block_bytes = [sum(s.tensor.nbytes for s in block) for block in self._blocks]
        self._laid_out = [Layout([s.tensor for s in block]).nbytes for block in self._blocks]
        self.rest_bytes = sum(s.tensor.nbytes for s in self._rest)
        self._linears: list[Any] = [m for m in model.modules() if hasattr(m, "branches")]
        # Blocks in the order in which they become resident, so that those that stream lie apart
        # and a slow copy has the time of several blocks.
        self._order = sorted(range(len(self._blocks)), key=_spread)
        self._homes: dict[Slot, Tensor] = {}
        self._branch_homes: list[tuple[Any, tuple, tuple]] = []
        self._hosts: dict[int, HostBlock] = {}
        self._in_place: dict[int, HostBlock] = {}  # resident blocks that are computed from a file
        self._ring: Ring | None = None
        self._borrowed: list[Tensor] = []
        self._forgotten: list[Slot] = []
        self._read_at = {s: s.tensor.data_ptr() for block in self._blocks for s in block}
        self._buffers = BUFFERS
        self.device: torch.device | None = None
        self.resident = 0

    @property
    def total_bytes(self) -> int:
        return self.rest_bytes + sum(self.block_bytes) + self.branch_bytes

    @property
    def branch_bytes(self) -> int:
        return sum(b.nbytes for linear in self._linears for b in linear.branches)

    @property
    def loaded_bytes(self) -> int:
        """Bytes on the card: rest, LoRA, resident blocks, and the buffers of those that stream."""
        return 0 if self.device is None else self.card_bytes(self.resident, self._buffers)

    @property
    def streamed(self) -> list[int]:
        """Indices of the blocks that are not resident, as they run."""
        return sorted(self._order[self.resident :])

    @property
    def pinned_bytes(self) -> int:
        """Page-locked RAM that streaming holds, or will when a block has run once."""
        return sum(h.layout.nbytes for h in self._hosts.values() if h.is_locked)

    def card_bytes(self, resident: int, buffers: int = BUFFERS) -> int:
        """What is on the card with `resident` blocks kept there."""
        kept = sum(self.block_bytes[i] for i in self._order[:resident])
        streamed = [self._laid_out[i] for i in self._order[resident:]]
        buffer_bytes = min(buffers, len(streamed)) * max(streamed, default=0)
        return self.rest_bytes + self.branch_bytes + kept + buffer_bytes

    @property
    def least_bytes(self) -> int:
        """The least the card must hold: no block resident, one buffer."""
        return self.card_bytes(0, 1)

    def fit(self, budget_bytes: float | None) -> tuple[int, int]:
        """(resident blocks, buffers) that keep within `budget_bytes`; None keeps everything.

        One buffer, which copies and computes in turn, is for cards too small for two.
        """
        count = len(self._blocks)
        if budget_bytes is None or self.card_bytes(count) <= budget_bytes:
            return count, BUFFERS
        if self.card_bytes(0) > budget_bytes:
            return 0, 1
        return max(r for r in range(count) if self.card_bytes(r) <= budget_bytes), BUFFERS

    def place(self, device: torch.device | str, budget_bytes: float | None = None) -> None:
        """Put the rest and as many blocks as `budget_bytes` holds on `device` (None: all of them).

        Blocks already there stay; `shrink` takes them away. At least one block's buffer is used.
        Raises CheckpointError when a file that weights are read from was changed.
        """
        device = torch.device(device)
        if self.device is not None and self.device != device:
            self.release()
        self.recall()
        for stamp in self._files:
            stamp.check()
        wanted, buffers = self.fit(budget_bytes)
        if (wanted, buffers) <= (self.resident, self._buffers) and self.device is not None:
            wanted, buffers = self.resident, self._buffers
        else:
            self._stop_streaming()
        self.device, self._buffers = device, buffers
        mapped, arriving = Mapped(), self._order[self.resident : wanted]
        if device.type != "cuda":  # there the reads themselves tell what cannot be read
            HostBlock([s.tensor for s in self._rest], self._files, mapped).check()
        for index in arriving:
            self._settle(index, device, mapped)
        self._bring([*self._rest, *(s for i in arriving for s in self._blocks[i])], device)
        self._bring_branches(device)
        for index in arriving:
            self._hosts.pop(index, None)
            self.resident += 1
        self._start_streaming(mapped)

    def _settle(self, index: int, device: torch.device, mapped: Mapped) -> None:
        """Block `index` becomes resident: on a card it is read now, on the CPU whenever it runs."""
        source = HostBlock([slot.tensor for slot in self._blocks[index]], self._files, mapped)
        if device.type == "cpu":
            self._in_place[index] = source
        elif device.type != "cuda":
            source.check()

    def shrink(self, wanted_bytes: float) -> int:
        """Drop resident blocks, last first, until `wanted_bytes` are free; returns bytes freed."""
        before, resident, buffers = self.loaded_bytes, self.resident, self._buffers
        while before - self.card_bytes(resident, buffers) < wanted_bytes:
            if resident:
                resident -= 1
            elif buffers > 1:
                buffers -= 1
            else:
                break
        if self.device is None or (resident, buffers) == (self.resident, self._buffers):
            return 0
        self._stop_streaming()
        while self.resident > resident:
            self.resident -= 1
            self._in_place.pop(self._order[self.resident], None)
            for slot in self._blocks[self._order[self.resident]]:
                self._send_home(slot)
        self._buffers = buffers
        self._start_streaming(Mapped())
        return before - self.loaded_bytes

    def release(self, keep_pinned: bool = False) -> None:
        """Everything back to where it was loaded from. `keep_pinned` spares the next `place` the
        reading: page-locked copies stay."""
        self._stop_streaming()
        for slot in list(self._homes):
            self._send_home(slot)
        for linear, placed, home in self._branch_homes:
            if linear.branches is placed:
                linear.branches = home
        self._branch_homes.clear()
        self._in_place.clear()
        self.device, self.resident = None, 0
        if not keep_pinned:
            self._hosts.clear()

    def lift(self, tensors: Iterable[Tensor]) -> None:
        """Before these are replaced; `place`, which follows, brings what is there then."""
        meant = {id(tensor) for tensor in tensors}
        slots = [slot for slot in self._rest if id(slot.tensor) in meant]
        if len(slots) < len(meant):
            self.release()
        for slot in slots:
            self._send_home(slot)

    def unpin(self, wanted_bytes: float) -> int:
        """Give up page-locked copies that `release` kept, as many bytes at least; returns them."""
        freed = 0
        for index in list(self._hosts) if self._ring is None else ():
            if freed < wanted_bytes and (pinned := self._hosts.pop(index).pinned) is not None:
                freed += pinned.nbytes
        return freed

    def forget(self) -> int:
        """`release`, and give up every copy of the blocks in RAM that can be read again.

        What is mapped from a file costs nothing and stays, and so does what is not as it was read
        (weights with a LoRA merged in). Returns the bytes given up. The next `place` or `recall`
        reads the rest again; until then those parameters are on ``meta``.
        """
        freed = sum(h.pinned.nbytes for h in self._hosts.values() if h.pinned is not None)
        self.release()
        mapped = Mapped()
        for slot in (s for block in self._blocks for s in block) if self._reread else ():
            is_as_read = slot.tensor.data_ptr() == self._read_at[slot]
            if is_as_read and slot.tensor.device.type == "cpu" and not mapped.holds(slot.tensor):
                freed += slot.tensor.nbytes
                slot.put(torch.empty_like(slot.tensor, device="meta"))
                self._forgotten.append(slot)
        trim()
        return freed

    def ram_bytes(self) -> int:
        """RAM that the next `place` takes anew: what was forgotten."""
        return sum(slot.tensor.nbytes for slot in self._forgotten)

    def run_block(self, index: int, block: WanBlock, x: Tensor, inputs: BlockInputs) -> Tensor:
        with self._using(index):
            return block(x, inputs)

    def hook(self, blocks: Iterable[nn.Module]) -> None:
        """Make `blocks`, which somebody else calls, bring their weights and take them away."""
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(_enter, self, index))
            block.register_forward_hook(partial(_leave, self, index), always_call=True)

    @contextmanager
    def _using(self, index: int) -> Iterator[None]:
        self.enter(index)
        finished = False
        try:
            yield
            finished = True
        finally:
            self.leave(index, finished)

    def enter(self, index: int) -> None:
        """Before block `index` runs. Every block is announced, so that copies begin early."""
        if index in self._in_place:
            self._in_place[index].check()
        if self._ring is None:
            self._check_stayed(index)
            return
        streamed = self.streamed
        if index not in streamed:
            self._check_stayed(index)
            self._ring.fetch_ahead(next((i for i in streamed if i > index), streamed[0]))
            return
        tensors = self._ring.acquire(index)
        slots = self._blocks[index]
        self._borrowed = [slot.tensor for slot in slots]
        for slot, tensor in zip(slots, tensors, strict=True):
            slot.put(tensor)

    def _check_stayed(self, index: int) -> None:
        """Code that moves a model it does not own would end in an error of PyTorch's about two
        devices, which names nobody."""
        slot = next(iter(self._blocks[index]), None)
        if self.device is None or slot is None or slot.tensor.device.type == self.device.type:
            return
        raise CapabilityError(
            f"the weights of block {index} were put on {self.device.type} and are now on "
            f"{slot.tensor.device.type}: another add-on has moved them (MultiGPU, block swap or "
            "offload nodes do); leave this model out of it, its weights are placed and streamed by "
            "themselves"
        )

    def leave(self, index: int, finished: bool = True) -> None:
        """After block `index`, whatever happened in it: its own tensors are back."""
        if not self._borrowed:
            return
        for slot, home in zip(self._blocks[index], self._borrowed, strict=True):
            slot.put(home)
        self._borrowed = []
        if self._ring is not None:
            self._ring.done(index, finished)

    def _start_streaming(self, mapped: Mapped) -> None:
        """Buffers at once, so that a card without room says so now; copies at first use."""
        assert self.device is not None
        streamed = self.streamed
        if not streamed or self._ring is not None:
            return
        size = max(self._laid_out[i] for i in streamed)
        empty = partial(torch.empty, size, dtype=torch.uint8, device=self.device)
        buffers = [empty() for _ in range(min(self._buffers, len(streamed)))]
        transport = self._make_transport(self.device)
        self._choose_pinned(streamed, mapped, transport.pins)
        self._ring = Ring(transport, {i: self._hosts[i] for i in streamed}, buffers)

    def _stop_streaming(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def _choose_pinned(self, streamed: list[int], mapped: Mapped, pins: bool) -> None:
        """Blocks of a mapped file are kept page-locked as far as RAM allows."""
        room = pinnable_bytes() if pins else 0
        for index in streamed:
            tensors = [slot.tensor for slot in self._blocks[index]]
            host = self._hosts.get(index)
            if host is not None and host.pinned is not None and host.is_of(tensors):
                continue
            host = self._hosts[index] = HostBlock(tensors, self._files, mapped)
            if host.in_file and host.layout.nbytes <= room:
                host.may_pin = True
                room -= host.layout.nbytes

    def _bring_branches(self, device: torch.device) -> None:
        current = {id(linear): (placed, home) for linear, placed, home in self._branch_homes}
        self._branch_homes = []
        for linear in self._linears:
            placed, home = current.get(id(linear), ((), ()))
            if linear.branches is not placed:
                home = linear.branches
                linear.branches = placed = tuple(branch.to(device) for branch in home)
            if placed:
                self._branch_homes.append((linear, placed, home))

    def _bring(self, slots: Sequence[Slot], device: torch.device) -> None:
        there = torch.empty(0, device=device).device  # with its number, which "cuda" has not
        away = [slot for slot in slots if slot.tensor.device != there]
        copies = to_device([slot.tensor for slot in away], device)
        for slot, copy in zip(away, copies, strict=True):
            self._homes[slot] = slot.tensor
            slot.put(copy)

    def _send_home(self, slot: Slot) -> None:
        if slot in self._homes:
            slot.put(self._homes.pop(slot))

    def recall(self) -> None:
        """What was forgotten, from its file again."""
        if not self._forgotten:
            return
        assert self._reread is not None
        for stamp in self._files:
            stamp.check()
        tensors = self._reread()
        for slot in self._forgotten:
            tensor = tensors[slot.name]
            if (tensor.dtype, tensor.shape) != (slot.tensor.dtype, slot.tensor.shape):
                raise CheckpointError(
                    f"{slot.name} was {slot.tensor.dtype} {tuple(slot.tensor.shape)} and its file "
                    f"now gives {tensor.dtype} {tuple(tensor.shape)}; load the model again"
                )
        for slot in self._forgotten:
            slot.put(tensors[slot.name])
            self._read_at[slot] = slot.tensor.data_ptr()
        self._forgotten.clear()

    def describe(self) -> str:
        """One line: resident 22/40 blocks, 7.40 GB card, 9.10 GB pinned, 0.00 GB from file."""
        if not self._blocks:
            return f"{self.loaded_bytes / 1e9:.2f} of {self.total_bytes / 1e9:.2f} GB {self.device}"
        hosts = [self._hosts[i] for i in self.streamed if i in self._hosts]
        tiers = {
            "card": self.loaded_bytes,
            "pinned": self.pinned_bytes,
            "from file": sum(h.layout.nbytes for h in hosts if h.in_file and not h.is_locked),
            "from RAM": sum(h.layout.nbytes for h in hosts if not h.in_file),
        }
        shown = (f"{size / 1e9:.2f} GB {k}" for k, size in tiers.items() if size or k != "from RAM")
        return f"resident {self.resident}/{len(self._blocks)} blocks, " + ", ".join(shown)


def _enter(engine: Residency, index: int, *_call: object) -> None:
    engine.enter(index)


def _leave(engine: Residency, index: int, _block: object, _inputs: object, y: object) -> None:
    engine.leave(index, y is not None)


def _spread(index: int) -> int:
    """The bits of `index` in reverse: any first part of 0, 4, 2, 6, 1, … is evenly spread."""
    return int(f"{index:016b}"[::-1], 2)
