"""Which weights of a transformer are on the card, and moving them. True byte counts throughout.

The last blocks that do not fit are copied over when they run and dropped afterwards. The engine
holds blocks and parameter slots, never the model itself, so it adds no reference cycle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..wan.model import BlockInputs, WanBlock, WanModel

Fetch = Callable[[Tensor, torch.device], Tensor]


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor of a module, readable and replaceable by name."""

    owner: nn.Module
    leaf: str

    @property
    def tensor(self) -> Tensor:
        return getattr(self.owner, self.leaf)

    def put(self, tensor: Tensor) -> None:
        if self.leaf in self.owner._parameters:
            is_parameter = isinstance(tensor, nn.Parameter)
            self.owner._parameters[self.leaf] = (
                tensor if is_parameter else nn.Parameter(tensor, requires_grad=False)
            )
        else:
            self.owner._buffers[self.leaf] = tensor


def _slots(module: nn.Module) -> list[Slot]:
    return [
        Slot(owner, leaf)
        for owner in module.modules()
        for leaf in (*owner._parameters, *owner._buffers)
        if getattr(owner, leaf) is not None
    ]


def _streams(slot: Slot) -> bool:
    """Matrices stream; biases, norms and modulation are small and stay where the rest is."""
    return slot.tensor.ndim >= 2 and slot.leaf != "modulation"


class Residency:
    """Places the blocks of one WanModel, whose forward runs each block through `run_block`."""

    def __init__(self, model: WanModel, fetch: Fetch = Tensor.to) -> None:
        self._fetch = fetch
        self._blocks = [[s for s in _slots(block) if _streams(s)] for block in model.blocks]
        in_blocks = {(s.owner, s.leaf) for block in self._blocks for s in block}
        self._rest = [s for s in _slots(model) if (s.owner, s.leaf) not in in_blocks]
        self.block_bytes = [sum(s.tensor.nbytes for s in block) for block in self._blocks]
        self.rest_bytes = sum(s.tensor.nbytes for s in self._rest)
        self._linears: list[Any] = [m for m in model.modules() if hasattr(m, "branches")]
        self._homes: dict[Slot, Tensor] = {}
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
        """Bytes on the card: rest, resident blocks, LoRA, and the buffer a streamed block needs."""
        if self.device is None:
            return 0
        buffer = max(self.block_bytes[self.resident :], default=0)
        resident = sum(self.block_bytes[: self.resident])
        return self.rest_bytes + self.branch_bytes + resident + buffer

    def place(self, device: torch.device | str, budget_bytes: float | None = None) -> None:
        """Put the rest and as many blocks as `budget_bytes` holds on `device` (None: all of them).

        Blocks already there stay; `shrink` takes them away. At least one block's buffer is used.
        """
        device = torch.device(device)
        if self.device is not None and self.device != device:
            self.release()
        self.device = device
        for slot in self._rest:
            self._bring(slot, device)
        self._move_branches(device)
        while self.resident < len(self._blocks):
            if budget_bytes is not None and self._with_one_more() > budget_bytes:
                break
            for slot in self._blocks[self.resident]:
                self._bring(slot, device)
            self.resident += 1

    def _with_one_more(self) -> int:
        resident = sum(self.block_bytes[: self.resident + 1])
        buffer = max(self.block_bytes[self.resident + 1 :], default=0)
        return self.rest_bytes + self.branch_bytes + resident + buffer

    def shrink(self, wanted_bytes: float) -> int:
        """Drop resident blocks, last first, until `wanted_bytes` are free; returns bytes freed."""
        before = self.loaded_bytes
        while self.resident and before - self.loaded_bytes < wanted_bytes:
            self.resident -= 1
            for slot in self._blocks[self.resident]:
                self._send_home(slot)
        return before - self.loaded_bytes

    def release(self) -> None:
        """Everything back to where it was loaded from."""
        for slot in list(self._homes):
            self._send_home(slot)
        if self.device is not None:
            self._move_branches("cpu")
        self.device, self.resident = None, 0

    def _move_branches(self, device: torch.device | str) -> None:
        for linear in self._linears:
            linear.branches = tuple(branch.to(device) for branch in linear.branches)

    def run_block(self, index: int, block: WanBlock, x: Tensor, inputs: BlockInputs) -> Tensor:
        if index < self.resident or self.device is None:
            return block(x, inputs)
        with _borrowed(self._blocks[index], self._fetch, self.device):
            return block(x, inputs)

    def _bring(self, slot: Slot, device: torch.device) -> None:
        home = slot.tensor
        if home.device != device:
            self._homes[slot] = home
            slot.put(self._fetch(home, device))

    def _send_home(self, slot: Slot) -> None:
        if slot in self._homes:
            slot.put(self._homes.pop(slot))

    def describe(self) -> str:
        """One line: resident 22/40 blocks, 7.40 of 12.80 GB on cuda:0."""
        blocks = f"resident {self.resident}/{len(self._blocks)} blocks, " if self._blocks else ""
        sizes = f"{self.loaded_bytes / 1e9:.2f} of {self.total_bytes / 1e9:.2f} GB"
        return f"{blocks}{sizes} on {self.device}"


@contextmanager
def _borrowed(slots: list[Slot], fetch: Fetch, device: torch.device) -> Iterator[None]:
    """The slots' tensors on `device` for a while; whatever happens, they come back."""
    homes = [slot.tensor for slot in slots]
    try:
        for slot in slots:
            slot.put(fetch(slot.tensor, device))
        yield
    finally:
        for slot, home in zip(slots, homes, strict=True):
            slot.put(home)
