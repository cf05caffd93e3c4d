"""Tiny VAEs inside a real ComfyUI; registered by inprocess_codecs."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations


from inside import WORK, Heard, check, host_nodes, pack, relative, run, sentence

import comfy.latent_formats
import comfy.ldm.wan.vae
import comfy.model_management as mm
import comfy.sd
import comfy.taesd.taehv
import comfy.utils
import torch
from small_codecs import (
    CLIP_FRAMES,
    TINY_WEIGHTS,
    WIDE_LATENT,
    close,
    native_vae,
    our_tiny_vae,
)
from small_files import write


def native_taehv(latent_format: object) -> object:
    """The host's tiny decoder, told how the latents on the wire are scaled."""
    theirs = comfy.taesd.taehv.TAEHV(16, latent_format=latent_format, show_progress_bar=False)
    theirs.load_state_dict(TINY_WEIGHTS)
    return theirs.eval()


@check
def a_tiny_vae_decodes_as_the_hosts_own_in_every_native_node() -> str:
    # What lighttaew2_1 is to the host: latents as they come from the encoder.
    theirs = comfy.sd.VAE(sd=dict(TINY_WEIGHTS), dtype=torch.float32)
    ours = our_tiny_vae("lighttaew2_1")
    told = []
    for decode in (
        lambda vae: host_nodes.VAEDecode().decode(vae, WIDE_LATENT),
        lambda vae: host_nodes.VAEDecodeTiled().decode(vae, WIDE_LATENT, 64, 16, 8, 4),
        lambda vae: run("LightX2VDecodeVideo", latent=WIDE_LATENT, vae=vae),
    ):
        frames = decode(ours)[0]
        told.append(close(frames, decode(theirs)[0]))
        assert frames.shape == (5, 32, 96, 3)
        assert frames.std() > 0.02 and frames.min() > 0.0 and frames.max() < 1.0
    return ", ".join(told)


@check
def taew2_1_reads_the_normalised_latent_behind_the_wire() -> str:
    theirs = native_taehv(comfy.latent_formats.Wan21).decode(WIDE_LATENT["samples"])
    frames, light = (
        host_nodes.VAEDecode().decode(our_tiny_vae(release), WIDE_LATENT)[0]
        for release in ("taew2_1", "lighttaew2_1")
    )
    assert relative(light, frames) > 0.01
    return close(frames, theirs[0].movedim(0, -1))


@check
def a_tiny_vae_encodes_as_the_hosts_own() -> str:
    told = []
    for release, form in (("taew2_1", comfy.latent_formats.Wan21), ("lighttaew2_1", None)):
        vae = our_tiny_vae(release)
        frames = CLIP_FRAMES[:, :32, :48]
        with Heard() as heard:
            ours = host_nodes.VAEEncode().encode(vae, frames)[0]["samples"]
        assert any("for start images use wan_2.1_vae" in line for line in heard.lines)
        theirs = native_taehv(form).encode(frames.movedim(-1, 0)[None])
        told.append(close(ours, theirs))
    return ", ".join(told)


@check
def a_tiny_vae_asks_for_less_memory_than_the_real_one_and_for_its_true_size() -> str:
    tiny, real = our_tiny_vae("taew2_1"), native_vae()
    latent, clip = (1, 16, 21, 60, 104), (1, 3, 81, 480, 832)
    decode = tiny.memory_used_decode(latent, torch.bfloat16)
    encode = tiny.memory_used_encode(clip, torch.bfloat16)
    assert 0.5e9 < decode < 0.5 * real.memory_used_decode(latent, torch.bfloat16), decode
    assert 0.5e9 < encode < 0.5 * real.memory_used_encode(clip, torch.bfloat16), encode
    mm.load_models_gpu([tiny.patcher])
    assert tiny.patcher.loaded_size() == sum(t.nbytes for t in TINY_WEIGHTS.values())
    return f"decode {decode / 1e9:.2f} GB, encode {encode / 1e9:.2f} GB at 832x480, 81 frames"


@check
def tiny_vaes_of_wan_alone_are_listed_with_their_folder() -> None:
    write(WORK / "models/vae_approx/taesd_decoder.safetensors", {"a": torch.zeros(1)})
    listed = pack("nodes.files").list_vaes()
    tiny = [name for name in listed if name.startswith("vae_approx/")]
    assert tiny == ["vae_approx/lighttaew2_1.safetensors", "vae_approx/taew2_1.safetensors"], listed
    assert "small_vae.safetensors" in listed
    assert "wan2.1, taew2_1" in run("LightX2VInspect", file=tiny[1])[0]


@check
def a_tiny_vae_is_refused_for_start_images_with_what_to_do() -> str:
    native = comfy.sd.VAE(sd=dict(TINY_WEIGHTS), dtype=torch.float32)
    for vae in (our_tiny_vae("taew2_1"), native):
        told = sentence(
            lambda: run(
                "LightX2VImageToVideo",
                **{"positive": [[torch.zeros(1, 4, 8), {}]], "vae": vae},  # noqa: B023
                **{"start_image": CLIP_FRAMES[:1], "width": 64, "height": 64, "frames": 9},
            )
        )
        assert told.startswith("RequestError") and "Encode with wan_2.1_vae" in told, told
    alone = {k: v for k, v in TINY_WEIGHTS.items() if k.startswith("decoder.")}
    write(WORK / "models/vae/taew2_1_decoder.safetensors", alone)
    decoder = run("LightX2VLoadVae", file="taew2_1_decoder.safetensors")[0]
    told_by_native = sentence(lambda: host_nodes.VAEEncode().encode(decoder, CLIP_FRAMES))
    assert "cannot encode; use wan_2.1_vae" in told_by_native, told_by_native
    return told
