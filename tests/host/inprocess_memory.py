"""Our patcher inside a real ComfyUI: LoRA, hooks, merges, saving, eviction, sizes."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from inside import WORK, Heard, check, gc, main, pack, relative, run, sentence

import comfy.lora
import comfy.model_management as mm
import comfy.utils
import torch
import lora_checks  # noqa: F401 - registers its checks
from small_files import write, write_gguf
from small_models import (
    FILES,
    close,
    config_of,
    distill,
    image_cond,
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


def quantize(model: object, scheme: str, matmul: str = "auto") -> tuple:
    return run("LightX2VQuantize", model=model, scheme=scheme, matmul=matmul)


def saved(model: object, scheme: str, name: str) -> str:
    """Writes a file and puts it among the models; its stem."""
    path = Path(run("LightX2VSaveQuantized", model=model, scheme=scheme, filename=name)[0])
    assert path == WORK / "output" / "diffusion_models" / f"{name}.safetensors"
    path.replace(WORK / "models/diffusion_models" / path.name)
    return name


@check
def an_fp8_file_we_write_is_read_by_comfyui_as_by_us() -> str:
    import nodes as host_nodes

    name = saved(ours("native"), "fp8-tensor", "native_written")
    theirs = host_nodes.UNETLoader().load_unet(f"{name}.safetensors", "default")[0]
    cond = [[torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(8)), {}]]
    return close(ksampler(theirs, cond), ksampler(ours(name), cond))


@check
def a_quantised_model_equals_its_saved_file_and_keeps_lora_and_shift() -> None:
    model = ours("half")
    before = ksampler(model)
    asked = with_lora(shifted(model))
    quantised, summary = quantize(asked, "int8")
    file = ours(saved(model, "int8", "half_int8"))
    assert "quantised to int8: " in summary and "matmul: dequantise" in summary, summary
    assert torch.equal(ksampler(quantised), ksampler(with_lora(shifted(file))))
    assert not torch.equal(ksampler(quantised), ksampler(asked))
    assert torch.equal(ksampler(model), before), "the input MODEL stays as it is"
    back = quantize(quantised, "keep")[0]
    assert torch.equal(ksampler(back), ksampler(asked))


@check
def a_model_quantised_while_loading_equals_the_node_after_it() -> None:
    loaded, summary = run(
        "LightX2VLoadModel",
        **{
            "file": "half.safetensors",
            "quantisation": "fp8",
            "attention": "auto",
            "memory": "auto",
        },
    )
    assert "quantised to fp8: " in summary and "memory: ours" in summary, summary
    stock = ours("half", memory="comfyui")
    quantised = quantize(stock, "fp8")[0]
    assert torch.equal(ksampler(loaded), ksampler(quantised))
    assert type(quantised).__name__ == "ResidentPatcher" != type(stock).__name__


@check
def what_cannot_be_quantised_or_saved_is_a_sentence() -> str:
    told = sentence(lambda: quantize(native(), "fp8"))
    assert "this MODEL comes from another loader" in told, told
    told = sentence(lambda: quantize(ours("t2v_fp8"), "int8"))
    assert "quantised as fp8-tensor already" in told, told
    told = sentence(lambda: quantize(ours("half"), "fp8", "int8"))
    assert "it multiplies int8 codes and these are float8_e4m3fn" in told, told
    told = sentence(lambda: saved(with_lora(ours("half")), "fp8", "with_lora"))
    assert "would not be in the file" in told, told
    for name in ("../outside", "", "/tmp/outside"):
        told = sentence(lambda: saved(ours("half"), "fp8", name))  # noqa: B023
        assert "is no file name" in told, told
    (WORK / "output/diffusion_models").mkdir(exist_ok=True)
    (WORK / "output/diffusion_models/there.safetensors").write_bytes(b"mine")
    told = sentence(lambda: saved(ours("half"), "fp8", "there"))
    assert "there.safetensors exists already" in told, told
    return told


def in_blocks(weights: dict[str, torch.Tensor], scheme: str) -> tuple[dict, dict]:
    """Linears as comfy-kitchen packs them, in ComfyUI's names; and as it unpacks them."""
    import json

    import comfy_kitchen as ck

    text = bytearray(json.dumps({"format": scheme}).encode())
    packed, meant = dict(weights), {}
    for key in [k for k, v in weights.items() if k.startswith("blocks.") and v.ndim == 2]:
        stem = key.removesuffix("weight")
        packed[stem + "comfy_quant"] = torch.frombuffer(text, dtype=torch.uint8).clone()
        if scheme == "nvfp4":
            scale = weights[key].abs().amax() / (448.0 * 6.0)
            packed[key], tiled = ck.quantize_nvfp4(weights[key], scale)
            meant[key] = ck.dequantize_nvfp4(packed[key], scale, tiled, torch.float32)
            packed[stem + "weight_scale_2"] = scale
        else:
            packed[key], tiled = ck.quantize_mxfp8(weights[key])
            meant[key] = ck.dequantize_mxfp8(packed[key], tiled, torch.float32)
            tiled = tiled.view(torch.uint8)
        packed[stem + "weight_scale"] = tiled
    return packed, meant


