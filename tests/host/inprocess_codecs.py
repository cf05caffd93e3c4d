"""Our VAE and CLIP in native nodes, and our encode and decode nodes, inside a real ComfyUI."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from inside import WORK, Heard, check, fill, gc, host_nodes, main, pack, relative, run, sentence

import comfy.latent_formats
import comfy.ldm.wan.vae
import comfy.model_management as mm
import comfy.sd
import comfy.taesd.taehv
import comfy.utils
import folder_paths
import torch
from comfy_extras import nodes_wan
from small_files import spiece_model, umt5_tensors, write

tiny_vae = pack("lightx2v_core.wan.tae")
wan_vae = pack("lightx2v_core.wan.vae")
codecs = pack("nodes.codecs")

VAE_WEIGHTS = fill(wan_vae.WanVae(wan_vae.VaeConfig(16, 16))).state_dict()
# Pixels inside -1..1: our decoder clamps each tile, the host's the blend of them.
VAE_WEIGHTS["decoder.head.2.weight"] *= 0.1
write(WORK / "models/vae/small_vae.safetensors", VAE_WEIGHTS)
TINY = fill(tiny_vae.TinyVae(tiny_vae.TinyConfig("taew2_1")))  # the sizes that the host knows
# As above: pixels inside 0..1.
TINY.decoder[22].weight *= 0.3
TINY.decoder[22].bias.fill_(0.5)
TINY_WEIGHTS = TINY.state_dict()
write(WORK / "models/vae_approx/taew2_1.safetensors", TINY_WEIGHTS)
write(WORK / "models/vae_approx/lighttaew2_1.safetensors", TINY_WEIGHTS)
TEXT_WEIGHTS = umt5_tensors(64)
write(WORK / "models/text_encoders/small_umt5.safetensors", TEXT_WEIGHTS)

rng = torch.Generator().manual_seed(6)
CLIP_FRAMES = torch.rand(9, 64, 64, 3, generator=rng)
LATENT = {"samples": torch.randn(1, 16, 3, 8, 8, generator=rng)}
WIDE_LATENT = {"samples": torch.randn(1, 16, 2, 4, 12, generator=rng)}
PROMPT = "a red circle   moving right"


def our_vae() -> object:
    return run("LightX2VLoadVae", file="small_vae.safetensors")[0]


def native_vae() -> object:
    return comfy.sd.VAE(sd=dict(VAE_WEIGHTS), dtype=torch.float32)


def our_tiny_vae(release: str) -> object:
    return run("LightX2VLoadVae", file=f"vae_approx/{release}.safetensors")[0]


def native_taehv(latent_format: object) -> object:
    """The host's tiny decoder, told how the latents on the wire are scaled."""
    theirs = comfy.taesd.taehv.TAEHV(16, latent_format=latent_format, show_progress_bar=False)
    theirs.load_state_dict(TINY_WEIGHTS)
    return theirs.eval()


def our_clip() -> object:
    return run("LightX2VLoadTextEncoder", file="small_umt5.safetensors")[0]


def encode(clip: object, prompt: str = PROMPT) -> list:
    return host_nodes.CLIPTextEncode().encode(clip, prompt)[0]


def close(actual: torch.Tensor, expected: torch.Tensor, limit: float = 1e-5) -> str:
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = relative(actual, expected)
    assert error <= limit, f"relative error {error:.2e} is above {limit:.0e}"
    return f"{error:.1e}"


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
def the_latent_border_has_the_hosts_own_statistics() -> None:
    native = comfy.latent_formats.Wan21()
    latent = LATENT["samples"]
    torch.testing.assert_close(wan_vae.normalise(latent), native.process_in(latent))
    torch.testing.assert_close(wan_vae.denormalise(latent), native.process_out(latent))


@check
def vae_encode_gives_the_raw_mean_of_the_native_vae() -> str:
    ours, theirs = (
        host_nodes.VAEEncode().encode(vae, CLIP_FRAMES)[0] for vae in (our_vae(), native_vae())
    )
    return close(ours["samples"], theirs["samples"])


@check
def a_picture_with_grey_frames_encodes_as_with_the_native_vae_without_computing_each() -> str:
    clip = torch.full((33, 32, 32, 3), 0.5)
    clip[0] = CLIP_FRAMES[0, :32, :32]
    ours, theirs = (vae.encode(clip) for vae in (our_vae(), native_vae()))
    stills = pack("lightx2v_core.wan.vae_pieces").find_stills
    seen = clip.permute(3, 0, 1, 2)[None] * 2.0 - 1.0
    assert stills(seen) == [(1, 33)]
    return close(ours, theirs)


