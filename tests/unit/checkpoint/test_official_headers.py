"""Every official transformer, by a reconstructed header: detected, counted, strictly placed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightx2v_core.checkpoint.detect import detect
from lightx2v_core.checkpoint.headers import TensorHeader
from lightx2v_core.checkpoint.layouts import to_diffusers
from lightx2v_core.checkpoint.load import assign
from lightx2v_core.checkpoint.source import Checkpoint
from lightx2v_core.errors import CheckpointError
from lightx2v_core.wan.model import WanModel
from tests.headers.reconstruct import OFFICIAL, reconstruct


def as_checkpoint(name: str, prefix: str = "", file: str | None = None) -> Checkpoint:
    headers = {prefix + key: TensorHeader(*value) for key, value in reconstruct(name).items()}
    return Checkpoint(Path(file or f"models/{name}.safetensors"), headers)


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_header_fills_the_model_strictly(name):
    header = reconstruct(name)
    info = detect(as_checkpoint(name))
    with torch.device("meta"):
        model = WanModel(info.config)
        tensors = {k: torch.empty(shape, dtype=torch.bfloat16) for k, (shape, _) in header.items()}

    assign(model, tensors, name, "Wan transformer")

    assert len(header) == OFFICIAL[name][-1] == info.tensors
    assert info.refusal is None
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {
        k: shape for k, (shape, _) in header.items()
    }


@pytest.mark.parametrize("name", OFFICIAL)
def test_one_tensor_less_or_more_is_named(name):
    info = detect(as_checkpoint(name))
    with torch.device("meta"):
        model = WanModel(info.config)
        tensors = {k: torch.empty(shape) for k, (shape, _) in reconstruct(name).items()}
    lacking = {k: v for k, v in tensors.items() if k != "blocks.7.cross_attn.k.bias"}
    surplus = tensors | {"blocks.7.extra.weight": torch.empty(1, device="meta")}

    with pytest.raises(CheckpointError, match=r"1 of .* missing \(blocks\.7\.cross_attn\.k\.bias"):
        assign(model, lacking, name, "Wan transformer")
    with pytest.raises(CheckpointError, match=r"1 tensors .* \(blocks\.7\.extra\.weight\)"):
        assign(model, surplus, name, "Wan transformer")


@pytest.mark.parametrize(
    ("name", "family", "task", "expert", "size"),
    [
        ("wan2.1_t2v_1.3b", "wan2.1", "t2v", None, "1.3B"),
        ("wan2.1_t2v_14b", "wan2.1", "t2v", None, "14B"),
        ("wan2.1_i2v_14b", "wan2.1", "i2v", None, "14B"),
        ("wan2.1_flf2v_14b", "wan2.1", "flf2v", None, "14B"),
        ("wan2.2_i2v_a14b_high_noise", "wan2.2", "i2v", "high", "14B"),
        ("wan2.2_t2v_a14b_low_noise", "wan2.2", "t2v", "low", "14B"),
    ],
)
def test_a_variant_is_told_by_its_header_and_name(name, family, task, expert, size):
    info = detect(as_checkpoint(name))

    assert (info.family, info.task, info.expert, info.size) == (family, task, expert, size)
    assert info.scheme == "bf16"


def test_a_nameless_t2v_14b_stays_of_unknown_family():
    info = detect(as_checkpoint("wan2.1_t2v_14b", file="x/model.safetensors"))

    assert (info.family, info.release, info.preset) == ("unknown", "unknown", None)


@pytest.mark.parametrize(
    ("layout", "prefix"),
    [
        ("official", ""),
        ("comfy", "model.diffusion_model."),
        ("diffusion_model", "diffusion_model."),
        ("self-forcing", "model."),
    ],
)
def test_every_prefix_is_read_as_its_layout(layout, prefix):
    info = detect(as_checkpoint("wan2.1_i2v_14b", prefix))

    assert (info.layout, info.task, info.refusal) == (layout, "i2v", None)


@pytest.mark.parametrize("name", OFFICIAL)
def test_diffusers_names_are_read_as_the_same_model(name):
    headers = {to_diffusers(k): TensorHeader(*v) for k, v in reconstruct(name).items()}

    info = detect(Checkpoint(Path(f"{name}.safetensors"), headers))

    assert info.layout == "diffusers"
    assert info.config == detect(as_checkpoint(name)).config


@pytest.mark.parametrize(
    ("file", "release"),
    [
        ("wan2.1_i2v_480p_lightx2v_4step.safetensors", "distill"),
        ("wan2.2_i2v_A14b_high_noise_lightx2v_4step_1030.safetensors", "distill-1030"),
        ("wan2.2_i2v_A14b_low_noise_lightx2v_4step_720p_260412.safetensors", "distill-260412"),
        ("something_else.safetensors", "unknown"),
    ],
)
def test_a_release_comes_from_the_published_name(file, release):
    info = detect(as_checkpoint("wan2.1_i2v_14b", file=f"models/{file}"))

    assert info.release == release
    assert info.preset == ("distill-4step" if release != "unknown" else None)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("vace_blocks.0.before_proj.weight", "VACE"),
        ("control_adapter.conv.weight", "Fun Camera"),
        ("pose_patch_embedding.weight", "Animate"),
        ("time_embedding_r.0.weight", "mean-flow"),
    ],
)
def test_a_family_that_is_not_run_is_refused_by_name(extra, words):
    checkpoint = as_checkpoint("wan2.1_t2v_14b")
    checkpoint.headers[extra] = TensorHeader((8, 8), "BF16")

    assert words in detect(checkpoint).refusal


@pytest.mark.parametrize(
    ("dtype", "scale", "scheme"),
    [
        ("F8_E4M3", {"weight_scale": (13824, 1)}, "fp8-row"),
        ("F8_E4M3", {"scale_weight": ()}, "fp8-tensor"),
        ("F8_E4M3", {}, "fp8-cast"),
        ("F8_E5M2", {}, "fp8-e5m2"),
        ("I8", {"weight_scale": (13824, 1)}, "int8-row"),
    ],
)
def test_a_quantised_file_is_named_and_refused(dtype, scale, scheme):
    checkpoint = as_checkpoint("wan2.1_t2v_14b")
    headers = checkpoint.headers
    for key, header in list(headers.items()):
        if key.startswith("blocks.") and key.endswith("weight") and len(header.shape) == 2:
            headers[key] = TensorHeader(header.shape, dtype)
            stem = key.removesuffix("weight")
            headers.update({stem + leaf: TensorHeader(s, "F32") for leaf, s in scale.items()})

    info = detect(checkpoint)

    assert info.scheme == scheme
    assert f"quantised as {scheme}" in info.refusal


@pytest.mark.parametrize(
    ("key", "kind", "advice"),
    [
        ("decoder.middle.0.residual.0.gamma", "vae", "VAE loader"),
        ("blocks.0.pos_embedding.embedding.weight", "text encoder", "text encoder loader"),
        ("visual.patch_embedding.weight", "clip vision", "CLIPVisionLoader"),
        ("diffusion_model.blocks.0.ffn.0.lora_up.weight", "lora", "LoRA node"),
        ("model.layers.0.weight", "unknown", "model.layers.0.weight"),
    ],
)
def test_another_kind_of_file_is_told_where_it_belongs(key, kind, advice):
    info = detect(Checkpoint(Path("file.safetensors"), {key: TensorHeader((4, 4), "F16")}))

    assert info.kind == kind
    assert info.refusal.startswith("file.safetensors is not a Wan transformer")
    assert advice in info.refusal
