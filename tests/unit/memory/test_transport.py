"""The order of copies and computations on a card, on a recorded card whose streams run apart."""

from __future__ import annotations

import mmap
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightx2v_core.checkpoint.mapping import MappedFile
from lightx2v_core.errors import CheckpointError
from lightx2v_core.memory import transport as transport_module
from lightx2v_core.memory.files import FileStamp, Mapped, stamps
from lightx2v_core.memory.ring import Ring
from lightx2v_core.memory.transport import CudaTransport, HostBlock
from tests.unit.memory.conftest import needs_populate

STREAMED = (1, 3, 4, 6, 7)
PAGE = mmap.PAGESIZE


class Event:
    def __init__(self, card: Card) -> None:
        self.card = card
        self.recorded = self.reached = 0

    def record(self, stream: Stream) -> None:
        self.recorded += 1
        number = self.recorded
        stream.queue.append((lambda: True, lambda: setattr(self, "reached", number)))

    def synchronize(self) -> None:
        self.card.run_until(lambda: self.reached >= self.recorded)


class Stream:
    """A queue of (may run, action); nothing orders two streams but events."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.queue: deque[tuple[Callable[[], bool], Callable[[], object]]] = deque()

    def wait_event(self, event: Event) -> None:
        number = event.recorded
        self.queue.append((lambda: event.reached >= number, lambda: None))

    def synchronize(self) -> None:
        self.card.run_until(lambda: not self.queue)


class Card:
    """Runs what was queued in any order that streams and events allow, chosen by `seed`.

    A copy reads its source when it runs, not when it is queued, as a card does.
    """

    def __init__(self, seed: int = 0, refuses: bool = False, eager: bool = False) -> None:
        self.random, self.refuses, self.eager = random.Random(seed), refuses, eager
        self.compute, self.streams = Stream(self), []
        self.streams.append(self.compute)
        self.registered: dict[int, int] = {}
        self.lock = threading.RLock()  # the transport's worker queues too

    def activate(self) -> nullcontext[None]:
        return nullcontext()

    def stream(self) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    def current_stream(self) -> Stream:
        return self.compute

    def event(self) -> Event:
        return Event(self)

    def copy(self, target: Tensor, source: Tensor, stream: Stream) -> None:
        stream.queue.append((lambda: True, lambda: target.copy_(source)))
        if self.eager:
            self.run_until(lambda: not stream.queue or not stream.queue[0][0]())

    def register(self, memory: Tensor) -> bool:
        if not self.refuses:
            self.registered[memory.data_ptr()] = memory.nbytes
        return not self.refuses

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def run_until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            with self.lock:
                able = [s for s in self.streams if s.queue and s.queue[0][0]()]
                if able:
                    self.random.choice(able).queue.popleft()[1]()

    def finish(self) -> None:
        self.run_until(lambda: not any(stream.queue for stream in self.streams))


def host_block(index: int, nbytes: int = 40) -> HostBlock:
    tensors = [
        torch.full((nbytes,), index, dtype=torch.uint8),
        torch.full((3, 5), float(index), dtype=torch.bfloat16),
    ]
    return HostBlock(tensors)


def seen_by_each_block(card: Card, order: list[int], pin: bool = False, buffers: int = 2) -> list:
    """Runs `order` through a ring; a block's computation reads its tensors when the card gets
    to it."""
    blocks = {index: host_block(index) for index in STREAMED}
    for block in blocks.values():
        block.may_pin = pin
    transport = CudaTransport(card, room=lambda: 10**9)
    memory = [torch.zeros(1024, dtype=torch.uint8) for _ in range(buffers)]
    ring = Ring(transport, blocks, memory)
    seen = []

    def compute(index: int, tensors: list[Tensor]) -> Callable[[], None]:
        return lambda: seen.append((index, sorted({float(x) for t in tensors for x in t.view(-1)})))

    for index in order:
        tensors = ring.acquire(index)
        card.compute.queue.append((lambda: True, compute(index, tensors)))
        ring.done(index)
    card.finish()
    ring.close()
    return seen


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that a block takes several, each used again and again."""
    monkeypatch.setattr(transport_module, "STAGING_BYTES", 16)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pin", [True, False])
@pytest.mark.parametrize("buffers", [1, 2])
def test_every_block_computes_with_its_own_weights_however_the_streams_run(seed, pin, buffers):
    steps = list(STREAMED) * 3

    seen = seen_by_each_block(Card(seed), steps, pin, buffers)

    assert seen == [(index, [index]) for index in steps]


@pytest.mark.parametrize("seed", range(6))
def test_blocks_skipped_or_repeated_by_other_packs_still_see_their_own_weights(seed):
    steps = [1, 1, 7, 3, 4, 4, 6, 1, 6, 7]

    seen = seen_by_each_block(Card(seed), steps, pin=seed % 2 == 0)

    assert seen == [(index, [index]) for index in steps]