@check
def vae_decode_gives_the_pixels_of_the_native_vae() -> str:
    ours, theirs = (
        host_nodes.VAEDecode().decode(vae, LATENT)[0] for vae in (our_vae(), native_vae())
    )
    assert ours.shape == (9, 64, 64, 3)
    assert float(ours.min()) >= 0.0 and float(ours.max()) <= 1.0
    return close(ours, theirs)


@check
def odd_picture_sides_are_cropped_as_by_the_native_vae() -> str:
    frames = torch.rand(5, 70, 66, 3, generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        host_nodes.VAEEncode().encode(vae, frames)[0] for vae in (our_vae(), native_vae())
    )
    return close(ours["samples"], theirs["samples"])


@check
def tiled_vae_nodes_equal_the_native_vae() -> str:
    latent = {"samples": torch.randn(1, 16, 3, 10, 10, generator=torch.Generator().manual_seed(2))}
    decoded = [
        host_nodes.VAEDecodeTiled().decode(vae, latent, 64, 16, 8, 4)[0]
        for vae in (our_vae(), native_vae())
    ]
    encoded = [
        host_nodes.VAEEncodeTiled().encode(vae, CLIP_FRAMES, 64, 16, 8, 4)[0]["samples"]
        for vae in (our_vae(), native_vae())
    ]
    return f"{close(*decoded)}, {close(*encoded)}"


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


@check
def wan_image_to_video_on_our_vae_equals_native() -> str:
    asked = {"width": 64, "height": 64, "length": 9, "batch_size": 1}
    conds = []
    for vae in (our_vae(), native_vae()):
        out = nodes_wan.WanImageToVideo.execute(
            positive=[[torch.zeros(1, 4, 8), {}]],
            negative=[[torch.zeros(1, 4, 8), {}]],
            vae=vae,
            start_image=CLIP_FRAMES[:1],
            **asked,
        )
        conds.append(out.args[0][0][1]["concat_latent_image"])
    return close(*conds)


