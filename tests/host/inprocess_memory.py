"""Our patcher inside a real ComfyUI: LoRA, hooks, merges, saving, eviction, sizes."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from inside import WORK, check, gc, main, pack, relative, run, sentence

import comfy.lora
import comfy.model_management as mm
import comfy.utils
import torch
from small_files import write, write_gguf
from small_models import (
    FILES,
    close,
    config_of,
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
    assert torch.equal(linear.weight, FILES["t2v"]["blocks.0.self_attn.q.weight"])
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


@check
def a_native_lora_on_fp8_weights_adds_what_it_adds_to_the_weights_they_stand_for() -> str:
    fp8, meant = ours("t2v_fp8"), ours("t2v_fp8_meant")
    before = ksampler(fp8)
    error = close(ksampler(with_lora(fp8)), ksampler(with_lora(meant)))
    assert relative(ksampler(with_lora(fp8)), before) > 1e-2, "the LoRA changed nothing"
    assert torch.equal(ksampler(fp8), before)
    return error


def applied(model: object, file: str = "small.safetensors", strength: float = 0.7) -> tuple:
    return run("LightX2VApplyLora", model=model, lora=file, strength=strength)


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
def apply_lora_on_fp8_equals_the_weights_it_stands_for() -> str:
    fp8, meant = ours("t2v_fp8"), ours("t2v_fp8_meant")
    return close(ksampler(applied(fp8)[0]), ksampler(applied(meant)[0]))


@check
def a_lora_that_matches_nothing_is_a_sentence() -> None:
    pair = {"x.y.lora_up.weight": torch.ones(4, 2), "x.y.lora_down.weight": torch.ones(2, 4)}
    write(WORK / "models/loras/foreign.safetensors", pair)
    told = sentence(lambda: applied(ours(), "foreign.safetensors"))
    assert "no layer of foreign.safetensors matches this model" in told, told


@check
def an_fp8_file_in_comfyuis_form_is_read_as_comfyui_reads_it() -> str:
    import nodes as host_nodes

    theirs = host_nodes.UNETLoader().load_unet("native_fp8.safetensors", "default")[0]
    cond = [[torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(8)), {}]]
    mine = ksampler(ours("native_fp8"), cond)
    exact = close(mine, ksampler(ours("native_fp8_meant"), cond))
    return f"{exact}; ComfyUI {close(ksampler(theirs, cond), mine, 0.02)}"


@check
def an_fp8_file_we_write_is_read_by_comfyui_as_by_us() -> str:
    import nodes as host_nodes

    folder = WORK / "models/diffusion_models"
    convert = pack("lightx2v_core.checkpoint.convert")
    convert.quantise_file(
        folder / "native.safetensors", folder / "native_written.safetensors", "fp8-tensor"
    )
    theirs = host_nodes.UNETLoader().load_unet("native_written.safetensors", "default")[0]
    cond = [[torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(8)), {}]]
    return close(ksampler(theirs, cond), ksampler(ours("native_written"), cond))


def load_gguf(name: str) -> object:
    choices = {"quantisation": "keep", "attention": "auto", "memory": "auto"}
    return run("LightX2VLoadModel", file=name, **choices)[0]


@check
def a_gguf_file_runs_and_takes_a_native_lora_as_the_weights_it_stands_for() -> str:
    folder = WORK / "models/diffusion_models"
    write(folder / "gguf_meant.safetensors", write_gguf(folder / "t2v_q8.gguf", FILES["t2v"]))
    model, meant = load_gguf("t2v_q8.gguf"), ours("gguf_meant")
    plain = ksampler(model)
    error = close(plain, ksampler(meant))
    patched = ksampler(with_lora(model))
    assert relative(patched, plain) > 1e-3
    assert torch.equal(ksampler(applied(model)[0]), patched)
    assert torch.equal(ksampler(model), plain)
    told = sentence(lambda: model.get_key_patches())
    assert "stored as torch.uint8" in told, told
    return f"{error}; LoRA {close(patched, ksampler(with_lora(meant)))}"


@check
def gguf_files_are_listed_for_our_loader_alone_and_from_the_folder_of_comfyui_gguf() -> None:
    import folder_paths

    files, keys = pack("nodes.files"), dict(folder_paths.folder_names_and_paths)
    (WORK / "models/diffusion_models/below").mkdir(exist_ok=True)
    (WORK / "elsewhere").mkdir(exist_ok=True)
    write_gguf(WORK / "models/diffusion_models/below/one.gguf", FILES["t2v"])
    write_gguf(WORK / "elsewhere/two.gguf", FILES["t2v"])
    below = str(Path("below") / "one.gguf")
    listed = files.list_files("diffusion_models")
    assert below in listed and "two.gguf" not in listed, listed
    assert "t2v.safetensors" in listed
    assert load_gguf(below) is not None
    assert folder_paths.folder_names_and_paths == keys
    assert below not in folder_paths.get_filename_list("diffusion_models")
    folder_paths.folder_names_and_paths["unet_gguf"] = ([str(WORK / "elsewhere")], {".gguf"})
    try:
        listed = files.list_files("diffusion_models")
        assert below in listed and "two.gguf" in listed, listed
        assert files.resolve("diffusion_models", "two.gguf") == WORK / "elsewhere/two.gguf"
    finally:
        del folder_paths.folder_names_and_paths["unet_gguf"]
    assert "two.gguf" not in files.list_files("vae") + files.list_files("text_encoders")


@check
def memory_comfyui_is_refused_for_a_quantised_file() -> None:
    told = sentence(lambda: ours("t2v_fp8", memory="comfyui"))
    assert "quantised as fp8-tensor runs through memory 'ours' alone" in told, told


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


@check
def quantised_weights_refuse_what_would_change_them_in_place() -> str:
    model = ours()
    linear = model.model.diffusion_model.blocks[0].self_attn.q
    linear.weight.data = linear.weight.to(torch.float8_e4m3fn)
    key = "diffusion_model.blocks.0.self_attn.q.weight"
    model.patches[key] = [(1.0, ("set", (torch.zeros(256, 256),)), 1.0, None, None)]
    model.patches_uuid = object()
    told = sentence(lambda: ksampler(model))
    assert "stored as torch.float8_e4m3fn" in told, told
    return told


@check
def memory_comfyui_equals_ours_with_and_without_lora() -> str:
    stock, mine = ours(memory="comfyui"), ours()
    assert type(stock).__name__ != type(mine).__name__
    close(ksampler(stock), ksampler(mine))
    error = close(ksampler(with_lora(stock)), ksampler(with_lora(mine)), 2e-5)
    mm.unload_all_models()
    stock.partially_load(torch.device("cpu"), 1_000_000)
    assert stock.model.model_lowvram
    close(ksampler(stock), ksampler(mine))
    return error


class SmallCard:
    """Makes the host believe that its device is a card with little memory."""

    def __init__(self, free_for_weights: float) -> None:
        self.free = free_for_weights
        self.names = ("is_device_cpu", "get_free_memory", "minimum_inference_memory", "vram_state")
        self.before = {name: getattr(mm, name) for name in self.names}

    def __enter__(self) -> SmallCard:
        mm.unload_all_models()
        total = 1.3e9
        mm.is_device_cpu = lambda device: False
        mm.vram_state = mm.VRAMState.NORMAL_VRAM
        mm.minimum_inference_memory = lambda: total - self.free
        mm.get_free_memory = lambda dev=None, torch_free_too=False: (
            (total, 0) if torch_free_too else int(total)
        )
        return self

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            setattr(mm, name, value)
        mm.unload_all_models()


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
        mm.free_memory(1e12, torch.device("cpu"))
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
    assert torch.equal(bias, FILES["t2v"]["blocks.0.self_attn.q.bias"])
    assert torch.equal(ksampler(model), first)


@check
def a_second_run_does_not_read_the_file_again() -> None:
    model = ours()
    ksampler(model)
    pointer = model.model.diffusion_model.blocks[0].ffn[0].weight.data_ptr()
    ksampler(with_lora(model))
    ksampler(model)
    assert model.model.diffusion_model.blocks[0].ffn[0].weight.data_ptr() == pointer


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
    assert small < large and double == 2 * small
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


if __name__ == "__main__":
    main()
