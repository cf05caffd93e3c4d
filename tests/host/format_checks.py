"""Files in every number format, read and written, inside a real ComfyUI; registered by
inprocess_memory."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

from pathlib import Path

from inside import WORK, check, pack, relative, run, sentence

import torch
from small_files import write, write_gguf
from small_models import (
    FILES,
    applied,
    close,
    ksampler,
    native,
    ours,
    shifted,
    with_lora,
)


@check
def a_native_lora_on_fp8_weights_adds_what_it_adds_to_the_weights_they_stand_for() -> str:
    fp8, meant = ours("t2v_fp8"), ours("t2v_fp8_meant")
    before = ksampler(fp8)
    error = close(ksampler(with_lora(fp8)), ksampler(with_lora(meant)))
    assert relative(ksampler(with_lora(fp8)), before) > 1e-2, "the LoRA changed nothing"
    assert torch.equal(ksampler(fp8), before)
    return error


@check
def apply_lora_on_fp8_equals_the_weights_it_stands_for() -> str:
    fp8, meant = ours("t2v_fp8"), ours("t2v_fp8_meant")
    return close(ksampler(applied(fp8)[0]), ksampler(applied(meant)[0]))


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
