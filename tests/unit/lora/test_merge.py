from __future__ import annotations

import pytest
import torch

from lightx2v_core.assemble import swap_linears
from lightx2v_core.checkpoint.stored import Codes
from lightx2v_core.errors import CapabilityError, RequestError
from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.branches import Branch, branch_bytes, set_lora
from lightx2v_core.lora.read import read_lora
from lightx2v_core.memory.residency import Residency
from lightx2v_core.quant.schemes import LINEARS, PLAIN
from lightx2v_core.wan.model import WanModel
from tests.conftest import relative_error, tiny_model
from tests.tolerances import FLOAT32_PARITY
from tests.unit.lora.samples import every_kind, pair, run, written

LAYER = "blocks.0.self_attn.q"


def quantised(scheme: str) -> WanModel:
    """A model whose block linears hold codes of `scheme` that stand for about its weights."""
    model, plain = tiny_model(), tiny_model()
    names = [
        n for n, m in model.named_modules() if n.startswith("blocks") and hasattr(m, "branches")
    ]
    dtype = {"int8": torch.int8, "fp8-e5m2": torch.float8_e5m2}.get(
        scheme.removesuffix("-row").removesuffix("-tensor"), torch.float8_e4m3fn
    )
    scaled, by_row = scheme not in ("fp8-cast", "fp8-e5m2"), scheme.endswith("-row")
    stored = Codes(scheme, (dtype, () if scaled else None))
    swap_linears(model, dict.fromkeys(names, stored), "")
    for name in names:
        linear, weight = model.get_submodule(name), plain.get_submodule(name).weight
        largest = weight.abs().amax(1, keepdim=True) if by_row else weight.abs().max()
        scale = largest / 127 if scaled else torch.ones(())
        codes = weight / scale
        linear.weight = (codes.round() if dtype == torch.int8 else codes).to(dtype)
        linear.weight_scale = scale if scaled else None
        linear.bias = plain.get_submodule(name).bias
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merging_adds_in_float32_and_rounds_once(tmp_path, dtype):
    model, tensors = tiny_model().to(dtype), pair(LAYER)
    up, down = tensors.values()
    weight = model.get_submodule(LAYER).weight.detach().clone()
    lora = read_lora(written(tmp_path, {k: v.to(torch.bfloat16) for k, v in tensors.items()}))

    apply_loras(model, [(lora, 0.7)], merge=True)

    change = 0.7 * (up.to(torch.bfloat16).float() @ down.to(torch.bfloat16).float())
    assert torch.equal(model.get_submodule(LAYER).weight, (weight.float() + change).to(dtype))
    assert branch_bytes(model) == 0


def test_merged_equals_branches_and_taking_it_off_restores_every_tensor(tmp_path):
    merged, branched = tiny_model(), tiny_model()
    lora = read_lora(written(tmp_path, every_kind(merged)))
    before = {name: p.data_ptr() for name, p in merged.named_parameters()}

    apply_loras(merged, [(lora, 0.7), (lora, 0.2)], merge=True)
    apply_loras(branched, [(lora, 0.7), (lora, 0.2)])

    assert relative_error(run(merged), run(branched)) <= FLOAT32_PARITY
    apply_loras(merged, [])
    assert {name: p.data_ptr() for name, p in merged.named_parameters()} == before


def test_merging_at_strength_zero_leaves_the_loaded_tensors_in_place(tmp_path):
    model = tiny_model()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}

    apply_loras(model, [(read_lora(written(tmp_path, every_kind(model))), 0.0)], merge=True)

    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("scheme", ["fp8-e5m2", "int8-row"])
def test_merging_into_a_quantised_base_is_refused_and_changes_nothing(tmp_path, scheme):
    model, lora = quantised(scheme), read_lora(written(tmp_path, every_kind(tiny_model())))
    before = {name: t.data_ptr() for name, t in model.state_dict().items()}

    with pytest.raises(CapabilityError, match=r"^blocks\.\S+ is stored as (float8|int8)\w*, and"):
        apply_loras(model, [(lora, 1.0)], merge=True)

    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == before


def test_strengths_by_step_cannot_be_merged(tmp_path):
    lora = read_lora(written(tmp_path, pair(LAYER)))

    with pytest.raises(RequestError, match=r"a strength for each step, which cannot be merged"):
        apply_loras(tiny_model(), [(lora, (1.0, 0.0))], merge=True)


@pytest.mark.parametrize("scheme", [s for s in LINEARS if s.startswith(("fp8", "int8"))])
def test_a_lora_adds_the_same_to_codes_as_to_the_weights_they_stand_for(tmp_path, scheme):
    model, meant = quantised(scheme), tiny_model()
    for name, linear in model.named_modules():
        if hasattr(linear, "dequantise"):
            meant.get_submodule(name).weight.data = linear.dequantise(torch.float32)
    lora, plain = read_lora(written(tmp_path, every_kind(meant))), run(meant)

    for each in (model, meant):
        apply_loras(each, [(lora, 0.7)])

    effect = run(meant) - plain
    assert relative_error(run(model) - plain, effect) <= FLOAT32_PARITY
    assert relative_error(run(meant), plain) > 1e-2


@pytest.mark.parametrize("scheme", LINEARS)
def test_every_scheme_has_a_slot_for_branches(scheme):
    assert LINEARS[scheme].branches == (), "LoRA would have no place beside such weights"
    assert set(PLAIN) <= set(LINEARS)


def test_an_idle_branch_leaves_negative_zero_as_it_is():
    model = tiny_model()
    linear = model.get_submodule(LAYER)
    linear.weight.data.zero_()
    linear.bias.data.fill_(-0.0)
    set_lora(model, {LAYER: (Branch(torch.ones(4, 256), torch.ones(256, 4), 1.0),)})

    with torch.no_grad():
        linear.branches = (Branch(torch.ones(4, 256), torch.ones(256, 4), 0.0),)
        idle = linear(torch.ones(1, 256))
        linear.branches = ()
        plain = linear(torch.ones(1, 256))

    assert torch.equal(idle.view(torch.int32), plain.view(torch.int32))


def test_merged_weights_stay_in_ram_when_a_model_is_forgotten(tmp_path):
    """They are in no file: reading them again would lose the LoRA without a word."""
    model = tiny_model()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = Residency(model, reread=lambda: weights)
    apply_loras(model, [(read_lora(written(tmp_path, pair(LAYER))), 0.7)], merge=True)
    merged = model.get_submodule(LAYER).weight.detach().clone()

    engine.forget()
    engine.recall()

    assert torch.equal(model.get_submodule(LAYER).weight, merged)
    assert not torch.equal(merged, weights[f"{LAYER}.weight"])