@check
def files_in_blocks_stand_for_what_comfyui_takes_them_for() -> str:
    import comfy.quant_ops
    import nodes as host_nodes

    cond = [[torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(8)), {}]]
    errors = []
    for scheme in ("nvfp4", "mxfp8"):
        packed, meant = in_blocks(FILES["native"], scheme)
        write(WORK / f"models/diffusion_models/native_{scheme}.safetensors", packed)
        mine = ours(f"native_{scheme}")
        transformer = mine.model.diffusion_model
        for key, weight in meant.items():
            linear = transformer.get_submodule(key.removesuffix(".weight"))
            assert torch.equal(linear.dequantise(torch.float32), weight), key
        if scheme in comfy.quant_ops.QUANT_ALGOS:
            load = host_nodes.UNETLoader().load_unet
            theirs = load(f"native_{scheme}.safetensors", "default")[0]
            errors.append(close(ksampler(theirs, cond), ksampler(mine, cond), 0.02))
    return f"bit for bit comfy-kitchen's; ComfyUI {errors}"


@check
def comfy_kitchens_int8_linear_multiplies_as_ours() -> str:
    plain, own, theirs = (
        ksampler(quantize(ours("t2v"), "int8", name)[0])
        for name in ("dequantise", "int8", "kitchen-int8")
    )
    assert 1e-4 < relative(own, plain) < 0.02
    return close(theirs, own, 0.01)


@check
def a_lora_on_nvfp4_adds_what_it_adds_to_the_weights_they_stand_for() -> str:
    packed, meant = in_blocks(FILES["t2v"], "nvfp4")
    write(WORK / "models/diffusion_models/t2v_nvfp4.safetensors", packed)
    write(WORK / "models/diffusion_models/t2v_nvfp4_meant.safetensors", FILES["t2v"] | meant)
    fp4 = ours("t2v_nvfp4")
    changed = ksampler(applied(fp4)[0])
    assert relative(changed, ksampler(fp4)) > 1e-2, "the LoRA changed nothing"
    assert torch.equal(ksampler(with_lora(fp4)), changed)
    return close(changed, ksampler(applied(ours("t2v_nvfp4_meant"))[0]))


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


def failing(function: object, first: int, times: int) -> object:
    """`function`, which runs out of memory from call number `first` on, `times` times."""
    calls = []

    def fail(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if first <= len(calls) < first + times:
            raise mm.OOM_EXCEPTION("tried to allocate 2 GiB")
        return function(*args, **kwargs)

    return fail


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
    assert any("out of memory again; 5 frames in place of 9" in x for x in heard.lines), heard.lines
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


if __name__ == "__main__":
    main()
