from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from lightx2v_core.lora.branches import Branch, set_lora
from lightx2v_core.memory.residency import Residency
from lightx2v_core.wan.model import WanModel
from tests.conftest import VARIANTS, fill, tiny_inputs


def four_blocks() -> WanModel:
    return fill(WanModel(replace(VARIANTS["t2v"], num_layers=4)))


def placed(budget: float | None, copies: list[int] | None = None):
    """A model streamed on the CPU: fetching makes a copy, as it would onto a card."""

    def fetch(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if copies is not None:
            copies.append(tensor.nbytes)
        return tensor.detach().clone()

    model = four_blocks()
    engine = Residency(model, fetch)
    model.run_block = engine.run_block
    engine.place("cpu", budget)
    return model, engine


@torch.inference_mode()
def run(model):
    return model(**tiny_inputs(model.config, batch=1))


def test_the_bytes_are_those_of_the_weights():
    model, engine = placed(None)

    assert engine.total_bytes == sum(p.nbytes for p in model.parameters())
    assert engine.loaded_bytes == engine.total_bytes


@pytest.mark.parametrize("resident", [0, 1, 2, 4])
def test_streaming_any_number_of_blocks_gives_the_same_output_bit_for_bit(resident):
    plain, copies = four_blocks(), []
    sizes = placed(None)[1]
    budget = sizes.rest_bytes + sum(sizes.block_bytes[:resident]) + sizes.block_bytes[-1]
    model, engine = placed(budget if resident < 4 else None, copies)
    copies.clear()

    output = run(model)

    assert engine.resident == resident
    assert torch.equal(output, run(plain))
    assert sum(copies) == sum(engine.block_bytes[resident:])
    assert engine.loaded_bytes <= budget


def test_after_a_block_ran_its_own_weights_are_back():
    model, _ = placed(0)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}

    run(model)

    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def test_weights_are_back_after_an_exception_inside_a_block():
    model, _ = placed(0)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    model.blocks[1].ffn[2].register_forward_hook(lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        run(model)

    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def test_shrinking_frees_at_least_what_was_asked_and_reports_it():
    model, engine = placed(None)
    loaded = engine.loaded_bytes

    freed = engine.shrink(1)

    assert freed == loaded - engine.loaded_bytes
    assert torch.equal(run(model), run(four_blocks()))


def test_release_leaves_nothing_loaded_and_the_model_still_runs():
    model, engine = placed(None)

    engine.release()

    assert (engine.loaded_bytes, engine.resident) == (0, 0)
    assert torch.equal(run(model), run(four_blocks()))


def test_lora_branches_are_counted():
    model, engine = placed(None)
    before = engine.total_bytes

    set_lora(model, {"blocks.0.ffn.0": (Branch(torch.ones(4, 256), torch.ones(512, 4), 1.0),)})

    assert engine.total_bytes - before == 4 * (256 + 512) * 4


def test_the_model_dies_with_its_last_reference():
    model, engine = placed(None)
    alive = weakref.ref(model)
    gc.disable()

    del model

    gc.enable()
    assert alive() is None, "the engine keeps the model alive"
    assert engine.resident == 4
