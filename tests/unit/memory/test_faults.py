"""Faults on the way from words to frames: what is survived, what is said, what is kept."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightx2v_core import assemble, turns
from lightx2v_core.assemble import Parts
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.errors import CapabilityError, CheckpointError
from lightx2v_core.memory import residency
from lightx2v_core.memory.plan import WORKSPACE_BYTES
from lightx2v_core.pipeline import GenerateRequest, Pipeline
from lightx2v_core.wan.model import WanModel
from lightx2v_core.wan.vae import WanVae, normalise
from tests.conftest import VARIANTS, fill, tiny_inputs
from tests.unit.memory.conftest import needs_populate

CPU = torch.device("cpu")
REQUEST = GenerateRequest("a red circle", size=VideoSize(32, 16, 5), seed=3)
SMOKE = torch.cuda.OutOfMemoryError("tried to allocate 2.00 GiB")


@pytest.fixture(scope="module")
def expected(parts: Parts) -> torch.Tensor:
    return Pipeline(parts, CPU).generate(REQUEST).frames


def fail_once(function: Callable, at: int, times: int = 1) -> Callable:
    """`function`, which runs out of memory at call number `at` and `times - 1` calls after it."""
    calls = []

    def failing(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if at <= len(calls) < at + times:
            raise SMOKE
        return function(*args, **kwargs)

    return failing


def least_limit(made: Pipeline) -> int:
    """The smallest --vram-gb, in bytes, that the planner accepts for REQUEST."""
    expert, size = made.experts[0], REQUEST.size
    assert size is not None
    return expert.residency.least_bytes + made.turns.activations(expert, size) + WORKSPACE_BYTES


@pytest.mark.parametrize("blocks", [0, 2])
def test_under_a_limit_the_frames_are_the_same_bit_for_bit(parts, expected, blocks, caplog):
    made = Pipeline(parts, CPU)
    least = least_limit(made)
    more = sum(made.experts[0].residency.block_bytes[:blocks])
    made.vram_bytes = least + more

    with caplog.at_level("INFO"):
        result = made.generate(REQUEST)

    assert torch.equal(result.frames, expected)
    assert re.fullmatch(r"high-noise transformer: resident [01]/4 .* activations", *result.memory)
    assert result.memory[0] in caplog.text


def test_a_limit_that_cannot_hold_is_refused_with_numbers_and_the_cheapest_changes(parts):
    made = Pipeline(parts, CPU, vram_bytes=10**8)

    with pytest.raises(
        CapabilityError, match=r"transformer needs 0\.3 GB on cpu .* 0\.1 GB may be used; an fp8"
    ):
        made.generate(REQUEST)

    assert all(e.residency.device is None for e in made.experts)


def test_running_out_of_memory_in_step_three_costs_one_more_step_and_no_bit(parts, expected):
    made = Pipeline(parts, CPU)
    model = made.experts[0].model
    original, model.forward = model.forward, fail_once(model.forward, at=3)

    result = made.generate(REQUEST)

    model.forward = original
    assert torch.equal(result.frames, expected)


def test_running_out_twice_in_one_step_escapes_with_advice(parts, caplog):
    made = Pipeline(parts, CPU)
    model = made.experts[0].model
    model.forward = fail_once(model.forward, at=3, times=2)

    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"2\.00 GiB"):
        made.generate(REQUEST)

    assert "out of memory again; 1 frames in place of 5" in caplog.text
    assert "an fp8 file" in caplog.text


def test_running_out_of_memory_while_loading_loads_fewer_blocks(parts, expected, caplog):
    made = Pipeline(parts, CPU)
    engine = made.experts[0].residency
    made.vram_bytes = least_limit(made) + sum(engine.block_bytes)
    engine.place = fail_once(engine.place, at=1)

    result = made.generate(REQUEST)

    assert torch.equal(result.frames, expected)
    assert "out of memory while loading" in caplog.text


@pytest.mark.parametrize(
    ("times", "told"),
    [(1, "whole, with everything else off the card"), (2, "tiles of 256 pixels")],
)
def test_running_out_of_memory_in_decode_goes_down_the_ladder(
    parts, expected, times, told, monkeypatch, caplog
):
    made = Pipeline(parts, CPU)
    monkeypatch.setattr(WanVae, "decode", fail_once(WanVae.decode, at=1, times=times))

    result = made.generate(REQUEST)

    assert torch.equal(result.frames, expected), "one tile is the whole"
    assert told in caplog.text


def test_when_no_tile_fits_the_latent_is_kept_and_named(parts, expected, tmp_path, monkeypatch):
    made, rescue = Pipeline(parts, CPU), tmp_path / "new" / "a.latent"
    monkeypatch.setattr(WanVae, "decode", fail_once(WanVae.decode, at=1, times=9))

    with pytest.raises(CapabilityError, match=r"2\.00 GiB.* saved as .*a\.latent: .*LoadLatent"):
        made.generate(REQUEST, rescue=rescue)

    monkeypatch.undo()
    latent = normalise(load_file(rescue)["latent_tensor"])
    frames = made.vae.decode(latent)[0].permute(1, 2, 3, 0)
    again = ((frames + 1) * 127.5).round().to(torch.uint8)
    assert (again.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("other_disk_is_full", [False, True])
def test_a_latent_on_a_full_disk_goes_elsewhere_or_the_message_says_that_it_is_lost(
    parts, tmp_path, monkeypatch, other_disk_is_full
):
    (tmp_path / "blocked").write_text("a file where a folder should be")
    other = tmp_path / ("blocked" if other_disk_is_full else "temporary")
    monkeypatch.setattr("tempfile.tempdir", str(other))
    monkeypatch.setattr(WanVae, "decode", fail_once(WanVae.decode, at=1, times=9))
    words = r"latent of this run is lost: .*a\.latent could not be written"
    kept = other / "lightx2v" / "a.latent"

    with pytest.raises(
        CapabilityError, match=words if other_disk_is_full else f"saved as {kept}: ComfyUI"
    ):
        Pipeline(parts, CPU).generate(REQUEST, rescue=tmp_path / "blocked" / "a.latent")

    assert kept.is_file() is not other_disk_is_full


def test_too_little_ram_for_a_cast_is_refused_before_the_file_is_read(parts, monkeypatch):
    monkeypatch.setattr("lightx2v_core.memory.plan.available_bytes", lambda: 10**6)

    with pytest.raises(
        CapabilityError, match=r"wan2.2_high_noise.safetensors needs 0\.0 GB of RAM"
    ):
        assemble.load_transformer(parts.transformer, torch.float32)


def test_a_file_replaced_between_two_runs_is_named(parts, tmp_path):
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(parts.transformer.read_bytes())
    made = Pipeline(replace(parts, transformer=copy), CPU)
    made.generate(REQUEST)
    copy.write_bytes(b"short")

    with pytest.raises(CheckpointError, match=r"model.safetensors was changed on disk"):
        made.generate(REQUEST)


@needs_populate
@pytest.mark.parametrize("blocks", [0, 9], ids=["streamed", "in place"])
def test_a_file_cut_short_between_two_blocks_is_named_and_the_process_lives(tmp_path, blocks):
    """To touch what is gone would end the process with SIGBUS."""
    config = replace(VARIANTS["t2v"], num_layers=4)
    file = tmp_path / "model.safetensors"
    save_file(fill(WanModel(config)).state_dict(), file)
    loaded = assemble.load_transformer(file, torch.float32)
    engine, model = loaded.residency, loaded.model
    engine.place("cpu", engine.card_bytes(0) + sum(engine.block_bytes[:blocks]))
    model.blocks[1].register_forward_hook(lambda *_: os.truncate(file, 10_000))
    entries = tiny_inputs(config)

    with pytest.raises(CheckpointError, match=r"model.safetensors was changed on disk"):
        model(*entries.values())

    assert engine.resident == (4 if blocks else 0)


@needs_populate
def test_a_file_cut_short_while_its_weights_are_cast_is_a_sentence(tmp_path):
    file = tmp_path / "model.safetensors"
    weights = {k: v.bfloat16() for k, v in fill(WanModel(VARIANTS["t2v"])).state_dict().items()}
    save_file(weights, file)
    opened = open_checkpoint(file)
    opened.tensors({name: name for name in list(opened.headers)[:1]})
    os.truncate(file, 100_000)

    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read \(Bad address"):
        assemble.load_transformer(opened, torch.float32)


def anonymous_bytes() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"^Anonymous:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


needs_smaps = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").is_file(), reason="needs Linux's smaps_rollup"
)


@needs_smaps
def test_a_forgotten_model_leaves_less_than_one_percent_in_ram_and_comes_back(tmp_path):
    config = replace(VARIANTS["t2v"], dim=512, ffn_dim=1536, num_layers=6)
    model = fill(WanModel(config))
    file = tmp_path / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in model.state_dict().items()}, file)
    del model
    gc.collect()
    residency.trim()
    loaded = assemble.load_transformer(file, torch.float32)
    pattern = [p.flatten()[:50].clone() for p in loaded.model.parameters()]
    size, full = sum(loaded.residency.block_bytes), anonymous_bytes()
    names = list(loaded.model.state_dict())

    freed = loaded.residency.forget()
    empty = anonymous_bytes()
    loaded.residency.place("cpu")

    assert freed == size and loaded.residency.ram_bytes() == 0
    assert full - empty > 0.99 * size, f"{(full - empty) / size:.3f} of the blocks left RAM"
    assert list(loaded.model.state_dict()) == names
    assert all(
        torch.equal(before, p.flatten()[:50])
        for before, p in zip(pattern, loaded.model.parameters(), strict=True)
    )


@contextmanager
def ram_short(monkeypatch: pytest.MonkeyPatch, short: bool) -> Iterator[None]:
    with monkeypatch.context() as patched:
        for module in (turns, assemble):
            patched.setattr(module, "is_ram_short", lambda _bytes: short)
        yield


@pytest.mark.parametrize("short", [True, False])
def test_of_two_experts_one_leaves_ram_only_where_both_do_not_fit(parts, monkeypatch, short):
    low = parts.transformer.with_name("wan2.2_low_noise.safetensors")
    pair = replace(parts, low=low)
    reference = Pipeline(pair, CPU).generate(REQUEST).frames

    with ram_short(monkeypatch, short):
        made = Pipeline(pair, CPU)
        first, second = made.experts
        alone = first.residency.ram_bytes()
        frames = [made.generate(REQUEST).frames for _ in range(2)]
        during = []
        second.model.register_forward_hook(lambda *_: during.append(first.residency.ram_bytes()))
        frames.append(made.generate(REQUEST).frames)

    size = sum(first.residency.block_bytes)
    assert all(torch.equal(f, reference) for f in frames)
    assert alone == (size if short else 0), "the first leaves while the second is loaded"
    assert set(during) == {size if short else 0}
