"""Apply LoRA and strengths for each step inside a real ComfyUI; registered by inprocess_memory."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

import gc
from functools import cache

from inside import WORK, check, host_nodes, pack, relative, run, sentence

import comfy.hooks
import torch
from small_files import write
from small_models import (
    FILES,
    close,
    distill,
    ksampler,
    lora,
    native,
    ours,
    states,
    with_lora,
)

LAYERS = [
    name.removesuffix(".weight")
    for name, weight in FILES["t2v"].items()
    if name.startswith("blocks") and weight.ndim == 2
]


def applied(model: object, file: str = "everything.safetensors", **asked: object) -> object:
    return run("LightX2VApplyLora", model=model, lora=file, **{"strength": 0.7, **asked})[0]


def summary(model: object, file: str, **asked: object) -> str:
    return run("LightX2VApplyLora", model=model, lora=file, **{"strength": 0.7, **asked})[1]


def matrices(seed: int, rank: int = 4) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for layer in LAYERS:
        up, down = FILES["t2v"][f"{layer}.weight"].shape
        made[layer] = (
            torch.randn(up, rank, generator=rng) * 0.05,
            torch.randn(rank, down, generator=rng) * 0.05,
        )
    return made


def pairs(seed: int, stem: object, up: str, down: str) -> dict[str, torch.Tensor]:
    made = {}
    for layer, (first, second) in matrices(seed).items():
        made |= {stem(layer) + up: first, stem(layer) + down: second}
    return made


def write_lora(name: str, tensors: dict[str, torch.Tensor], **metadata: str) -> str:
    write(WORK / f"models/loras/{name}.safetensors", tensors, **metadata)
    return f"{name}.safetensors"


def everything() -> dict[str, torch.Tensor]:
    """Pairs, and differences of norms, biases, modulation and patch embedding."""
    rng = torch.Generator().manual_seed(5)
    tensors = lora()
    for name in ("blocks.0.modulation", "head.modulation"):
        added = torch.randn(FILES["t2v"][name].shape, generator=rng) * 0.1
        tensors[f"diffusion_model.{name.removesuffix('.modulation')}.diff_m"] = added
    patches = FILES["t2v"]["patch_embedding.weight"]
    tensors["diffusion_model.patch_embedding.diff"] = (
        torch.randn(patches.shape, generator=rng) * 0.05
    )
    return tensors


@cache
def base() -> object:
    """One model for all checks: each leaves it as it was, which is half of what they check."""
    return ours()


EVERYTHING = write_lora("everything", everything())
PLAIN = write_lora(
    "plain",
    pairs(8, lambda n: f"diffusion_model.{n}", ".lora_up.weight", ".lora_down.weight"),
)


def samples(model: object, cond: list | None = None, **changes: object) -> torch.Tensor:
    return distill(model, cond, **changes)[0]["samples"]


@check
def strengths_by_step_equal_two_experts_of_which_one_has_the_lora() -> None:
    model = base()
    pair = samples(applied(model, strength=1.0), model_low_noise=model)
    assert torch.equal(samples(applied(model, strengths="1, 1, 0, 0")), pair)
    assert not torch.equal(samples(applied(model, strength=1.0)), pair)


@check
def strengths_count_the_steps_of_both_experts_together() -> None:
    model = base()
    experts = [applied(model, strengths=text) for text in ("0, 0.5, 9, 9", "9, 9, 0.5, 0")]
    both = samples(experts[0], model_low_noise=experts[1])
    assert torch.equal(both, samples(applied(model, strengths="0, 0.5, 0.5, 0")))


@check
def equal_strengths_by_step_are_the_one_strength_bit_for_bit_and_zeros_are_none() -> None:
    model = base()
    plain = samples(model)
    once = samples(applied(model, strength=0.7))
    assert torch.equal(samples(applied(model, strengths="0.7,0.7,0.7,0.7")), once)
    assert torch.equal(samples(applied(model, strengths="0.7")), once)
    assert torch.equal(samples(applied(model, strengths="0, 0, 0, 0")), plain)
    assert torch.equal(
        samples(applied(model, strengths="0.7, 0, 0, 0", strength=9.0)),
        samples(applied(model, strengths="0.7, 0, 0, 0")),
    )
    assert torch.equal(samples(model), plain)
    assert relative(once, plain) > 1e-2


@check
def the_native_ksampler_follows_strengths_by_step_too() -> None:
    import comfy.patcher_extension as extension

    model, seen = applied(base(), strengths="0.7, 0.3, 0"), []
    linear = model.model.diffusion_model.blocks[0].ffn[0]

    def spy(execute: object, *args: object, **kwargs: object) -> object:
        result = execute(*args, **kwargs)
        seen.append(linear.branches[0].gain_now / linear.branches[0].gain)
        return result

    watched = model.clone()
    watched.add_wrapper(extension.WrappersMP.DIFFUSION_MODEL, spy)
    out = ksampler(watched, steps=3)
    assert seen == [0.7, 0.3, 0.0], seen
    assert torch.equal(
        ksampler(applied(base(), strengths="0.7,0.7,0.7"), steps=3),
        ksampler(applied(base()), steps=3),
    )
    assert not torch.equal(out, ksampler(applied(base()), steps=3))


@check
def a_wrong_number_of_strengths_is_a_sentence_in_both_samplers() -> str:
    model = applied(base(), strengths="1, 0")
    words = "everything.safetensors has 2 strengths and the run has"
    told = sentence(lambda: samples(model))
    assert f"{words} 4 steps" in told, told
    assert f"{words} 3 steps" in sentence(lambda: ksampler(model, steps=3))
    assert "are not numbers" in sentence(lambda: applied(base(), strengths="1; much"))
    return told


@check
def strengths_by_step_are_refused_where_they_would_do_nothing() -> str:
    from comfy_extras.nodes_model_merging import ModelMergeSimple, ModelSave

    told = sentence(lambda: applied(native(), strengths="1, 1, 0, 0"))
    assert "which this MODEL (ModelPatcher of WAN21) cannot do" in told, told
    assert "cannot do" in sentence(lambda: applied(ours(memory="comfyui"), strengths="1,1,0,0"))
    model = applied(base(), strengths="1, 1, 0, 0")
    group = comfy.hooks.create_hook_lora(lora(), 0.7, 0.0)
    for action in (
        lambda: ModelSave().save(model, "saved/refused"),
        lambda: ksampler(ModelMergeSimple().merge(base(), model, 0.5)[0]),
        lambda: samples(model, [[states, {"hooks": group}]]),
    ):
        assert "has a strength for each step" in sentence(action)
    return told


@check
def a_native_lora_on_top_of_strengths_by_step_keeps_its_own() -> None:
    model = base()
    stacked = with_lora(applied(model, strengths="0.7, 0.7, 0, 0"))
    pair = samples(with_lora(applied(model)), model_low_noise=with_lora(model))
    assert close(samples(stacked), pair, 1e-6)
    assert torch.equal(
        samples(with_lora(applied(model, strengths="0,0,0,0"))), samples(with_lora(model))
    )


@check
def the_order_of_two_loras_changes_not_even_the_last_bit() -> None:
    for model in (base(), native()):
        one = applied(applied(model, strength=0.4), PLAIN, strength=0.3)
        other = applied(applied(model, PLAIN, strength=0.3), strength=0.4)
        first, second = ksampler(one), ksampler(other)
        assert torch.equal(first, second)


@check
def ten_strengths_in_a_row_hold_as_many_tensors_and_move_no_base_weight() -> str:
    model = base()
    transformer, engine_slots = model.model.diffusion_model, pack("lightx2v_core.memory.slots")
    plain, counts, moved = ksampler(model, steps=1), [], []
    put = engine_slots.Slot.put
    engine_slots.Slot.put = lambda slot, tensor: (moved.append(slot.name), put(slot, tensor))[1]
    # Modulation and the patch embedding, which the LoRA changes in place, have more axes.
    matrices = {name: p for name, p in transformer.named_parameters() if p.ndim == 2}
    places = {name: p.data_ptr() for name, p in matrices.items()}
    for step in range(1, 11):
        patched = applied(model, strength=step / 10)
        ksampler(patched, steps=1)
        del patched
        if step in (2, 10):
            gc.collect()
            counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    engine_slots.Slot.put = put
    assert counts[0] == counts[1], counts
    assert not matrices.keys() & set(moved), "small ones, which the LoRA changes, may go and come"
    assert torch.equal(ksampler(model, steps=1), plain)
    now = dict(transformer.named_parameters())
    assert {name: now[name].data_ptr() for name in places} == places
    return f"{counts[-1]} tensors"


@check
def a_native_lora_changes_every_quantised_base_as_much_as_the_original() -> str:
    """In size within 2 %; in direction as far as the base itself moved by its rounding (e4m3 has
    three bits of mantissa). On the weights that the codes stand for the effect is the same: see
    inprocess_memory."""
    convert = pack("lightx2v_core.checkpoint.convert")
    folder = WORK / "models/diffusion_models"
    effect = ksampler(with_lora(base()), steps=1) - ksampler(base(), steps=1)
    found = []
    for scheme in convert.WRITTEN:
        file = f"lora_on_{scheme}"
        convert.quantise_file(folder / "t2v.safetensors", folder / f"{file}.safetensors", scheme)
        model = ours(file)
        changed = ksampler(with_lora(model), steps=1) - ksampler(model, steps=1)
        size = float(changed.norm() / effect.norm())
        error = relative(changed, effect)
        assert abs(size - 1) < 0.02 and error < 0.03, (scheme, size, error)
        found.append(f"{scheme} size {size:.4f}, difference {error:.4f}")
    return ", ".join(found)


@check
def every_spelling_gives_the_same_bits_on_ours_and_on_a_native_model() -> None:
    to_diffusers = pack("lightx2v_core.checkpoint.layouts").to_diffusers
    spellings = {
        "kohya": pairs(
            8, lambda n: "lora_unet_" + n.replace(".", "_"), ".lora_up.weight", ".lora_down.weight"
        ),
        "peft": pairs(
            8, lambda n: f"base_model.model.{n}", ".lora_B.default.weight", ".lora_A.default.weight"
        ),
        "diffusers": pairs(
            8, lambda n: f"transformer.{to_diffusers(n)}", ".lora_B.weight", ".lora_A.weight"
        ),
    }
    for model in (base(), native()):
        expected = ksampler(applied(model, PLAIN), steps=1)
        for name, tensors in spellings.items():
            file = write_lora(name, tensors)
            assert torch.equal(ksampler(applied(model, file), steps=1), expected), name


@check
def mix_ups_and_what_the_native_loader_drops_are_in_the_summary() -> None:
    told = summary(base(), EVERYTHING)
    assert "2 modulations, which ComfyUI's own LoRA loader leaves out" in told, told
    assert "alpha 2, effective strength 0.7 x 0.5" in told, told
    high = write_lora("wan2.2_high_noise", {k: v for k, v in lora().items() if "blocks" in k})
    assert "is for the high-noise expert" in summary(ours("low_noise_wan2.2"), high)
    assert "exchange" not in summary(ours("high_noise_wan2.2"), high)
    named = write_lora("style_t2v", {k: v for k, v in lora().items() if "blocks" in k})
    assert "is a text-to-video LoRA on an image-to-video" in summary(ours("a14b"), named)


@check
def a_lokr_is_refused_by_name_and_the_native_loader_takes_it_on_full_precision() -> str:
    rng = torch.Generator().manual_seed(3)
    stem = "diffusion_model.blocks.0.self_attn.q"
    first, second = (torch.randn(16, 16, generator=rng) * 0.1 for _ in range(2))
    file = write_lora("kron", {f"{stem}.lokr_w1": first, f"{stem}.lokr_w2": second})
    assert "is a LoKr adapter" in sentence(lambda: applied(base(), file))

    def loaded(model: object) -> torch.Tensor:
        out = host_nodes.LoraLoaderModelOnly().load_lora_model_only(model, file, 1.0)[0]
        return ksampler(out)

    changing = applied(base(), strengths="1, 1, 0")
    assert "what else is merged into" in sentence(lambda: loaded(changing))
    assert relative(loaded(base()), ksampler(base())) > 1e-4
    return close(loaded(base()), loaded(native()), 2e-5)
