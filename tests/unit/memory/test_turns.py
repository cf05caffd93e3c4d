"""Who is on the card, and in RAM, between the stages of a run; a card's bytes counted on a CPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lightx2v_core import pipeline, turns
from lightx2v_core.assemble import Parts
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.memory import plan
from lightx2v_core.memory.plan import WORKSPACE_BYTES
from lightx2v_core.memory.residency import Residency
from lightx2v_core.pipeline import GenerateRequest, Pipeline
from lightx2v_core.turns import Turns

CPU = torch.device("cpu")
REQUEST = GenerateRequest("a red circle", size=VideoSize(32, 16, 5), seed=3)


@pytest.fixture
def on_small_card(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> tuple[Pipeline, Residency]:
    """A pipeline on a "card" that holds one of four blocks and both buffers beside a forward."""
    monkeypatch.setattr(Turns, "_on_card", True)
    made = Pipeline(parts, CPU)
    engine, size = made.experts[0].residency, REQUEST.size
    activations = made.turns.activations(made.experts[0], size)
    limit = WORKSPACE_BYTES + activations + engine.card_bytes(1)

    def room() -> float:
        return limit - engine.loaded_bytes - made.text_residency.loaded_bytes

    made.turns._room = room
    monkeypatch.setattr(made, "_room", room)
    return made, engine


@pytest.mark.parametrize(("stay", "in_decode"), [(0, 0), (1, 1), (-1, None)])
def test_only_as_many_blocks_leave_the_card_as_the_other_stages_need(
    on_small_card, parts, monkeypatch, stay, in_decode
):
    made, engine = on_small_card
    room = made._room() - engine.loaded_bytes
    needed = math.inf if stay < 0 else room - engine.card_bytes(stay)
    monkeypatch.setattr(pipeline, "whole_bytes", lambda *_: needed)
    monkeypatch.setattr(made, "_encoder_bytes", lambda: 0)
    seen: dict[str, list[int | None]] = {"text": [], "sampling": [], "decode": []}

    def look(stage: str, _done: int, _total: int) -> None:
        seen[stage].append(None if engine.device is None else engine.resident)

    frames = [made.generate(REQUEST, look).frames for _ in range(2)]
    frames += [made.generate(replace(REQUEST, prompt="a blue square"), look).frames]

    expected = Pipeline(parts, CPU)
    assert torch.equal(frames[0], expected.generate(REQUEST).frames)
    assert torch.equal(frames[1], frames[0])
    assert set(seen["sampling"]) == {1}, "what left came back"
    assert set(seen["decode"]) == {in_decode}
    assert seen["text"] == [None, in_decode, in_decode], "and it stays until the next video"


def test_a_larger_video_after_a_small_one_gets_its_room_from_the_blocks(on_small_card, monkeypatch):
    made, engine = on_small_card
    monkeypatch.setattr(pipeline, "whole_bytes", lambda *_: 0)
    monkeypatch.setattr(made, "_encoder_bytes", lambda: 0)
    large = VideoSize(256, 192, 5)
    needed = made.turns.activations(made.experts[0], large) + WORKSPACE_BYTES
    limit = needed + engine.card_bytes(0)
    made.turns._room = lambda: limit - engine.loaded_bytes - made.text_residency.loaded_bytes
    monkeypatch.setattr(made, "_room", made.turns._room)
    seen: list[tuple[int, float]] = []

    def look(stage: str, _done: int, _total: int) -> None:
        if stage == "sampling":
            seen.append((engine.resident, made._room()))

    made.generate(REQUEST, look)
    made.generate(replace(REQUEST, size=large), look)

    made.generate(REQUEST, look)

    (resident_before, _), (resident_after, room_after), (again, _) = seen[0], seen[4], seen[-1]
    assert resident_after < resident_before == again, "and a small one after it has them back"
    assert room_after >= needed


@pytest.fixture
def on_card(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> tuple[Pipeline, Residency]:
    """A pipeline on a "card" with room for one of four blocks and both buffers beside a stage that
    takes 1 GB more than a forward."""
    monkeypatch.setattr(Turns, "_on_card", True)
    made = Pipeline(parts, CPU)
    engine, size = made.experts[0].residency, REQUEST.size
    others = made.turns.activations(made.experts[0], size) + 10**9 + WORKSPACE_BYTES
    monkeypatch.setattr(pipeline, "whole_bytes", lambda *_: others)
    limit = others + WORKSPACE_BYTES + engine.card_bytes(1)

    def room() -> float:
        return limit - engine.loaded_bytes

    made.turns._room = room
    monkeypatch.setattr(made, "_room", room)
    return made, engine


@pytest.mark.parametrize("lockable", [10**12, 0])
def test_blocks_for_which_other_stages_need_the_room_stream_where_ram_can_be_locked(
    on_card, parts, monkeypatch, lockable
):
    made, engine = on_card
    monkeypatch.setattr(plan, "pinnable_bytes", lambda: lockable)
    if not lockable:  # not a byte more than the other stages need beside one block
        room = made.turns._room
        made.turns._room = lambda: room() - WORKSPACE_BYTES
        monkeypatch.setattr(made, "_room", made.turns._room)
    seen: dict[str, set[int | None]] = {"text": set(), "sampling": set(), "decode": set()}

    def look(stage: str, _done: int, _total: int) -> None:
        seen[stage].add(None if engine.device is None else engine.resident)

    results = [made.generate(replace(REQUEST, prompt=prompt), look) for prompt in ("a", "b", "c")]

    free = Pipeline(parts, CPU)
    for result, prompt in zip(results, ("a", "b", "c"), strict=True):
        assert torch.equal(result.frames, free.generate(replace(REQUEST, prompt=prompt)).frames)
    steady = {"text": {None, 1}, "sampling": {1}, "decode": {1}}
    assert seen == (steady if lockable else {**steady, "sampling": {4}})
    assert [len(result.memory) for result in results] == ([1, 0, 0] if lockable else [1, 1, 1])


def test_more_blocks_stay_with_more_room_and_fewer_beside_larger_stages(on_card, monkeypatch):
    made, engine = on_card
    monkeypatch.setattr(plan, "pinnable_bytes", lambda: 10**12)
    expert, size = made.experts[0], REQUEST.size
    step = engine.block_bytes[0] // 2
    others = made.turns._others(size)

    def resident(room: float, stage: float) -> int:
        made.turns._room = lambda: room - engine.loaded_bytes
        monkeypatch.setattr(pipeline, "whole_bytes", lambda *_: stage)
        made.turns.release(0)
        made.turns.place(expert, size)
        return engine.resident

    least = others + WORKSPACE_BYTES + engine.card_bytes(0)
    by_room = [resident(least + k * step, others) for k in range(11)]
    by_stage = [resident(least + 10 * step, others + k * step) for k in range(11)]

    assert by_room == sorted(by_room) and set(by_room) == {0, 1, 4}
    assert by_stage == by_room[::-1]


@pytest.mark.parametrize("short", [True, False])
def test_page_locked_copies_of_what_is_not_next_leave_where_ram_is_short(parts, monkeypatch, short):
    made = Pipeline(
        replace(parts, low=parts.transformer.with_name("wan2.2_low_noise.safetensors")), CPU
    )
    engines = [expert.residency for expert in made.experts]
    locked = dict.fromkeys((*engines, made.text_residency), 1000)
    kept: list[bool] = []
    monkeypatch.setattr(Residency, "pinned_bytes", property(lambda engine: locked.get(engine, 0)))
    monkeypatch.setattr(Residency, "forget", lambda engine: locked.pop(engine, 0))
    monkeypatch.setattr(turns, "is_ram_short", lambda _bytes: short)
    release = made.text_residency.release

    def watched(keep_pinned: bool = False) -> None:
        kept.append(keep_pinned)
        release(keep_pinned)

    monkeypatch.setattr(made.text_residency, "release", watched)

    made.turns.release(10**9, made.experts[1])
    made._run_text_encoder(["a red circle"])

    assert (engines[0] in locked, engines[1] in locked) == (not short, True)
    assert kept == [not short]
