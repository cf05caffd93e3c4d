"""Small fp8 and int8 files, written by the formulas their authors publish, through the loader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightx2v_core.assemble import load_transformer
from lightx2v_core.errors import CheckpointError
from lightx2v_core.lora.branches import Branch, set_lora
from lightx2v_core.memory.residency import Residency
from lightx2v_core.wan.model import WanModel
from tests.conftest import relative_error, tiny_inputs, tiny_model

WEIGHTS = tiny_model("i2v").state_dict()
LIMITS = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
LINEARS = [k for k, v in WEIGHTS.items() if k.startswith("blocks.") and v.ndim == 2]


def codes_of(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    limit = LIMITS[dtype]
    divided = (weight / scale).clamp(-limit, limit)
    return divided.round().to(torch.int8) if dtype == torch.int8 else divided.to(dtype)


def by_row(dtype: torch.dtype) -> dict[str, Tensor]:
    """LightX2V's converter: amax over the input axis, `.weight_scale` of shape [out, 1]."""
    tensors = dict(WEIGHTS)
    for key in LINEARS:
        scale = WEIGHTS[key].abs().amax(dim=1, keepdim=True).clamp_min(1e-5) / LIMITS[dtype]
        tensors[key] = codes_of(WEIGHTS[key], scale, dtype)
        tensors[key + "_scale"] = scale
    return tensors


def by_tensor(scale_name: str) -> dict[str, Tensor]:
    """ComfyUI: one scale for each tensor."""
    tensors = dict(WEIGHTS)
    for key in LINEARS:
        scale = WEIGHTS[key].abs().amax() / 448.0
        tensors[key] = codes_of(WEIGHTS[key], scale, torch.float8_e4m3fn)
        tensors[key.removesuffix("weight") + scale_name] = scale
    return tensors


def described() -> dict[str, Tensor]:
    """ComfyUI's newer form: a JSON description beside each layer."""
    text = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode()
    description = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    stems = {key.removesuffix(".weight") for key in LINEARS}
    return by_tensor("weight_scale") | {f"{s}.comfy_quant": description.clone() for s in stems}


def old_comfy() -> dict[str, Tensor]:
    stems = {key.removesuffix(".weight") for key in LINEARS}
    inputs = {f"{stem}.scale_input": torch.tensor(1.0) for stem in stems}
    marker = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    tensors = by_tensor("scale_weight") | inputs | marker
    return {f"model.diffusion_model.{key}": value for key, value in tensors.items()}


def cast_only(dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if k in LINEARS else v for k, v in WEIGHTS.items()}


FORMS = {
    "fp8-row": by_row(torch.float8_e4m3fn),
    "int8-row": by_row(torch.int8),
    "fp8-tensor, old names": old_comfy(),
    "fp8-tensor, described": described(),
    "fp8-cast": cast_only(torch.float8_e4m3fn),
    "fp8-e5m2": cast_only(torch.float8_e5m2),
}
# Of the forward against its float32 source: rounding to 3, 2 and 7 bits of mantissa or grid.
ERRORS = {"fp8-e5m2": 0.12, "int8-row": 0.02}


def written(folder: Path, tensors: dict[str, Tensor], metadata: dict | None = None) -> Path:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "q.safetensors", metadata)
    return folder / "q.safetensors"


def dequantised(tensors: dict[str, Tensor]) -> WanModel:
    """A plain model whose weights are codes * scale, by the formula."""
    plain = {k.removeprefix("model.diffusion_model."): v for k, v in tensors.items()}
    model = tiny_model("i2v")
    state = model.state_dict()
    for key in LINEARS:
        stem = key.removesuffix("weight")
        scale = plain.get(stem + "weight_scale", plain.get(stem + "scale_weight"))
        state[key] = plain[key].float() * (1.0 if scale is None else scale)
    model.load_state_dict(state)
    return model


