from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from lightx2v_core.datatypes import SamplerPlan
from lightx2v_core.errors import RequestError
from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.branches import branch_bytes
from lightx2v_core.lora.read import LoraFile, read_lora
from lightx2v_core.lora.steps import describe_strengths, read_strengths, steps_of
from lightx2v_core.memory.residency import Residency
from lightx2v_core.sampling.loop import sample
from lightx2v_core.wan.model import WanModel
from tests.conftest import relative_error, tiny_inputs, tiny_model
from tests.unit.lora.samples import every_kind, run, written

PLAN = SamplerPlan((1.0, 0.9375, 0.8333, 0.625, 0.0))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> LoraFile:
    return read_lora(written(tmp_path_factory.mktemp("lora"), every_kind(tiny_model())))


def with_lora(*loras) -> WanModel:
    model = tiny_model()
    apply_loras(model, loras)
    return model


def sampled(models: list[WanModel], experts: tuple[int, ...] = ()) -> torch.Tensor:
    """A whole run of PLAN, as the pipeline makes it."""
    plan, inputs = replace(PLAN, experts=experts), tiny_inputs(models[0].config, batch=1)

    def denoise(x, sigma, step):
        model = models[plan.expert_at(step)]
        steps_of(model).follow(step, plan.steps)
        return model(x, torch.tensor([1000 * sigma]), inputs["text_BSE"])

    return sample(denoise, inputs["x_BCTHW"], plan, torch.Generator())


def test_strengths_by_step_equal_a_run_whose_second_half_has_no_lora(lora):
    listed = sampled([with_lora((lora, (0.8, 0.8, 0.0, 0.0)))])
    halves = sampled([with_lora((lora, 0.8)), tiny_model()], experts=(0, 0, 1, 1))

    assert torch.equal(listed, halves)
    assert relative_error(listed, sampled([with_lora((lora, 0.8))])) > 1e-2


def test_the_list_of_the_second_expert_counts_the_steps_of_both(lora):
    experts = [with_lora((lora, (0.8, 0.3, 9.0, 9.0))), with_lora((lora, (9.0, 9.0, 0.5, 0.0)))]

    both = sampled(experts, experts=(0, 0, 1, 1))

    assert torch.equal(both, sampled([with_lora((lora, (0.8, 0.3, 0.5, 0.0)))]))


def test_equal_strengths_are_the_one_strength_and_zeros_are_no_lora_bit_for_bit(lora):
    assert torch.equal(sampled([with_lora((lora, (0.7,) * 4))]), sampled([with_lora((lora, 0.7))]))
    assert torch.equal(sampled([with_lora((lora, (0.0,) * 4))]), sampled([tiny_model()]))


def test_a_zero_among_the_steps_is_no_lora_bit_for_bit(lora):
    model = with_lora((lora, (0.5, 0.0)))

    steps_of(model).follow(1, 2)
    without = run(model)
    steps_of(model).follow(0, 2)

    assert torch.equal(without, run(tiny_model()))
    assert torch.equal(run(model), run(with_lora((lora, 0.5))))


def test_a_constant_lora_beside_a_changing_one_keeps_its_strength(lora):
    model = with_lora((lora, (0.5, 0.0)), (lora, 0.25))

    steps_of(model).follow(1, 2)

    assert torch.equal(run(model), run(with_lora((lora, 0.25))))


def test_streamed_blocks_follow_the_steps_as_resident_ones_do(lora):
    streamed, resident = tiny_model(), with_lora((lora, (0.5, 0.2)))
    engine = Residency(streamed)
    streamed.run_block = engine.run_block
    apply_loras(streamed, [(lora, (0.5, 0.2))])
    engine.place("cpu", 0)

    for step in (0, 1, 0):
        for model in (streamed, resident):
            steps_of(model).follow(step, 2)

        assert engine.resident == 0
        assert torch.equal(run(streamed), run(resident))


def test_removing_changing_loras_restores_every_tensor_and_forgets_the_steps(lora):
    model = tiny_model()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    apply_loras(model, [(lora, (0.5, 0.2))])
    steps_of(model).follow(1, 2)

    apply_loras(model, [])

    steps_of(model).follow(0, 7)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert torch.equal(run(model), run(tiny_model()))


def test_ten_strengths_in_a_row_hold_as_many_tensors_as_one(lora):
    model, counts, held = tiny_model(), [], []
    shared = {pair.up_MR.data_ptr() for pair in lora.pairs.values()}

    for step in range(1, 11):
        apply_loras(model, [(lora, step / 10)])
        if step in (1, 10):
            gc.collect()
            counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
        held.append(branch_bytes(model))

    branches = [b for m in model.modules() for b in getattr(m, "branches", ())]
    assert len(set(counts)) == len(set(held)) == 1
    assert {b.up_MR.data_ptr() for b in branches if b.up_MR is not None} <= shared, "no copies"


@pytest.mark.parametrize("steps", [3, 5])
def test_a_wrong_number_of_strengths_is_told_before_the_run(lora, steps):
    model = with_lora((lora, (1.0, 1.0, 0.6, 0.0)))

    with pytest.raises(RequestError, match=f"has 4 strengths and the run has {steps} steps"):
        steps_of(model).check(steps)


def test_strengths_are_read_and_told_in_words():
    assert read_strengths("0.8") == 0.8
    assert read_strengths(" 1, 1,0.6 ; 0 ") == (1.0, 1.0, 0.6, 0.0)
    assert describe_strengths(0.8) == "0.8"
    assert describe_strengths((1.0, 0.6, 0.0)) == "by step 1, 0.6, 0"


@pytest.mark.parametrize("text", ["1,,0", "much", "", "1,nan", "inf"])
def test_what_is_no_list_of_strengths_is_a_sentence(text):
    with pytest.raises(RequestError, match=r"LoRA strengths .* are not"):
        read_strengths(text)
