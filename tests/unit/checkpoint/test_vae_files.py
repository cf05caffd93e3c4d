"""VAE files in every published form: told apart by their headers, placed strictly, refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightx2v_core.assemble import load_vae
from lightx2v_core.checkpoint.detect import CheckpointInfo, detect
from lightx2v_core.checkpoint.headers import TensorHeader
from lightx2v_core.checkpoint.layouts import vae_to_diffusers
from lightx2v_core.checkpoint.source import Checkpoint
from lightx2v_core.errors import CheckpointError
from lightx2v_core.wan.tae import TinyConfig, TinyVae
from lightx2v_core.wan.vae import VaeConfig, WanVae
from tests.conftest import fill
from tests.headers.reconstruct_vae import TINY_TENSORS, WAN_VAES, Shapes, tiny_vae, wan_vae

SMALL_TINY = (16, 8, 8, 8)


def told(shapes: Shapes, file: str, dtype: str = "BF16") -> CheckpointInfo:
    headers = {name: TensorHeader(shape, dtype) for name, shape in shapes.items()}
    return detect(Checkpoint(Path("models/vae") / file, headers))


def small_tiny(release: str = "taew2_1", encoder_width: int = 8) -> TinyVae:
    return fill(TinyVae(TinyConfig(release, SMALL_TINY, encoder_width)))


def saved(path: Path, vae: torch.nn.Module, prefix: str = "") -> Path:
    save_file({prefix + name: tensor for name, tensor in vae.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("name", WAN_VAES)
def test_a_published_wan_vae_is_told_and_placed_strictly(name):
    rate, count = WAN_VAES[name]
    shapes = wan_vae(rate)

    info = told(shapes, "renamed.safetensors")
    with torch.device("meta"):
        vae = WanVae(VaeConfig.from_shapes(shapes, name))

    assert (info.kind, info.family, info.release, info.layout) == (
        *("vae", "wan2.1", name, "official"),
    )
    assert len(shapes) == count
    assert {k: tuple(v.shape) for k, v in vae.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("file", "release"),
    [
        ("taew2_1.pth", "taew2_1"),
        ("TAEW2_1_fp16.safetensors", "taew2_1"),
        ("taewan2.1.safetensors", "taew2_1"),
        ("lighttaew2_1.pth", "lighttaew2_1"),
        ("wan_lighttae_w2_1.safetensors", "lighttaew2_1"),
    ],
)
def test_a_published_tiny_vae_is_told_by_its_name_and_placed_strictly(file, release):
    shapes = tiny_vae()

    info = told(shapes, file, "F16")
    config = TinyConfig.from_shapes(shapes, file)
    with torch.device("meta"):
        vae = TinyVae(config)

    assert (info.kind, info.family, info.release, info.layout, info.scheme) == (
        *("vae", "wan2.1", release, "taehv", "fp16"),
    )
    assert config == TinyConfig(release)
    assert config.is_normalised == (release == "taew2_1")
    assert len(shapes) == TINY_TENSORS
    assert {k: tuple(v.shape) for k, v in vae.state_dict().items()} == shapes
    assert "load it with the VAE loader" in info.refusal


@pytest.mark.parametrize(
    ("shapes", "file", "family", "words"),
    [
        (tiny_vae(48, 2), "taew2_2.safetensors", "wan2.2", "only for the 5B model"),
        (tiny_vae(32, 2), "lighttaehy1_5.pth", "unknown", "has 32 latent channels|with 32 latent"),
        (tiny_vae(), "taehv.safetensors", "unknown", "a tiny VAE for HunyuanVideo"),
        (tiny_vae(), "taecvx.pth", "unknown", "a tiny VAE for CogVideoX"),
        (tiny_vae(), "preview.safetensors", "unknown", "Put the right one of these words back"),
        ({"decoder.22.bias": (3,)}, "taew2_1.pth", "unknown", "not a whole tiny VAE"),
    ],
)
def test_a_tiny_vae_that_cannot_be_used_is_named_with_the_reason(shapes, file, family, words):
    info = told(shapes, file)

    with pytest.raises(CheckpointError, match=words):
        TinyConfig.from_shapes(shapes, file)

    assert (info.kind, info.family) == ("vae", family)
    assert info.release in ("unknown", Path(file).stem), "a published name may say which it is"
    assert info.refusal.startswith(f"{file} is not a Wan transformer but a vae file: {file}")


def test_half_a_tiny_vae_names_what_it_lacks():
    shapes = {k: v for k, v in tiny_vae().items() if not k.startswith("decoder.14")}

    with pytest.raises(CheckpointError, match=r"not a whole tiny VAE .* lacks decoder\.14\.weight"):
        TinyConfig.from_shapes(shapes, "taew2_1.pth")


@pytest.mark.parametrize("shape", [(), (2**60, 0, 3, 3)])
@pytest.mark.parametrize("kind", ["wan", "tiny"])
def test_a_header_with_impossible_sizes_is_a_sentence(tmp_path, shape, kind):
    whole = wan_vae(0.75) if kind == "wan" else tiny_vae()
    for name in ("decoder.head.0.gamma", "conv2.weight", "decoder.8.weight", "encoder.0.weight"):
        if name not in whole:
            continue
        tensors = {k: torch.empty(v, device="meta") for k, v in whole.items()}
        tensors[name] = torch.empty(shape, device="meta")
        headers = {k: TensorHeader(tuple(v.shape), "F32") for k, v in tensors.items()}
        checkpoint = Checkpoint(tmp_path / "taew2_1.pth", headers, pickled=tensors)

        assert detect(checkpoint).kind == "vae"
        with pytest.raises(CheckpointError, match=rf"lacks {re.escape(name)}"):
            load_vae(checkpoint)


def test_the_vae_of_the_5b_model_is_told_apart():
    shapes = wan_vae() | {"conv2.weight": (48, 48, 1, 1, 1), "conv2.bias": (48,)}

    info = told(shapes, "wan2.2_vae.safetensors")

    assert (info.kind, info.family) == ("vae", "wan2.2")
    assert "only for the 5B model" in info.refusal


def test_one_tensor_more_in_a_tiny_vae_is_named(tmp_path):
    vae = small_tiny()
    tensors = vae.state_dict() | {"decoder.23.weight": torch.zeros(3)}
    save_file(tensors, tmp_path / "taew2_1.safetensors")

    with pytest.raises(CheckpointError, match=r"holds 1 tensors that no tiny VAE \(TAEHV\) has"):
        load_vae(tmp_path / "taew2_1.safetensors")


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("kind", ["wan", "tiny"])
def test_a_prefix_in_front_of_every_name_is_no_matter(tmp_path, prefix, kind):
    source = fill(WanVae(VaeConfig(4, 4))) if kind == "wan" else small_tiny()
    path = saved(tmp_path / "taew2_1.safetensors", source, prefix)

    loaded = load_vae(path)

    assert type(loaded) is type(source)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_what_lies_beside_a_prefixed_vae_is_left_out(tmp_path):
    source = fill(WanVae(VaeConfig(4, 4)))
    tensors = {f"vae.{name}": tensor for name, tensor in source.state_dict().items()}
    save_file(tensors | {"text.bias": torch.zeros(2)}, tmp_path / "all.safetensors")

    loaded = load_vae(tmp_path / "all.safetensors")

    assert all(torch.equal(v, source.state_dict()[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("widths", [(24, 24), (4, 8)], ids=["lightvaew2_1", "uneven"])
@pytest.mark.parametrize("form", ["official", "diffusers", "pth"])
def test_widths_of_a_narrow_vae_are_found_in_every_naming(tmp_path, widths, form):
    source = fill(WanVae(VaeConfig(*widths)))
    tensors = source.state_dict()
    path = tmp_path / ("narrow.pth" if form == "pth" else "narrow.safetensors")
    if form == "pth":
        torch.save(tensors, path)
    else:
        rename = vae_to_diffusers if form == "diffusers" else str
        save_file({rename(name): tensor for name, tensor in tensors.items()}, path)

    loaded = load_vae(path)

    assert loaded.config == VaeConfig(*widths)
    assert all(torch.equal(v, tensors[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_tiny_vae_loads_from_both_containers_in_the_dtype_asked_for(tmp_path, suffix):
    source = small_tiny("lighttaew2_1").to(torch.float16)
    path = tmp_path / f"lighttaew2_1{suffix}"
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        saved(path, source)

    loaded = load_vae(path, torch.bfloat16)

    assert loaded.config == source.config
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}


def test_a_tiny_vae_without_encoder_is_whole(tmp_path):
    path = saved(tmp_path / "taew2_1.safetensors", small_tiny(encoder_width=0))

    loaded = load_vae(path)

    assert loaded.encoder is None
