from __future__ import annotations

import pytest
import torch

from lightx2v_core.errors import CheckpointError
from lightx2v_core.lora.branches import Branch, branch_bytes, set_lora
from tests.conftest import relative_error, tiny_inputs, tiny_model
from tests.tolerances import FLOAT32_PARITY

LAYER = "blocks.1.ffn.0"


def low_rank(gain: float = 0.7) -> Branch:
    generator = torch.Generator().manual_seed(4)
    down, up = torch.randn(8, 256, generator=generator), torch.randn(512, 8, generator=generator)
    return Branch(down * 0.1, up * 0.1, gain)


@torch.inference_mode()
def run(model):
    return model(**tiny_inputs(model.config, batch=1))


@pytest.mark.parametrize("form", ["low rank", "full difference", "both"])
def test_a_branch_equals_the_merged_weight(form):
    pair = low_rank()
    dense = Branch(pair.up_MR @ pair.down_RK, None, 0.3)
    branches = {"low rank": (pair,), "full difference": (dense,), "both": (pair, dense)}[form]
    merged, branched = tiny_model(), tiny_model()
    delta = sum(b.gain * (b.down_RK if b.up_MR is None else b.up_MR @ b.down_RK) for b in branches)
    merged.get_submodule(LAYER).weight.data += delta

    set_lora(branched, {LAYER: branches})

    assert relative_error(run(branched), run(merged)) <= FLOAT32_PARITY
    assert relative_error(run(branched), run(tiny_model())) > 1e-3


def test_strength_zero_is_no_lora_bit_for_bit():
    model = tiny_model()

    set_lora(model, {LAYER: (low_rank(gain=0.0),)})

    assert torch.equal(run(model), run(tiny_model()))
    assert branch_bytes(model) == 0


def test_removing_restores_bit_for_bit_and_keys_never_change():
    model, plain = tiny_model(), tiny_model()

    set_lora(model, {LAYER: (low_rank(),)})
    keys_with = list(model.state_dict())
    set_lora(model, {})

    assert keys_with == list(plain.state_dict())
    assert torch.equal(run(model), run(plain))


def test_a_second_set_replaces_the_first():
    model, other = tiny_model(), tiny_model()
    set_lora(
        model, {LAYER: (low_rank(),), "blocks.0.self_attn.q": (Branch(torch.eye(256), None, 1),)}
    )

    set_lora(model, {LAYER: (low_rank(),)})
    set_lora(other, {LAYER: (low_rank(),)})

    assert torch.equal(run(model), run(other))


def test_an_unknown_layer_is_refused_and_nothing_is_applied():
    model = tiny_model()

    with pytest.raises(CheckpointError, match=r"1 of 2 LoRA layers do not exist .*blocks\.9\.x"):
        set_lora(model, {LAYER: (low_rank(),), "blocks.9.x": (low_rank(),)})

    assert branch_bytes(model) == 0