def ours_and_native_condition(end: torch.Tensor | None = None) -> tuple[dict, dict]:
    vae, text = native_vae(), [[torch.zeros(1, 4, 8), {"kept": 1}]]
    ends = {} if end is None else {"end_image": end}
    ours = run(
        "LightX2VImageToVideo",
        **{"positive": text, "vae": vae, "start_image": CLIP_FRAMES[:1]},
        **{"width": 64, "height": 64, "frames": 9},
        **ends,
    )
    node = nodes_wan.WanImageToVideo if end is None else nodes_wan.WanFirstLastFrameToVideo
    theirs = node.execute(
        **{"positive": text, "negative": text, "vae": vae, "start_image": CLIP_FRAMES[:1]},
        **{"width": 64, "height": 64, "length": 9, "batch_size": 1},
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
    ours, theirs = ours_and_native_condition(CLIP_FRAMES[-1:])
    assert torch.equal(ours["concat_mask"], theirs["concat_mask"])
    return close(ours["concat_latent_image"], theirs["concat_latent_image"])


@check
def several_start_images_are_the_first_frames() -> None:
    out = run(
        "LightX2VImageToVideo",
        **{"positive": [[torch.zeros(1, 4, 8), {}]], "vae": our_vae()},
        **{"start_image": CLIP_FRAMES[:5], "width": 64, "height": 64, "frames": 9},
    )
    mask = out[0][0][1]["concat_mask"]
    assert not mask[:, :, :2].any() and mask[:, :, 2].all()


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
def decode_video_equals_vae_decode_on_both_vaes() -> None:
    for vae in (our_vae(), native_vae()):
        frames = run("LightX2VDecodeVideo", latent=LATENT, vae=vae)[0]
        assert torch.equal(frames, host_nodes.VAEDecode().decode(vae, LATENT)[0])


class Tight:
    """A VAE object of the host whose decoder runs out of memory a number of times."""

    def __init__(self, vae: object, failures: int) -> None:
        self.vae, self.left, self.calls = vae, failures, []
        self.decode = vae.first_stage_model.decode
        vae.first_stage_model.decode = self

    def __call__(self, samples: torch.Tensor, **options: object) -> torch.Tensor:
        self.calls.append(tuple(samples.shape[2:]))
        if self.left:
            self.left -= 1
            raise torch.OutOfMemoryError("no room on this card")
        return self.decode(samples, **options)


@check
def short_memory_unloads_others_first_and_tiles_last() -> str:
    other = our_clip()
    encode(other)
    latent = {"samples": torch.randn(1, 16, 2, 12, 12, generator=torch.Generator().manual_seed(3))}
    decode = pack("nodes.decode")
    decode.TILE, decode.OVERLAP = 64, 16
    whole = run("LightX2VDecodeVideo", latent=latent, vae=our_vae())[0]

    retry = Tight(our_vae(), 1)
    with Heard() as heard:
        again = run("LightX2VDecodeVideo", latent=latent, vae=retry.vae)[0]
    assert retry.calls == [(2, 12, 12)] * 2, retry.calls
    assert torch.equal(again, whole)
    assert all(entry.model is not other.patcher for entry in mm.current_loaded_models)
    assert any("other models unloaded" in line for line in heard.lines), heard.lines

    tiles = Tight(our_vae(), 2)
    tiled = run("LightX2VDecodeVideo", latent=latent, vae=tiles.vae)[0]
    assert tiles.calls[:2] == [(2, 12, 12)] * 2 and tiles.calls[2][1:] == (8, 8), tiles.calls
    assert tiled.shape == whole.shape
    return f"tiled differs by {relative(tiled, whole):.1e}"


@check
def a_failed_decode_saves_the_latent_and_names_the_file() -> str:
    tight = Tight(our_vae(), 99)
    told = sentence(lambda: run("LightX2VDecodeVideo", latent=LATENT, vae=tight.vae))
    assert told.startswith("OutOfMemoryError"), told
    path = Path(told.partition("saved as ")[2].partition(":")[0])
    assert path.is_file() and path.is_relative_to(folder_paths.get_output_directory()), told
    copied = WORK / "input" / path.name
    copied.write_bytes(path.read_bytes())
    read = host_nodes.NODE_CLASS_MAPPINGS.get("LoadLatent") or host_nodes.LoadLatent
    assert torch.equal(read().load(path.name)[0]["samples"], LATENT["samples"])
    return told


@check
def an_interrupted_decode_saves_nothing() -> None:
    before = set((WORK / "output").rglob("*.latent"))
    mm.interrupt_current_processing(True)
    told = sentence(lambda: run("LightX2VDecodeVideo", latent=LATENT, vae=our_vae()))
    assert told.startswith("InterruptProcessingException"), told
    assert set((WORK / "output").rglob("*.latent")) == before


@check
def a_latent_with_nan_is_a_sentence_and_not_black_frames() -> None:
    bad = {"samples": LATENT["samples"] * float("nan")}
    told = sentence(lambda: run("LightX2VDecodeVideo", latent=bad, vae=our_vae()))
    assert "NaN" in told, told


@check
def vae_sizes_are_true_and_free_empties_it() -> None:
    vae = our_vae()
    host_nodes.VAEDecode().decode(vae, LATENT)
    size = sum(t.nbytes for t in VAE_WEIGHTS.values())
    assert vae.patcher.model_size() == vae.patcher.loaded_size() == vae.model_size() == size
    mm.unload_all_models()
    assert vae.patcher.loaded_size() == 0
    assert torch.equal(
        host_nodes.VAEDecode().decode(vae, LATENT)[0],
        host_nodes.VAEDecode().decode(our_vae(), LATENT)[0],
    )


@check
def clip_text_encode_gives_the_cores_states_padded_to_512() -> str:
    cond = encode(our_clip())
    assemble = pack("lightx2v_core.assemble")
    path = WORK / "models/text_encoders/small_umt5.safetensors"
    states = assemble.load_text_encoder(path, dtype=torch.float32).encode([PROMPT])
    assert cond[0][0].shape == (1, 512, 64)
    return close(cond[0][0], states, 0.0)


@check
def clip_text_encode_equals_the_hosts_own_wan_encoder() -> str:
    import comfy.text_encoders.wan

    te = comfy.text_encoders.wan.te(dtype_t5=torch.float32)
    config = {
        **{"d_ff": 128, "d_kv": 32, "d_model": 64, "num_heads": 2, "num_layers": 2},
        **{"vocab_size": 48, "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True},
        **{"model_type": "umt5", "decoder_start_token_id": 0, "dropout_rate": 0.0},
        **{"eos_token_id": 1, "pad_token_id": 0, "layer_norm_epsilon": 1e-06},
        **{"relative_attention_num_buckets": 32, "tie_word_embeddings": False},
    }
    native = comfy.text_encoders.t5.T5(config, torch.float32, "cpu", comfy.ops.manual_cast)
    weights = {k: v for k, v in TEXT_WEIGHTS.items() if k != "spiece_model"}
    native.load_state_dict(weights, strict=False)
    clip = our_clip()
    ids = [token[0] for token in clip.tokenize(PROMPT)["umt5xxl"][0]]
    tokens = torch.zeros(1, 512, dtype=torch.int64)
    tokens[0, : len(ids)] = torch.tensor(ids)
    mask = (torch.arange(512) < len(ids)).long()[None]
    embeds = native.get_input_embeddings()(tokens, out_dtype=torch.float32)
    theirs = native(None, attention_mask=mask, embeds=embeds)[0]
    assert te is not None
    return close(encode(clip)[0][0], theirs * mask[..., None])


@check
def a_broken_transformers_package_is_a_sentence_with_its_cause() -> str:
    def broken(*_: object, **__: object) -> None:
        try:
            raise RuntimeError("TorchAudio was built for another PyTorch")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'UMT5EncoderModel'") from error

    names = codecs.load_text_encoder.__globals__
    real, names["build_text_encoder"] = names["build_text_encoder"], broken
    try:
        told = sentence(our_clip)
    finally:
        names["build_text_encoder"] = real
    assert "TorchAudio was built for another PyTorch" in told, told
    assert "install or repair it" in told, told
    return told


@check
def clip_survives_clone_lora_set_last_layer_and_zero_out() -> None:
    clip = our_clip()
    plain = encode(clip)[0][0]
    assert torch.equal(encode(clip.clone())[0][0], plain)
    with Heard() as heard:
        stopped = host_nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
        assert torch.equal(encode(stopped)[0][0], plain)
    assert any("CLIPSetLastLayer" in line for line in heard.lines)
    zeroed = host_nodes.ConditioningZeroOut().zero_out(encode(clip))[0]
    assert not zeroed[0][0].any()


@check
def a_native_lora_on_our_clip_changes_it_and_is_undone() -> None:
    clip = our_clip()
    plain = encode(clip)[0][0]
    stem = "text_encoders.encoder.transformer.encoder.block.0.layer.0.SelfAttention.q"
    up = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    tensors = {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": up.t().contiguous()}
    write(WORK / "models/loras/text.safetensors", tensors)
    with Heard() as heard:
        _, changed = host_nodes.LoraLoader().load_lora(None, clip, "text.safetensors", 1.0, 1.0)
    assert not [line for line in heard.lines if "not loaded" in line.lower()], heard.lines
    assert not torch.equal(encode(changed)[0][0], plain)
    assert torch.equal(encode(clip)[0][0], plain)


@check
def a_prompt_of_more_than_512_tokens_is_cut_with_a_warning() -> None:
    with Heard() as heard:
        cond = encode(our_clip(), "moving right " * 400)
    assert cond[0][0].shape == (1, 512, 64)
    assert any("the first 512 are used" in line for line in heard.lines)


@check
def an_encoder_without_a_tokenizer_is_a_sentence() -> str:
    bare = {k: v for k, v in TEXT_WEIGHTS.items() if k != "spiece_model"}
    folder = WORK / "models/text_encoders/alone"
    folder.mkdir(exist_ok=True)
    write(folder / "bare.safetensors", bare)
    told = sentence(lambda: run("LightX2VLoadTextEncoder", file="alone/bare.safetensors"))
    assert "no UMT5 tokenizer for bare.safetensors" in told, told
    (folder / "spiece.model").write_bytes(spiece_model())
    with_file = run("LightX2VLoadTextEncoder", file="alone/bare.safetensors")[0]
    assert torch.equal(encode(with_file)[0][0], encode(our_clip())[0][0])
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
    ours = {n for f in ("diffusion_models", "vae", "text_encoders") for n in files.list_files(f)}
    assert {f"{files.DEMO_PREFIX}{n}" for n in shipped} <= ours
    for folder in folder_paths.folder_names_and_paths:
        names = folder_paths.get_filename_list(folder)
        assert not any(n.startswith(files.DEMO_PREFIX) for n in names)
        assert not shipped & {Path(n).name for n in names}, folder
    return f"{len(shipped)} demo files"


@check
def nothing_of_ours_stays_behind_when_the_last_reference_goes() -> None:
    import weakref

    vae, clip = our_vae(), our_clip()
    encode(clip)
    host_nodes.VAEDecode().decode(vae, LATENT)
    alive = [weakref.ref(vae.first_stage_model), weakref.ref(clip.cond_stage_model)]
    del vae, clip
    gc.collect()
    mm.cleanup_models()
    assert [ref() for ref in alive] == [None, None]


if __name__ == "__main__":
    main()
