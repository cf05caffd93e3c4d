"""Our patcher inside a real ComfyUI: LoRA, hooks, merges, saving; and the checks it registers."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from inside import WORK, check, main, pack, relative, sentence

import comfy.lora
import comfy.utils
import torch
import expert_checks  # noqa: F401
import fault_checks  # noqa: F401
import format_checks  # noqa: F401 - each registers its checks
import lora_checks  # noqa: F401
import pressure_checks  # noqa: F401
import run_checks  # noqa: F401
from small_files import write
from small_models import (
    FILES,
    applied,
    close,
    ksampler,
    lora,
    native,
    ours,
    shifted,
    states,
    with_lora,
)


@check
def the_host_has_every_method_our_patcher_overrides() -> None:
    assert pack("nodes.bridge").host_mismatch() is None


@check
def model_sampling_sd3_works_and_does_not_stick() -> str:
    model, reference = ours(), native()
    plain = ksampler(model)
    error = close(ksampler(shifted(model)), ksampler(shifted(reference)))
    assert torch.equal(ksampler(model), plain)
    assert not torch.equal(ksampler(shifted(model)), plain)
    return error


@check
def a_native_lora_becomes_branches_and_equals_the_native_result() -> str:
    model = with_lora(ours())
    error = close(ksampler(model), ksampler(with_lora(native())), 2e-5)
    linear = model.model.diffusion_model.blocks[0].self_attn.q
    assert len(linear.branches) == 1
    assert torch.equal(linear.weight.cpu(), FILES["t2v"]["blocks.0.self_attn.q.weight"])
    return error


@check
def model_then_lora_then_model_gives_first_and_third_bit_identical() -> None:
    model = ours()
    changed = with_lora(model)
    first, second, third = ksampler(model), ksampler(changed), ksampler(model)
    assert torch.equal(first, third)
    assert not torch.equal(first, second)
    assert torch.equal(ksampler(changed), second)


@check
def lora_strength_zero_is_bit_identical_to_no_lora() -> None:
    model = ours()
    plain = ksampler(model)
    clone = model.clone()
    clone.add_patches(comfy.lora.load_lora(lora(), lora_keys(model)), 0.0)
    assert clone.patches
    assert torch.equal(ksampler(clone), plain)


def lora_keys(model: object) -> dict:
    return comfy.lora.model_lora_keys_unet(model.model, {})


def modulated() -> dict[str, torch.Tensor]:
    """Only `.diff_m`, as distilled releases have them; and the weights with it added."""
    rng = torch.Generator().manual_seed(3)
    names = [name for name in FILES["t2v"] if name.endswith("modulation")]
    added = {name: torch.randn(FILES["t2v"][name].shape, generator=rng) * 0.1 for name in names}
    stems = {name: name.removesuffix(".modulation") for name in names}
    lora_file = {f"diffusion_model.{stems[n]}.diff_m": d for n, d in added.items()}
    write(WORK / "models/loras/modulation.safetensors", lora_file)
    summed = {k: v + 0.7 * added[k] if k in added else v for k, v in FILES["t2v"].items()}
    write(WORK / "models/diffusion_models/modulated.safetensors", summed)
    return added


@check
def apply_lora_equals_the_native_loader_for_pairs_and_differences() -> str:
    model = ours()
    before = ksampler(model)
    patched, summary = applied(model)
    error = close(ksampler(patched), ksampler(with_lora(ours())))
    assert "matched" in summary and "rank 4" in summary, summary
    assert torch.equal(ksampler(model), before)
    assert torch.equal(ksampler(applied(model, strength=0.0)[0]), before)
    return f"{error}; native {close(ksampler(applied(native())[0]), ksampler(patched), 2e-5)}"


@check
def apply_lora_adds_modulation_on_ours_and_on_a_native_model() -> str:
    modulated()
    expected = ksampler(ours("modulated"))
    model, stock = ours(), native()
    before = ksampler(model)
    assert relative(expected, before) > 1e-3
    errors = [
        close(ksampler(applied(m, "modulation.safetensors")[0]), expected)
        for m in (model, stock, ours(memory="comfyui"))
    ]
    assert torch.equal(ksampler(model), before)
    assert torch.equal(ksampler(with_lora_file(model, "modulation.safetensors")), before), (
        "the native loader is said to drop modulation"
    )
    return ", ".join(errors)


def with_lora_file(model: object, file: str) -> object:
    import nodes as host_nodes

    return host_nodes.LoraLoaderModelOnly().load_lora_model_only(model, file, 0.7)[0]


@check
def a_lora_that_matches_nothing_is_a_sentence() -> None:
    pair = {"x.y.lora_up.weight": torch.ones(4, 2), "x.y.lora_down.weight": torch.ones(2, 4)}
    write(WORK / "models/loras/foreign.safetensors", pair)
    told = sentence(lambda: applied(ours(), "foreign.safetensors"))
    assert "no layer of foreign.safetensors matches this model" in told, told


@check
def stacked_loras_with_a_shift_equal_native() -> str:
    mine, reference = (
        with_lora(shifted(with_lora(model, 0.7), 3.0), 0.3) for model in (ours(), native())
    )
    return close(ksampler(mine), ksampler(reference), 2e-5)


@check
def keys_stay_the_official_ones_under_a_lora() -> None:
    model = with_lora(ours())
    ksampler(model)
    assert set(model.model.diffusion_model.state_dict()) == set(FILES["t2v"])


@check
def a_weight_hook_equals_native_and_is_undone() -> str:
    import comfy.hooks

    def hooked(model: object) -> torch.Tensor:
        group = comfy.hooks.create_hook_lora(lora(), 0.7, 0.0)
        return ksampler(model, [[states, {"hooks": group}]])

    model = ours()
    plain = ksampler(model)
    error = close(hooked(model), hooked(native()), 2e-5)
    assert torch.equal(ksampler(model), plain)
    return error


@check
def merging_two_models_equals_native() -> str:
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    def merged(first: object, second: object) -> torch.Tensor:
        second = with_lora(second, 1.0)
        return ksampler(ModelMergeSimple().merge(first, second, 0.5)[0])

    return close(merged(ours(), ours()), merged(native(), native()), 2e-5)


@check
def a_saved_model_holds_its_lora() -> str:
    from comfy_extras.nodes_model_merging import ModelSave

    model = with_lora(ours())
    expected = ksampler(model)
    ModelSave().save(model, "saved/model")
    path = next((WORK / "output/saved").glob("*.safetensors"))
    saved = comfy.utils.load_torch_file(str(path))
    prefix = "model.diffusion_model."
    bare = {k.removeprefix(prefix): v.float() for k, v in saved.items() if k.startswith(prefix)}
    write(WORK / "models/diffusion_models/merged.safetensors", bare)
    assert torch.equal(ksampler(model), expected)
    return close(ksampler(ours("merged")), expected, 2e-5)


if __name__ == "__main__":
    main()