@torch.inference_mode()
def run(model: WanModel) -> Tensor:
    return model(**tiny_inputs(model.config, batch=1))


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_file_equals_its_dequantised_weights_bit_for_bit(tmp_path, form):
    loaded = load_transformer(written(tmp_path, FORMS[form]))

    output = run(loaded.model)

    assert loaded.info.scheme == form.partition(",")[0]
    assert torch.equal(output, run(dequantised(FORMS[form])))
    error = relative_error(output, run(tiny_model("i2v")))
    assert 1e-4 < error < ERRORS.get(loaded.info.scheme, 0.06), f"{error:.3f}"


@pytest.mark.parametrize("form", FORMS)
def test_the_codes_stay_codes_in_memory(tmp_path, form):
    loaded = load_transformer(written(tmp_path, FORMS[form]), dtype=torch.bfloat16)

    weights = [loaded.model.state_dict()[key] for key in LINEARS]

    assert {w.element_size() for w in weights} == {1}
    assert loaded.residency.total_bytes < 0.5 * sum(v.nbytes for v in WEIGHTS.values())


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_on_a_quantised_base_adds_what_it_adds_to_the_dequantised_one(tmp_path, form):
    generator = torch.Generator().manual_seed(4)
    down, up = torch.randn(8, 256, generator=generator), torch.randn(512, 8, generator=generator)
    branches = {"blocks.1.ffn.0": (Branch(down * 0.1, up * 0.1, 0.7),)}
    quantised, plain = (
        load_transformer(written(tmp_path, FORMS[form])).model,
        dequantised(FORMS[form]),
    )
    before = run(quantised)

    set_lora(quantised, branches)
    set_lora(plain, branches)

    assert torch.equal(run(quantised), run(plain))
    assert relative_error(run(quantised), before) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_streaming_a_quantised_model_equals_resident_bit_for_bit(tmp_path, form):
    model = load_transformer(written(tmp_path, FORMS[form])).model
    resident = run(model)

    engine = Residency(model)
    model.run_block = engine.run_block
    engine.place("cpu", 0)

    assert engine.resident == 0
    assert torch.equal(run(model), resident)


def damaged(change: str) -> dict[str, Tensor]:
    tensors, first = dict(FORMS["fp8-row"]), LINEARS[0]
    scale = first + "_scale"
    if change == "missing":
        del tensors[scale]
    elif change == "doubled":
        tensors[first.removesuffix("weight") + "scale_weight"] = torch.tensor(1.0)
    elif change == "block":
        tensors[scale] = torch.ones(2, 2)
    elif change == "stray":
        tensors["text_embedding.0.weight_scale"] = torch.ones(())
    elif change == "int8 bare":
        return {k: v.to(torch.int8) if k in LINEARS else v for k, v in WEIGHTS.items()}
    elif change == "described otherwise":
        text = bytearray(b'{"format": "mxfp8"}')
        name = first.removesuffix("weight") + "comfy_quant"
        tensors[name] = torch.frombuffer(text, dtype=torch.uint8).clone()
    elif change == "convolution":
        tensors["patch_embedding.weight"] = WEIGHTS["patch_embedding.weight"].to(
            torch.float8_e4m3fn
        )
        tensors["patch_embedding.weight_scale"] = torch.ones(())
    return tensors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", r"lacks the scale of 1 of \d+ quantised linears"),
        ("doubled", "holds two scales for blocks.0"),
        ("block", r"the scale of blocks\.0.* is \(2, 2\) for \d+ rows"),
        ("stray", r"1 scales of weights that are not quantised \(text_embedding\.0"),
        ("int8 bare", "int8-tensor|int8 weights without scales"),
        ("described otherwise", "quantised as mxfp8, which this version does not read"),
        ("convolution", "patch_embedding is quantised and is no linear"),
    ],
)
def test_a_damaged_or_unknown_form_is_refused_in_words(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words):
        load_transformer(written(tmp_path, damaged(change)))


def test_formats_named_in_the_metadata_are_checked(tmp_path):
    layers = {"layers": {"blocks.0.ffn.0": {"format": "nvfp4"}}}
    path = written(tmp_path, WEIGHTS, {"_quantization_metadata": json.dumps(layers)})

    with pytest.raises(CheckpointError, match="quantised as nvfp4"):
        load_transformer(path)