def test_without_the_waits_the_recorded_card_shows_wrong_weights(monkeypatch):
    """The test above can fail: an event nobody waits for is found out."""
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)

    wrong = [
        seen_by_each_block(Card(seed), list(STREAMED) * 3, pin=True)
        != [(index, [index]) for index in list(STREAMED) * 3]
        for seed in range(6)
    ]

    assert any(wrong)


def test_the_next_block_is_on_its_way_while_one_computes():
    card = Card()
    blocks = {index: host_block(index) for index in STREAMED}
    for block in blocks.values():
        block.may_pin = True
    memory = [torch.zeros(1024, dtype=torch.uint8) for _ in range(2)]
    ring = Ring(CudaTransport(card, room=lambda: 10**9), blocks, memory)
    limit = time.monotonic() + 20

    running = ring.acquire(1)[0]
    card.run_until(lambda: bool((memory[1][:40] == 3).all()) or time.monotonic() > limit)

    assert memory[1][:40].unique().tolist() == [3], "nothing of block 3 while block 1 computes"
    assert running.unique().tolist() == [1], "block 1 is not done yet"
    ring.close()


def test_page_locked_memory_is_exact_and_given_back():
    card = Card()
    blocks = {index: host_block(index) for index in STREAMED}
    for block in blocks.values():
        block.may_pin = True
    ring = Ring(
        CudaTransport(card, room=lambda: 10**9), blocks, [torch.zeros(1024, dtype=torch.uint8)]
    )
    for index in STREAMED:
        ring.acquire(index)
        ring.done(index)
    ring.close()

    locked = sum(card.registered.values())
    for block in blocks.values():
        block.pinned = None

    assert locked == sum(block.layout.nbytes for block in blocks.values())
    assert not card.registered


def test_refused_page_locked_memory_is_a_line_in_the_log_and_the_weights_still_arrive(caplog):
    steps = list(STREAMED) * 2

    seen = seen_by_each_block(Card(refuses=True, eager=True), steps, pin=True)

    assert seen == [(index, [index]) for index in steps]
    assert sum("page-locked RAM are not to be had" in line for line in caplog.messages) == 1


def test_no_more_is_page_locked_than_there_is_room_for(caplog):
    card = Card()
    blocks = {index: host_block(index) for index in STREAMED}
    for block in blocks.values():
        block.may_pin = True
    size = blocks[1].layout.nbytes
    limit = int(2.5 * size)
    ring = Ring(
        CudaTransport(card, room=lambda: limit - sum(card.registered.values())),
        blocks,
        [torch.zeros(1024, dtype=torch.uint8)],
    )

    for index in STREAMED:
        ring.acquire(index)
        ring.done(index)

    assert sum(block.pinned is not None for block in blocks.values()) == 2
    ring.close()


def mapped_blocks(file: Path) -> dict[int, HostBlock]:
    """Two blocks of four pages each, views of a new file."""
    file.write_bytes(bytes(8 * PAGE))
    views = MappedFile(file)
    return {
        i: HostBlock(
            [views.tensor(4 * i * PAGE, torch.uint8, (4 * PAGE,))], stamps([file]), Mapped()
        )
        for i in (0, 1)
    }


def test_a_file_changed_under_a_streamed_block_is_raised_where_the_block_runs(tmp_path: Path):
    file = tmp_path / "w.safetensors"
    blocks = mapped_blocks(file)
    transport = CudaTransport(Card(), room=lambda: 0)
    ring = Ring(transport, blocks, [torch.zeros(4 * PAGE, dtype=torch.uint8)])
    ring.acquire(0)
    file.write_bytes(b"1")
    ring.done(0)

    with pytest.raises(CheckpointError, match="w.safetensors was changed on disk"):
        ring.acquire(1)

    ring.close()


@needs_populate
def test_a_page_that_the_disk_does_not_give_is_a_sentence_and_not_the_end(tmp_path, monkeypatch):
    """As after a failed read: to the process a page that is not there looks the same. The stamp,
    which would name a file cut short, is blinded."""
    file = tmp_path / "w.safetensors"
    blocks = mapped_blocks(file)
    monkeypatch.setattr(FileStamp, "check", lambda stamp: None)
    ring = Ring(
        CudaTransport(Card(), room=lambda: 0), blocks, [torch.zeros(4 * PAGE, dtype=torch.uint8)]
    )
    ring.acquire(0)
    os.truncate(file, 5 * PAGE)
    ring.done(0)

    with pytest.raises(CheckpointError, match=r"w.safetensors cannot be read \(Bad address"):
        ring.acquire(1)

    ring.close()
