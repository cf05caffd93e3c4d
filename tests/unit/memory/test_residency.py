from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightx2v_core.assemble import load_text_encoder
from lightx2v_core.errors import CheckpointError
from lightx2v_core.lora.branches import Branch, set_lora
from lightx2v_core.memory.residency import Residency
from lightx2v_core.memory.transport import DirectTransport, HostBlock
from lightx2v_core.wan.model import WanModel
from tests.conftest import VARIANTS, fill, tiny_inputs
from tests.unit.text.samples import official_tensors, spiece_tensor


class Recorder(DirectTransport):
    """A direct transport that notes which bytes it copied."""

    def __init__(self, copies: list[int]) -> None:
        self.copies = copies

    def start(self, slot: int, source: HostBlock, target: torch.Tensor) -> None:
        super().start(slot, source, target)
        self.copies.append(sum(t.nbytes for t in source.tensors))


def model_of(blocks: int = 6) -> WanModel:
    return fill(WanModel(replace(VARIANTS["t2v"], dim=128, ffn_dim=192, num_layers=blocks)))


def placed(budget: float | None, copies: list[int] | None = None, blocks: int = 6):
    """A model streamed on the CPU: into buffers, as it would be on a card."""
    model = model_of(blocks)
    engine = Residency(
        model, make_transport=lambda _device: Recorder([] if copies is None else copies)
    )
    model.run_block = engine.run_block
    engine.place("cpu", budget)
    return model, engine


def budget_for(resident: int, blocks: int = 6) -> int:
    return placed(None, blocks=blocks)[1].card_bytes(resident)


@torch.inference_mode()
def run(model):
    return model(**tiny_inputs(model.config, batch=1))


def test_the_bytes_are_those_of_the_weights():
    model, engine = placed(None)

    assert engine.total_bytes == sum(p.nbytes for p in model.parameters())
    assert engine.loaded_bytes == engine.total_bytes


@pytest.mark.parametrize("resident", [0, 1, 2, 3, 6])
def test_streaming_any_number_of_blocks_gives_the_same_output_bit_for_bit(resident):
    budget = budget_for(resident)

    model, engine = placed(budget)
    outputs = [run(model) for _ in range(3)]

    assert engine.resident == resident
    assert engine.loaded_bytes <= budget
    assert all(torch.equal(output, run(model_of())) for output in outputs)


@pytest.mark.parametrize(("resident", "streamed"), [(0, 6), (3, 3), (6, 0)])
def test_each_step_copies_every_streamed_block_once_and_the_next_step_is_prefetched(
    resident, streamed
):
    copies = []
    model, engine = placed(budget_for(resident), copies)
    before = len(copies)

    run(model)
    first = len(copies)
    run(model)

    assert before == 0, "placing copies nothing into the buffers"
    assert first == (streamed + 2 if streamed else 0)
    assert len(copies) - first == streamed
    assert engine.resident == resident


def test_resident_blocks_lie_between_streamed_ones():
    _, engine = placed(budget_for(4, blocks=8), blocks=8)

    assert engine.resident == 4
    assert engine.streamed == [1, 3, 5, 7]


def test_a_card_too_small_for_two_buffers_streams_through_one():
    smallest = placed(None)[1].least_bytes

    model, engine = placed(smallest)

    assert engine.loaded_bytes == smallest < budget_for(0)
    assert torch.equal(run(model), run(model_of()))


def mixed_block(generator: torch.Generator) -> nn.Module:
    """Every kind of weight that streams: half, fp8 and int8 codes, bytes, a transposed view."""
    block = nn.Module()
    block.halves = nn.Parameter(torch.randn(7, 5, generator=generator).bfloat16(), False)
    block.turned = nn.Parameter(torch.randn(9, 4, generator=generator).t(), False)
    block.bias = nn.Parameter(torch.randn(5, generator=generator), False)
    numbers = torch.randint(-100, 100, (6, 3), generator=generator)
    block.register_buffer("fp8", torch.randn(3, 11, generator=generator).to(torch.float8_e4m3fn))
    block.register_buffer("int8", numbers.to(torch.int8))
    block.register_buffer("nibbles", (numbers + 100).to(torch.uint8))
    return block


