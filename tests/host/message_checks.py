"""The mistakes of docs/messages.md with ComfyUI's own nodes and with ours: what each says.

Registered by inprocess_settings.
"""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

from pathlib import Path

from inside import IS_DYNAMIC, WORK, Heard, check, pack, sentence

import comfy.ldm.wan.vae2_2
import comfy.sd
import comfy.utils
import torch
from small_files import write
from small_models import (
    FILES,
    applied,
    distill,
    image_cond,
    ksampler,
    lora,
    native,
    ours,
    with_lora,
)

MODELS = WORK / "models"


def contains(told: str, *words: str) -> str:
    for word in words:
        assert word in told, told
    return told


@check
def comfyuis_own_loader_names_every_key_that_is_left_out() -> str:
    key = "diffusion_model.img_emb.proj.0.diff_b"
    tensors = {**lora(with_diffs=False), key: torch.zeros(1280)}
    write(MODELS / "loras/image_keys.safetensors", tensors)
    with Heard() as heard:
        from comfy import lora as host_lora, lora_convert

        names = host_lora.model_lora_keys_unet(native().model, {})
        host_lora.load_lora(lora_convert.convert_lora(dict(tensors)), names)
    assert f"lora key not loaded: {key}" in heard.lines, heard.lines
    with_lora(native())
    summary = applied(ours(), "image_keys.safetensors")[1]
    return contains(summary, "ignored 1 image-embedding layers", "harmless")


@check
def the_vae_of_the_5b_model_fails_in_comfyui_with_numbers_of_channels() -> str:
    theirs = comfy.ldm.wan.vae2_2.WanVAE(
        dim=16, dec_dim=16, z_dim=48, dim_mult=[1, 1, 1, 1], num_res_blocks=1
    )
    latent = torch.zeros(1, 16, 2, 4, 4)
    contains(sentence(lambda: theirs.decode(latent)), "to have 48 channels, but got 16 channels")
    checks = pack("nodes.checks")
    return contains(sentence(lambda: checks.check_latent(latent, 48, "this VAE")), "wan_2.1_vae")


@check
def a_wrong_text_encoder_fails_in_comfyui_with_the_sides_of_two_matrices() -> str:
    wrong = [[torch.zeros(1, 77, 768), {}]]
    told = sentence(lambda: ksampler(native("native"), wrong))
    contains(told, "mat1 and mat2 shapes cannot be multiplied (77x768 and 4096x256)")
    for model in (native("native"), ours("native")):
        told = sentence(lambda model=model: distill(model, wrong))
        contains(told, "a CLIP-L encoding (768 wide)", "needs 4096", "umt5_xxl")
    return told


@check
def blocks_alone_are_no_model_to_comfyui_either() -> str:
    blocks = {k: v for k, v in FILES["t2v"].items() if k.startswith("blocks.")}
    path = write(MODELS / "diffusion_models/blocks_alone.safetensors", blocks)
    contains(sentence(lambda: comfy.sd.load_diffusion_model(str(path))), "ERROR", "model type")
    return contains(sentence(lambda: ours("blocks_alone")), "and not the rest of it")


@check
def half_a_file_fails_in_comfyui_in_the_words_of_safetensors() -> str:
    whole = (MODELS / "diffusion_models/t2v.safetensors").read_bytes()
    files = {
        "half": (whole[: len(whole) // 2], "incomplete metadata", "of weights are there"),
        "pointer": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "header too large",
            "is a Git-LFS pointer of",
        ),
    }
    told = []
    for name, (content, theirs, our_words) in files.items():
        path = Path(MODELS / f"diffusion_models/{name}.safetensors")
        path.write_bytes(content)
        if not IS_DYNAMIC:  # there ComfyUI reads safetensors by itself, in words that change
            contains(sentence(lambda p=path: comfy.utils.load_torch_file(str(p))).lower(), theirs)
        told.append(contains(sentence(lambda n=name: ours(n)), our_words))
    return "; ".join(told)


@check
def clip_vision_is_optional_and_an_i2v_model_runs_without_it() -> None:
    with Heard() as heard:
        samples = distill(ours("i2v"), image_cond())[0]["samples"]
    told = "this Wan 2.1 image-to-video model runs without its CLIP vision input"
    assert any(told in line for line in heard.lines), heard.lines
    assert torch.isfinite(samples).all()
    assert samples.std() > 0.01
