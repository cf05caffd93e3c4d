"""Encoders and VAE on a card for the time they work, whole.

Their own tensors are back in place afterwards. To a CUDA card they travel from a page-locked copy,
which is made when they are first lent, as far as RAM is free for it: one transfer of all bytes
(1.2 GB of CLIP in 0.02 s on an H200, where reading the mapped file took 0.2 to 0.4 s).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .ram import pinnable_bytes
from .reading import to_device
from .slots import slots_of
from .transport import HostBlock, Transport, make_transport

log = logging.getLogger(__name__)


class Lent:
    """`module`, lent to a device again and again.

    `make_transport` is what moves bytes there, `room` says how much may be page-locked.
    """

    def __init__(
        self,
        module: nn.Module,
        make_transport: Callable[[torch.device], Transport] = make_transport,
        room: Callable[[], int] = pinnable_bytes,
    ) -> None:
        self._slots, self._make_transport, self._room = slots_of(module), make_transport, room
        self._homes: list[Tensor] = []  # of what is on a device
        self._host: HostBlock | None = None
        self._in_use = self._stays = False

    @property
    def nbytes(self) -> int:
        return sum(slot.tensor.nbytes for slot in self._slots)

    @property
    def pinned_bytes(self) -> int:
        """Page-locked RAM that it holds."""
        return 0 if self._host is None or self._host.pinned is None else self._host.pinned.nbytes

    @property
    def loaded_bytes(self) -> int:
        """Of the device, at the moment."""
        return self.nbytes if self._homes else 0

    @contextmanager
    def borrowed(
        self,
        device: torch.device,
        free_others: Callable[[], None] | None = None,
        stays: bool = False,
    ) -> Iterator[None]:
        """On `device` for a while; what it has there is given up then, not copied back.

        Where memory runs out in bringing it, once more after `free_others`. With `stays` it is
        left there until `leave`, unless a page-locked copy brings it back in no time.
        """
        if device.type == "cpu":
            yield
            return
        self._bring(device, free_others)
        self._in_use, self._stays = True, stays and not self.pinned_bytes
        try:
            yield
        finally:
            self._in_use = False
            if not self._stays:
                self.leave()

    def leave(self) -> None:
        """Off the device now, or when its work is done."""
        self._stays = False
        if self._in_use:
            return
        for slot, home in zip(self._slots, self._homes, strict=False):
            slot.put(home)
        self._homes = []

    def unpin(self) -> None:
        """Give up the page-locked copy."""
        self._host = None

    def _bring(self, device: torch.device, free_others: Callable[[], None] | None) -> None:
        if self._homes:
            return
        try:
            self._load(device)
            return
        except torch.cuda.OutOfMemoryError:
            if free_others is None:
                raise
        # Outside the handler, where what the failed attempt held is gone.
        log.warning("not enough memory for the weights of an encoder; everything else leaves")
        free_others()
        self._load(device)

    def _load(self, device: torch.device) -> None:
        """Copies of all or of none."""
        homes = [slot.tensor for slot in self._slots]
        copies = self._from_pinned(homes, device)
        if copies is None:
            copies = to_device(homes, device)
        self._homes = homes
        for slot, copy in zip(self._slots, copies, strict=True):
            slot.put(copy)

    def _from_pinned(self, homes: list[Tensor], device: torch.device) -> list[Tensor] | None:
        """Parts of one buffer on a device whose transport has a use for page-locked RAM; None
        where there is none to be had."""
        transport = self._make_transport(device)
        if not transport.pins:
            return None
        if self._host is None:
            host = HostBlock(homes)
            if host.layout.nbytes > self._room():
                return None
            host.may_pin, self._host = True, host
        if not self._host.is_locked:  # the driver refused it
            return None
        target = torch.empty(self._host.layout.nbytes, dtype=torch.uint8, device=device)
        try:
            transport.done(0)  # what used this memory before comes first
            transport.start(0, self._host, target)
            transport.wait(0)
        finally:
            transport.close()
        return self._host.layout.views(target)