def test_every_number_format_arrives_as_it_left():
    generator, seen = torch.Generator().manual_seed(1), []
    model = nn.Module()
    model.blocks = nn.ModuleList(mixed_block(generator) for _ in range(5))
    before = {k: (v, v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    engine = Residency(model)
    engine.place("cpu", 0)

    for index, block in enumerate(model.blocks):

        def look(_x: None, _inputs: None, index: int = index, block: nn.Module = block) -> None:
            seen.extend(
                (f"blocks.{index}.{k}", v, v.clone())
                for k, v in block.state_dict(keep_vars=True).items()
            )

        engine.run_block(index, look, None, None)

    assert len(seen) == len(before)
    for key, during, value in seen:
        own, expected = before[key]
        assert during.dtype == own.dtype and during.stride() == own.stride(), key
        assert torch.equal(value.float(), expected.float()), key
        assert isinstance(during, nn.Parameter) == isinstance(own, nn.Parameter), key
    after = model.state_dict(keep_vars=True)
    assert all(after[key] is own for key, (own, _) in before.items())


def test_tree_keys_and_parameters_are_the_same_before_and_after():
    model, _ = placed(0)
    before = dict(model.named_parameters())

    run(model)

    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())


def test_weights_are_back_after_an_exception_inside_a_block():
    model, _ = placed(0)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    handle = model.blocks[1].ffn[2].register_forward_hook(lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        run(model)

    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    handle.remove()
    assert torch.equal(run(model), run(model_of()))


def test_blocks_may_run_in_any_order():
    model, _ = placed(0)
    expected = [p.clone() for p in model.parameters()]
    engine = model.run_block.__self__

    for index in (3, 3, 0, 5, 1, 2, 0):
        block = model.blocks[index]
        wanted = [p.clone() for p in block.parameters()]
        engine.run_block(index, lambda *_: None, None, None)
        engine.enter(index)
        found = [p.clone() for p in block.parameters()]
        engine.leave(index)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))

    assert all(torch.equal(a, b) for a, b in zip(expected, model.parameters(), strict=True))


def test_hooked_blocks_stream_when_somebody_else_calls_them():
    blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
    model, x = nn.Module(), torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    model.blocks = fill(blocks)
    expected = nn.Sequential(*blocks)(x)
    pointers, seen = [b.weight.data_ptr() for b in blocks], set()
    engine = Residency(model)
    engine.hook(blocks)
    engine.place("cpu", 0)

    for block in blocks:
        handle = block.register_forward_hook(lambda b, *_: seen.add(b.weight.data_ptr()))
        x = block(x)
        handle.remove()

    assert torch.equal(x, expected)
    assert [b.weight.data_ptr() for b in blocks] == pointers
    assert len(seen | set(pointers)) >= 5


@pytest.mark.parametrize("blocks", [2, 6])
def test_shrinking_frees_at_least_what_was_asked_and_reports_it(blocks):
    model, engine = placed(None, blocks=blocks)
    loaded = engine.loaded_bytes

    freed = engine.shrink(1)

    assert freed == loaded - engine.loaded_bytes > 0
    assert torch.equal(run(model), run(model_of(blocks)))


def test_growing_and_shrinking_between_runs_changes_nothing():
    model, engine = placed(0)
    expected, counts = run(model_of()), []

    for budget, less in ((budget_for(2), 0), (None, budget_for(3)), (budget_for(3), 0)):
        engine.place("cpu", budget)
        engine.shrink(less)
        counts.append(engine.resident)
        assert torch.equal(run(model), expected)

    assert counts[0] == 2 and counts[2] == 3


def test_release_leaves_nothing_loaded_and_the_model_still_runs():
    model, engine = placed(0)
    run(model)

    engine.release()

    assert (engine.loaded_bytes, engine.resident) == (0, 0)
    assert torch.equal(run(model), run(model_of()))


class Pinning(Recorder):
    """A transport that keeps a copy of each block it read, as page-locked RAM does."""

    def start(self, slot: int, source: HostBlock, target: torch.Tensor) -> None:
        super().start(slot, source, target)
        source.pinned = torch.zeros(source.layout.nbytes, dtype=torch.uint8)


