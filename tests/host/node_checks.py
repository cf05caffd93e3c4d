"""What all nodes share, start images, files and Inspect inside a real ComfyUI; registered by
inprocess_codecs."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

from pathlib import Path

from inside import WORK, Heard, check, host_nodes, pack, run, sentence

import folder_paths
import torch
from comfy_extras import nodes_wan
from small_codecs import (
    CLIP_FRAMES,
    LATENT,
    TEXT_WEIGHTS,
    VAE_WEIGHTS,
    close,
    native_vae,
    our_vae,
)
from small_files import write

# As large as shows that two encoders agree.
STARTS = CLIP_FRAMES[:, :32, :32]


@check
def every_node_has_name_category_description_and_tooltips_where_it_has_widgets() -> str:
    ids = [i for i in host_nodes.NODE_CLASS_MAPPINGS if i.startswith("LightX2V")]
    assert len(ids) == len(pack("nodes").NODES), ids
    for node_id in ids:
        cls = host_nodes.NODE_CLASS_MAPPINGS[node_id]
        schema = cls.GET_SCHEMA()
        assert schema.node_id == f"LightX2V{cls.__name__}"
        assert schema.display_name.endswith("(LightX2V)")
        assert schema.category.startswith("LightX2V/") and schema.description
        for widget in schema.inputs:
            assert widget.tooltip or not hasattr(widget, "default") or widget.id == "seed", (
                widget.id
            )
        assert (Path(__file__).parents[2] / f"web/docs/{node_id}.md").is_file(), node_id
    return f"{len(ids)} nodes"


@check
def an_older_comfyui_is_refused_with_one_sentence() -> str:
    nodes = pack("nodes")
    real = nodes.comfyui_version.__version__
    try:
        for version, is_refused in (("0.3.64", True), ("0.7.9", True), ("0.8.0", False)):
            nodes.comfyui_version.__version__ = version
            if is_refused:
                told = sentence(nodes.make_extension)
                assert f"needs ComfyUI 0.8.0 or newer and this is {version}" in told, told
            else:
                nodes.make_extension()
    finally:
        nodes.comfyui_version.__version__ = real
    return told


@check
def a_node_that_cannot_be_built_is_named_and_the_others_stay() -> None:
    import asyncio

    nodes = pack("nodes")
    real = nodes.NODES
    nodes.NODES = (*real, ("load", "NoSuchNode"), ("no_such_module", "Anything"))
    try:
        with Heard() as heard:
            found = asyncio.run(nodes.make_extension().get_node_list())
    finally:
        nodes.NODES = real
    assert len(found) == len(real)
    assert any("LightX2V node NoSuchNode is left out" in line for line in heard.lines)


@check
def wan_image_to_video_on_our_vae_equals_native() -> str:
    asked = {"width": 32, "height": 32, "length": 9, "batch_size": 1}
    conds = []
    for vae in (our_vae(), native_vae()):
        out = nodes_wan.WanImageToVideo.execute(
            positive=[[torch.zeros(1, 4, 8), {}]],
            negative=[[torch.zeros(1, 4, 8), {}]],
            vae=vae,
            start_image=STARTS[:1],
            **asked,
        )
        conds.append(out.args[0][0][1]["concat_latent_image"])
    return close(*conds)


def ours_and_native_condition(end: torch.Tensor | None = None) -> tuple[dict, dict]:
    vae, text = native_vae(), [[torch.zeros(1, 4, 8), {"kept": 1}]]
    ends = {} if end is None else {"end_image": end}
    ours = run(
        "LightX2VImageToVideo",
        **{"positive": text, "vae": vae, "start_image": STARTS[:1]},
        **{"width": 32, "height": 32, "frames": 9},
        **ends,
    )
    node = nodes_wan.WanImageToVideo if end is None else nodes_wan.WanFirstLastFrameToVideo
    theirs = node.execute(
        **{"positive": text, "negative": text, "vae": vae, "start_image": STARTS[:1]},
        **{"width": 32, "height": 32, "length": 9, "batch_size": 1},
        **ends,
    ).args
    assert ours[2]["samples"].shape == theirs[2]["samples"].shape
    assert ours[0][0][1]["kept"] == 1
    assert not ours[1][0][0].any()
    return ours[0][0][1], theirs[0][0][1]


@check
def our_image_to_video_writes_what_native_writes() -> str:
    ours, theirs = ours_and_native_condition()
    native_mask = theirs["concat_mask"].expand_as(ours["concat_mask"])
    assert torch.equal(ours["concat_mask"], native_mask)
    return close(ours["concat_latent_image"], theirs["concat_latent_image"])


@check
def our_first_and_last_frame_is_what_native_writes() -> str:
    ours, theirs = ours_and_native_condition(STARTS[-1:])
    assert torch.equal(ours["concat_mask"], theirs["concat_mask"])
    return close(ours["concat_latent_image"], theirs["concat_latent_image"])


@check
def several_start_images_are_the_first_frames() -> None:
    out = run(
        "LightX2VImageToVideo",
        **{"positive": [[torch.zeros(1, 4, 8), {}]], "vae": our_vae()},
        **{"start_image": STARTS[:5], "width": 32, "height": 32, "frames": 9},
    )
    mask = out[0][0][1]["concat_mask"]
    assert not mask[:, :, :2].any() and mask[:, :, 2].all()


@check
def another_prompt_does_not_encode_the_same_picture_again() -> None:
    vae, calls = our_vae(), []
    encode = vae.encode
    vae.encode = lambda pixels: (calls.append(1), encode(pixels))[1]

    def condition(**changes: object) -> torch.Tensor:
        asked = {"start_image": CLIP_FRAMES[:1].clone(), "width": 64, "height": 64, "frames": 9}
        text = [[torch.randn(1, 4, 8), {}]]
        out = run("LightX2VImageToVideo", positive=text, vae=vae, **{**asked, **changes})
        return out[0][0][1]["concat_latent_image"]

    first = condition()
    assert torch.equal(condition(), first) and len(calls) == 1
    for changes in ({"frames": 5}, {"start_image": CLIP_FRAMES[1:2]}, {"image_fit": "pad"}):
        condition(**changes)
    assert len(calls) == 4
    assert torch.equal(condition(), first) and len(calls) == 5


@check
def sizes_that_do_not_fit_are_snapped_and_named() -> None:
    with Heard() as heard:
        out = run("LightX2VEmptyVideoLatent", width=640, height=360, frames=80)
    assert out[0]["samples"].shape == (1, 16, 21, 46, 80), out[0]["samples"].shape
    told = " ".join(heard.lines)
    assert "640x360, 80 frames" in told and "640x368, 81 frames" in told, told


@check
def a_5b_vae_is_a_sentence_before_encoding_and_before_decoding() -> str:
    vae = our_vae()
    vae.latent_channels = 48
    told = sentence(
        lambda: run(
            "LightX2VImageToVideo",
            **{"positive": [[torch.zeros(1, 4, 8), {}]], "vae": vae, "width": 64, "height": 64},
            **{"start_image": CLIP_FRAMES[:1], "frames": 9},
        )
    )
    assert "wan2.2_vae, only for the 5B model" in told, told
    told = sentence(lambda: run("LightX2VDecodeVideo", latent=LATENT, vae=vae))
    assert "takes 48 latent channels and got 16" in told, told
    pictures = our_vae()
    pictures.latent_dim = 2
    told_of_pictures = sentence(lambda: run("LightX2VDecodeVideo", latent=LATENT, vae=pictures))
    assert "a VAE for pictures" in told_of_pictures, told_of_pictures
    return told


@check
def wrong_and_broken_files_are_sentences() -> str:
    models = WORK / "models/diffusion_models"
    write(models / "a_vae.safetensors", VAE_WEIGHTS)
    write(WORK / "models/vae/an_encoder.safetensors", TEXT_WEIGHTS)
    whole = (models / "a_vae.safetensors").read_bytes()
    (models / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 14000000000\n"
    (models / "pointer.safetensors").write_text(pointer)
    told = []
    for name, words in (
        ("a_vae.safetensors", "not a Wan transformer but a vae file"),
        ("cut.safetensors", "download"),
        ("pointer.safetensors", "LFS"),
    ):
        choices = {"quantisation": "keep", "attention": "auto", "memory": "auto"}
        told.append(sentence(lambda: run("LightX2VLoadModel", file=name, **choices)))  # noqa: B023
        assert told[-1].startswith("CheckpointError") and words in told[-1], told[-1]
    told.append(sentence(lambda: run("LightX2VLoadVae", file="an_encoder.safetensors")))
    assert "is not a Wan 2.1 VAE" in told[-1], told[-1]
    told.append(sentence(lambda: run("LightX2VLoadTextEncoder", file="small_umt5.safetensors~")))
    assert "not in the folder" in told[-1], told[-1]
    return " | ".join(told)


@check
def inspect_says_what_any_file_is() -> str:
    report = run("LightX2VInspect", file="vae/small_vae.safetensors")[0]
    assert "this version: loads it with Load VAE" in report, report
    text = run("LightX2VInspect", file="text_encoders/small_umt5.safetensors")[0]
    assert "umt5" in text and '"runs": true' in text, text
    return report.splitlines()[0]


@check
def fingerprints_change_with_the_file_and_only_then() -> None:
    files = pack("nodes.files")
    name = "small_vae.safetensors"
    first = files.fingerprint("vae", name)
    assert files.fingerprint("vae", name) == first
    path = WORK / "models/vae" / name
    path.touch()
    assert files.fingerprint("vae", name) != first


@check
def the_demo_is_listed_for_our_loaders_alone() -> str:
    files, presets = pack("nodes.files"), pack("lightx2v_core.presets")
    shipped = {p.name for p in presets.DEMO_FOLDER.glob("*.safetensors")}
    ours = {n for folder in files.DEMO_PARTS for n in files.list_files(folder)}
    assert {f"{files.DEMO_PREFIX}{n}" for n in shipped} <= ours
    for folder in folder_paths.folder_names_and_paths:
        names = folder_paths.get_filename_list(folder)
        assert not any(n.startswith(files.DEMO_PREFIX) for n in names)
        assert not shipped & {Path(n).name for n in names}, folder
    return f"{len(shipped)} demo files"
