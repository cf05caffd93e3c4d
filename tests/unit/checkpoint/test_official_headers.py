"""Every official transformer, by a reconstructed header: detected, counted, strictly placed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightx2v_core.assemble import swap_linears
from lightx2v_core.checkpoint.detect import detect
from lightx2v_core.checkpoint.headers import TensorHeader
from lightx2v_core.checkpoint.layouts import official_names, to_diffusers
from lightx2v_core.checkpoint.load import assign
from lightx2v_core.checkpoint.quantised import CODE_DTYPES, read_codes
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
        ("something_else.safetensors", "unknown"),
    ],
)
def test_a_release_comes_from_the_published_name(file, release):
    info = detect(as_checkpoint("wan2.1_i2v_14b", file=f"models/{file}"))

    assert info.release == release
    assert info.preset == ("distill-4step" if release != "unknown" else None)


def quantise_header(checkpoint: Checkpoint, dtype: str, scales: dict[str, tuple]) -> int:
    """Turns the block linears of a header into codes with scales; returns how many there are."""
    linears = [
        key
        for key, header in checkpoint.headers.items()
        if key.startswith("blocks.") and key.endswith("weight") and len(header.shape) == 2
    ]
    for key in linears:
        rows, stem = checkpoint.headers[key].shape[0], key.removesuffix("weight")
        checkpoint.headers[key] = TensorHeader(checkpoint.headers[key].shape, dtype)
        for leaf, shape in scales.items():
            shape = tuple(rows if size == "rows" else size for size in shape)
            checkpoint.headers[stem + leaf] = TensorHeader(shape, "F32")
    return len(linears)


# scheme: (dtype of the codes, scales of each linear, other tensors of the file)
QUANTISED = {
    "fp8-row": ("F8_E4M3", {"weight_scale": ("rows", 1)}, {}),
    "fp8-tensor": ("F8_E4M3", {"scale_weight": (), "scale_input": ()}, {"scaled_fp8": (2,)}),
    "fp8-cast": ("F8_E4M3", {}, {}),
    "fp8-e5m2": ("F8_E5M2", {}, {}),
    "int8-row": ("I8", {"weight_scale": ("rows", 1)}, {}),
}


@pytest.mark.parametrize("scheme", QUANTISED)
@pytest.mark.parametrize(("name", "linears"), [("wan2.1_t2v_14b", 400), ("wan2.1_i2v_14b", 480)])
def test_a_quantised_header_is_told_and_fills_its_model_strictly(name, linears, scheme):
    dtype, scales, others = QUANTISED[scheme]
    checkpoint = as_checkpoint(name)
    count = quantise_header(checkpoint, dtype, scales)
    checkpoint.headers.update({k: TensorHeader(v, "F8_E4M3") for k, v in others.items()})
    info = detect(checkpoint)
    _, names = official_names(checkpoint.headers)
    kept, codes, _ = read_codes(names, checkpoint.headers, name, {}, read=None)
    with torch.device("meta"):
        model = WanModel(info.config)
        tensors = {k: empty(checkpoint.headers[v]) for k, v in kept.items()}

    swap_linears(model, codes, name)
    assign(model, tensors, name, "Wan transformer", torch.bfloat16, codes)

    assert (info.scheme, info.refusal) == (scheme, None)
    assert count == linears == len(codes)
    assert model.blocks[3].ffn[0].weight.dtype == CODE_DTYPES[dtype]


def empty(header: TensorHeader) -> torch.Tensor:
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8, **CODE_DTYPES}
    return torch.empty(header.shape, dtype=dtypes[header.dtype])


@pytest.mark.parametrize(("name", "linears"), [("wan2.1_t2v_14b", 400), ("wan2.1_i2v_14b", 480)])
def test_an_nvfp4_header_of_lightx2v_is_told_and_fills_its_model_strictly(name, linears):
    """As its converter and kernel write it: two codes a byte, scales in tiles of 128 x 4."""
    checkpoint = as_checkpoint(name)
    headers = checkpoint.headers
    quantise_header(checkpoint, "U8", {"alpha": (), "input_global_scale": ()})
    for key in [k for k, h in headers.items() if h.dtype == "U8"]:
        rows, columns = headers[key].shape
        headers[key] = TensorHeader((rows, columns // 2), "U8")
        headers[key + "_scale"] = TensorHeader((rows, columns // 16), "F8_E4M3")
    info = detect(checkpoint)
    _, names = official_names(headers)
    stored = read_codes(names, headers, name, {}, read=lambda _: torch.tensor(2.0))
    with torch.device("meta"):
        model = WanModel(info.config)
        tensors = {k: empty(headers[v]) for k, v in stored.names.items()}

    swap_linears(model, stored.codes, name)
    assign(model, tensors | stored.made, name, "Wan transformer", torch.bfloat16, stored.codes)

    assert (info.scheme, info.refusal) == ("nvfp4", None)
    assert len(stored.codes) == linears
    assert float(model.blocks[3].ffn[0].weight_scale_2) == 4.0, "alpha times the scale of the input"


@pytest.mark.parametrize(
    ("codes", "scale", "scheme"),
    [
        ("U8", TensorHeader((5120, 160), "F8_E8M0"), "mxfp4 or mxfp6"),
        ("U8", TensorHeader((5120, 1), "F32"), "4-bit codes"),
        ("F8_E4M3", TensorHeader((40, 40), "F32"), "fp8-block"),
    ],
)
def test_formats_that_are_not_read_are_named(codes, scale, scheme):
    checkpoint = as_checkpoint("wan2.1_t2v_14b")
    quantise_header(checkpoint, codes, {})
    linears = [key for key, header in checkpoint.headers.items() if header.dtype == codes]
    checkpoint.headers.update({key + "_scale": scale for key in linears})

    info = detect(checkpoint)

    assert info.scheme == scheme
    assert f"quantised as {scheme}, which this version does not load" in info.refusal


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
