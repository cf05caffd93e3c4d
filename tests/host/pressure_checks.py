"""Small cards, eviction, true sizes and short RAM inside a real ComfyUI; registered by
inprocess_memory."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

import weakref

from inside import DEVICE, Heard, check, gc, pack, sentence

import comfy.model_management as mm
import torch
from small_card import SmallCard, failing
from small_models import (
    FILES,
    close,
    config_of,
    distill,
    image_cond,
    ksampler,
    lora,
    ours,
    with_lora,
)


@check
def memory_comfyui_equals_ours_with_and_without_lora() -> str:
    stock, mine = ours(memory="comfyui"), ours()
    assert type(stock).__name__ != type(mine).__name__
    close(ksampler(stock), ksampler(mine))
    error = close(ksampler(with_lora(stock)), ksampler(with_lora(mine)), 2e-5)
    mm.unload_all_models()
    stock.partially_load(DEVICE, 1_000_000)
    assert stock.model.model_lowvram or stock.is_dynamic()
    close(ksampler(stock), ksampler(mine))
    return error


@check
def on_a_small_card_the_result_is_bit_equal_and_sizes_are_true() -> str:
    model = ours()
    model.model.memory_required = lambda *a, **k: 0
    whole = ksampler(model)
    size = model.model_size()
    assert size == sum(t.nbytes for t in FILES["t2v"].values())
    with SmallCard(size * 0.7):
        partly = ksampler(model)
        engine = model.model.engine
        held = (engine.resident, model.loaded_size())
        assert torch.equal(partly, whole)
        assert 0 < held[1] < size, held
        assert held[0] < 2, held
        mm.free_memory(1e12, DEVICE)
        assert model.loaded_size() == 0
        assert torch.equal(ksampler(model), whole)
    return f"{held[1]} of {size} bytes"


@check
def a_partial_eviction_frees_what_it_says_and_keeps_us_listed() -> None:
    model = ours()
    whole = ksampler(model)
    before = model.loaded_size()
    freed = model.partially_unload(torch.device("cpu"), 1)
    assert freed == before - model.loaded_size() > 0
    assert any(entry.model is model for entry in mm.current_loaded_models)
    assert torch.equal(ksampler(model), whole)
    assert model.loaded_size() == before


@check
def free_unloads_everything_and_the_next_run_is_the_same() -> None:
    model = with_lora(ours())
    first = ksampler(model)
    mm.unload_all_models()
    assert model.loaded_size() == 0
    linear = model.model.diffusion_model.blocks[0].self_attn.q
    assert linear.branches == ()
    bias = model.model.diffusion_model.blocks[0].self_attn.q.bias
    assert torch.equal(bias.cpu(), FILES["t2v"]["blocks.0.self_attn.q.bias"])
    assert torch.equal(ksampler(model), first)


@check
def a_second_run_does_not_read_the_file_again() -> None:
    model = ours()
    ksampler(model)
    linear = model.model.diffusion_model.blocks[0].ffn[0]
    pointer = linear.weight.data_ptr()
    ksampler(with_lora(model))
    ksampler(model)
    assert linear.weight.data_ptr() == pointer, "nor is it brought onto a card again"


@check
def the_sizes_count_a_lora() -> None:
    model = ours()
    changed = with_lora(model)
    pairs = sum(v.nbytes for k, v in lora().items() if "lora_" in k)
    dense = lora()["diffusion_model.text_embedding.0.diff"].nbytes
    assert changed.model_size() == model.model_size() + pairs + dense
    ksampler(changed)
    assert changed.loaded_size() == changed.model_size()


@check
def a_model_dies_with_its_last_reference() -> None:
    model = ours()
    ksampler(with_lora(model))
    ksampler(model)
    alive = weakref.ref(model.model)
    del model
    gc.disable()
    try:
        mm.cleanup_models_gc()
        mm.cleanup_models()
        dead_without_collector = alive() is None
    finally:
        gc.enable()
    gc.collect()
    assert alive() is None
    return None if dead_without_collector else "only after a garbage collection"


@check
def least_activation_memory_is_below_the_inherited_figure_and_grows_with_size() -> str:
    model = ours().model
    model.diffusion_model.compute_dtype = torch.bfloat16
    model.diffusion_model.config = config_of(dim=5120, ffn_dim=13824, num_layers=40)
    shapes = [[1, 16, 21, 60, 104], [1, 16, 21, 90, 160], [2, 16, 21, 60, 104]]
    small, large, double = (model.memory_required(shape) / 2**30 for shape in shapes)
    assert small < large and small < double <= 2 * small
    assert small < 5.9 and large < 13.6
    return f"480p {small:.2f} GiB, 720p {large:.2f} GiB"


@check
def a_failing_load_leaves_nothing_behind() -> None:
    model = ours()
    expected = ksampler(model)
    mm.unload_all_models()
    engine = model.model.engine
    place = engine.place

    def fail(*_: object) -> None:
        raise mm.OOM_EXCEPTION("no room")

    engine.place = fail
    told = sentence(lambda: ksampler(model))
    assert "no room" in told
    engine.place = place
    assert model.loaded_size() == 0
    assert torch.equal(ksampler(model), expected)


@check
def out_of_memory_in_step_three_costs_an_attempt_and_twice_is_the_hosts_own_error() -> str:
    model = ours()
    whole = distill(model)[0]["samples"]
    transformer = model.model.diffusion_model
    with Heard() as heard:
        transformer.forward = failing(transformer.forward, 3, 1)
        assert torch.equal(distill(model)[0]["samples"], whole)
        transformer.forward = failing(type(transformer).forward.__get__(transformer), 3, 2)
        told = sentence(lambda: distill(model))
    del transformer.forward
    assert told.startswith(mm.OOM_EXCEPTION.__name__), told
    lines = [line for line in heard.lines if line.startswith("out of memory again; ")]
    assert len(lines) == 1 and "are there: 5 frames in place of 9" in lines[0], heard.lines
    assert torch.equal(distill(model)[0]["samples"], whole)
    return told


@check
def where_ram_is_short_the_first_expert_leaves_it_and_comes_back() -> None:
    first, second = ours("a14b"), ours("a14b")
    cond, denoise = image_cond(), pack("nodes.denoise")
    expected = distill(first, cond, model_low_noise=second)[0]["samples"]
    engine, is_short = first.model.engine, denoise.is_ram_short
    freed, forget = [], engine.forget
    engine.forget = lambda: freed.append(forget()) or 0
    denoise.is_ram_short = lambda _bytes: True
    try:
        results = [distill(first, cond, model_low_noise=second)[0]["samples"] for _ in range(2)]
    finally:
        denoise.is_ram_short = is_short
    assert len(freed) == 2 and all(torch.equal(result, expected) for result in results)
    assert first.loaded_size() == 0 < second.loaded_size()
