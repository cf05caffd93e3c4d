"""Who is on the card, and in RAM, between the stages of a run; a card's bytes counted on a CPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightx2v_core import pipeline, turns
from lightx2v_core.assemble import Parts
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.memory import codec
from lightx2v_core.memory.plan import WORKSPACE_BYTES
from lightx2v_core.memory.residency import Residency
from lightx2v_core.pipeline import GenerateRequest, Pipeline
from lightx2v_core.turns import Turns
from tests.unit.memory.test_faults import fail_once

CPU, META = torch.device("cpu"), torch.device("meta")
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

    (resident_before, _), (resident_after, room_after) = seen[0], seen[-1]
    assert resident_after < resident_before
    assert room_after >= needed


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


def test_a_borrowed_encoder_gets_its_own_tensors_back_whatever_happened(monkeypatch):
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def now() -> dict[str, int]:
        return {n: id(t) for n, t in (*module.named_parameters(), *module.named_buffers())}

    homes = now()
    with pytest.raises(ValueError, match="inside"), codec.borrowed(module, META):
        moved = {tensor.device for tensor in module.state_dict().values()}
        raise ValueError("inside")
    after = now()
    monkeypatch.setattr(codec, "to_device", fail_once(codec.to_device, at=1))
    with pytest.raises(torch.cuda.OutOfMemoryError), codec.borrowed(module, META):
        pytest.fail("nothing was lent")

    assert moved == {META}
    assert after == now() == homes


def test_an_encoder_that_does_not_fit_beside_others_is_lent_when_they_have_left(
    monkeypatch, caplog
):
    module, freed = nn.Linear(4, 4), []
    monkeypatch.setattr(codec, "to_device", fail_once(codec.to_device, at=1))

    with codec.borrowed(module, META, lambda: freed.append(1)):
        moved = module.weight.device

    assert moved == META and freed == [1]
    assert "everything else leaves" in caplog.text