def test_page_locked_copies_that_were_kept_are_given_up_when_ram_is_wanted():
    model = model_of()
    engine = Residency(model, make_transport=lambda _device: Pinning([]))
    model.run_block = engine.run_block
    engine.place("cpu", 0)
    run(model)
    held = engine.pinned_bytes

    while_streaming = engine.unpin(held)
    engine.release(keep_pinned=True)
    kept = engine.pinned_bytes
    freed = [engine.unpin(1), engine.unpin(held), engine.unpin(held)]

    assert (while_streaming, kept) == (0, held)
    assert freed == [held // 6, held - held // 6, 0]
    assert engine.pinned_bytes == 0
    assert torch.equal(run(model), run(model_of()))


@pytest.mark.parametrize("budget", [0, None])
def test_small_weights_that_are_replaced_leave_the_blocks_where_they_are(budget):
    copies: list[int] = []
    model, engine = placed(budget, copies)
    run(model)
    norm, before = model.blocks[1].norm3, (engine.resident, len(copies))

    engine.lift([norm.weight, model.blocks[2].ffn[0].bias])
    norm.weight = nn.Parameter(norm.weight * 2, requires_grad=False)
    engine.place("cpu", budget)

    other = model_of()
    other.blocks[1].norm3.weight.data *= 2
    assert (engine.resident, len(copies)) == before
    assert torch.equal(run(model), run(other))


def test_a_block_whose_matrix_is_replaced_is_placed_anew():
    model, engine = placed(0)
    run(model)
    linear = model.blocks[1].ffn[0]

    engine.lift([linear.weight, model.blocks[2].ffn[0].bias])
    placed_after = engine.device
    linear.weight = nn.Parameter(linear.weight * 2, requires_grad=False)
    engine.place("cpu", 0)

    other = model_of()
    other.blocks[1].ffn[0].weight.data *= 2
    assert placed_after is None
    assert torch.equal(run(model), run(other))


def test_lora_branches_are_counted_and_come_back_as_they_were():
    model, engine = placed(None)
    before = engine.total_bytes
    engine.release()
    set_lora(model, {"blocks.0.ffn.0": (Branch(torch.ones(4, 128), torch.ones(192, 4), 1.0),)})
    own = model.blocks[0].ffn[0].branches

    engine.place("cpu")
    engine.release()

    assert engine.total_bytes - before == 4 * (128 + 192) * 4
    assert model.blocks[0].ffn[0].branches is own


def test_the_model_dies_with_its_last_reference():
    model, engine = placed(0)
    run(model)
    alive = weakref.ref(model)
    gc.disable()

    del model

    gc.enable()
    assert alive() is None, "the engine keeps the model alive"
    assert engine.resident == 0


def test_the_weights_die_with_model_and_engine():
    model, engine = placed(0)
    run(model)
    alive = weakref.ref(model.blocks[3].ffn[0])
    gc.disable()

    del model, engine

    gc.enable()
    assert alive() is None, "something in the engine is a cycle"


def test_a_file_changed_while_its_weights_are_in_use_is_named(tmp_path: Path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"a" * 10)
    engine = Residency(model_of(2), [file])
    engine.place("cpu")
    engine.release()
    file.write_bytes(b"b" * 4)

    with pytest.raises(CheckpointError, match=r"weights.safetensors was changed .*10 bytes.*4 now"):
        engine.place("cpu")

    file.unlink()
    with pytest.raises(CheckpointError, match="is gone, and weights are still read from it"):
        engine.place("cpu")


def test_the_text_encoder_streams_bit_for_bit(tmp_path: Path):
    file = tmp_path / "umt5.safetensors"
    save_file(official_tensors(dim=64) | {"spiece_model": spiece_tensor()}, file)
    encoder = load_text_encoder(file)
    names = list(encoder.state_dict())
    engine = Residency(encoder, [file])
    engine.hook(encoder.blocks)
    expected = encoder.encode(["a red circle"])

    engine.place("cpu", 0)
    states = [encoder.encode(["a red circle"]) for _ in range(2)]

    assert engine.resident == 0 and len(engine.block_bytes) > 1
    assert all(torch.equal(s, expected) for s in states)
    assert list(encoder.state_dict()) == names
