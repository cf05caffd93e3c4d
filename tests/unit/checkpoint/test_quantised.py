"""Small quantised files, written by the formulas their authors publish, through the loader."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightx2v_core.assemble import load_transformer
from lightx2v_core.errors import CheckpointError
from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.branches import Branch, set_lora
from lightx2v_core.lora.read import read_lora
from lightx2v_core.memory.residency import Residency
from lightx2v_core.wan.model import WanModel
from tests.conftest import relative_error, tiny_inputs, tiny_model
from tests.unit.checkpoint.block_forms import as_file, leaves_of, meant

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


def by_tensor(scale_name: str, dtype: torch.dtype = torch.float8_e4m3fn) -> dict[str, Tensor]:
    """ComfyUI: one scale for each tensor."""
    tensors = dict(WEIGHTS)
    for key in LINEARS:
        scale = WEIGHTS[key].abs().amax() / LIMITS[dtype]
        tensors[key] = codes_of(WEIGHTS[key], scale, dtype)
        tensors[key.removesuffix("weight") + scale_name] = scale
    return tensors


def described(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """ComfyUI's newer form: a JSON description beside each layer."""
    text = json.dumps({"format": name, "full_precision_matrix_mult": True}).encode()
    description = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    stems = {key.removesuffix(".weight") for key in LINEARS}
    return tensors | {f"{s}.comfy_quant": description.clone() for s in stems}


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
    "fp8-tensor, described": described(by_tensor("weight_scale"), "float8_e4m3fn"),
    "fp8-row, described": described(by_row(torch.float8_e4m3fn), "float8_e4m3fn_rowwise"),
    "int8-tensor, described": described(by_tensor("weight_scale", torch.int8), "int8_tensorwise"),
    "int8-row, described": described(by_row(torch.int8), "int8_tensorwise"),
    "fp8-cast": cast_only(torch.float8_e4m3fn),
    "fp8-e5m2": cast_only(torch.float8_e5m2),
    "nvfp4, LightX2V": as_file(WEIGHTS, LINEARS, "lightx2v"),
    "nvfp4, LightX2V before calibration": as_file(WEIGHTS, LINEARS, "export"),
    "nvfp4, ComfyUI": as_file(WEIGHTS, LINEARS, "comfy"),
    "mxfp8, ComfyUI": as_file(WEIGHTS, LINEARS, "mxfp8"),
}
# One for each way of keeping a linear in memory.
ONE_OF_EACH = ["fp8-row", "fp8-tensor, old names", "fp8-cast", "nvfp4, ComfyUI", "mxfp8, ComfyUI"]
# Of the forward against its float32 source: rounding to 3, 2, 7 and 1 bits of mantissa or grid.
ERRORS = {"fp8-e5m2": 0.12, "int8-row": 0.02, "int8-tensor": 0.02, "nvfp4": 0.2}


def written(folder: Path, tensors: dict[str, Tensor], metadata: dict | None = None) -> Path:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "q.safetensors", metadata)
    return folder / "q.safetensors"


def dequantised(tensors: dict[str, Tensor]) -> WanModel:
    """A plain model whose weights are what the codes stand for, by the formula."""
    plain = {k.removeprefix("model.diffusion_model."): v for k, v in tensors.items()}
    model = tiny_model("i2v")
    state = model.state_dict()
    for key in LINEARS:
        stem = key.removesuffix("weight")
        scale = plain.get(stem + "weight_scale", plain.get(stem + "scale_weight"))
        if scale is not None and scale.element_size() == 1:
            state[key] = meant(leaves_of(plain, key))
            continue
        state[key] = plain[key].float() * (1.0 if scale is None else scale)
    model.load_state_dict(state)
    return model


@cache
def of_source() -> Tensor:
    return run(tiny_model("i2v"))


@torch.inference_mode()
def run(model: WanModel) -> Tensor:
    return model(**tiny_inputs(model.config, batch=1))


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_file_equals_its_dequantised_weights_bit_for_bit(tmp_path, form):
    loaded = load_transformer(written(tmp_path, FORMS[form]))

    output = run(loaded.model)

    assert loaded.info.scheme == form.partition(",")[0]
    assert torch.equal(output, run(dequantised(FORMS[form])))
    error = relative_error(output, of_source())
    assert 1e-4 < error < ERRORS.get(loaded.info.scheme, 0.06), f"{error:.3f}"


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_the_codes_stay_codes_in_memory(tmp_path, form):
    loaded = load_transformer(written(tmp_path, FORMS[form]), dtype=torch.bfloat16)

    weights = [loaded.model.state_dict()[key] for key in LINEARS]

    assert {w.element_size() for w in weights} == {1}
    assert loaded.residency.total_bytes < 0.5 * sum(v.nbytes for v in WEIGHTS.values())


@pytest.mark.parametrize("form", ONE_OF_EACH)
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


def test_a_lora_file_fits_weights_that_are_packed(tmp_path):
    form = "nvfp4, LightX2V"
    layer, generator = "diffusion_model.blocks.1.ffn.0", torch.Generator().manual_seed(4)
    tensors = {
        f"{layer}.lora_up.weight": torch.randn(512, 4, generator=generator),
        f"{layer}.lora_down.weight": torch.randn(4, 256, generator=generator),
        "diffusion_model.blocks.0.ffn.2.diff": torch.full((256, 512), 0.01),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    packed, plain = load_transformer(written(tmp_path, FORMS[form])).model, dequantised(FORMS[form])

    for model in (packed, plain):
        (report,) = apply_loras(model, [(read_lora(tmp_path / "lora.safetensors"), 0.5)])
        assert report.matched == 2

    assert torch.equal(run(packed), run(plain))


@pytest.mark.parametrize("form", ONE_OF_EACH)
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
        text = bytearray(b'{"format": "int8_blockwise"}')
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
        ("described otherwise", "quantised as int8_blockwise, which this version does not read"),
        ("convolution", "patch_embedding is quantised and is no linear"),
    ],
)
def test_a_damaged_or_unknown_form_is_refused_in_words(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words):
        load_transformer(written(tmp_path, damaged(change)))


def in_metadata(tensors: dict[str, Tensor], changes: dict | None = None) -> dict[str, str]:
    """ComfyUI's other place for descriptions: the header of the file."""
    formats = {
        k.removesuffix(".comfy_quant"): json.loads(bytes(v.tolist()))
        for k, v in tensors.items()
        if k.endswith("comfy_quant")
    }
    return {"_quantization_metadata": json.dumps({"layers": formats | (changes or {})})}


@pytest.mark.parametrize("form", [form for form in FORMS if "ComfyUI" in form])
def test_formats_in_the_metadata_are_read_as_those_beside_the_layers(tmp_path, form):
    tensors, prefix = FORMS[form], "model.diffusion_model."
    bare = {prefix + k: v for k, v in tensors.items() if not k.endswith("comfy_quant")}
    formats = in_metadata({prefix + k: v for k, v in tensors.items()})

    loaded = load_transformer(written(tmp_path, bare, formats))

    assert loaded.info.scheme == form.partition(",")[0]
    assert torch.equal(run(loaded.model), run(dequantised(tensors)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blocks.0.ffn.0": {"format": "convrot_w4a4"}}, "quantised as convrot_w4a4, which"),
        ({"blocks.0.ffn.0": {"format": "mxfp8"}}, r"describes blocks\.0\.ffn\.0 as .* and as "),
        ({"blocks.9.ffn.0": {"format": "nvfp4"}}, r"describes blocks\.9\.ffn\.0, which the file"),
        ({"head.head": {"format": "nvfp4"}}, r"head\.head as nvfp4 and stores F32 codes with no"),
    ],
)
def test_metadata_that_contradicts_the_file_is_refused(tmp_path, changes, words):
    tensors = FORMS["nvfp4, ComfyUI"]

    with pytest.raises(CheckpointError, match=words):
        load_transformer(written(tmp_path, tensors, in_metadata(tensors, changes)))


def test_a_mixture_of_formats_is_loaded_layer_by_layer(tmp_path):
    first = "blocks.0."
    plain = {k: v for k, v in WEIGHTS.items() if k.startswith(first)}
    fp8 = {k: v for k, v in FORMS["fp8-tensor, described"].items() if k.startswith("blocks.1.self")}
    nvfp4 = FORMS["nvfp4, ComfyUI"]
    others = {k: v for k, v in nvfp4.items() if not k.startswith((first, "blocks.1.self"))}
    mixture = plain | fp8 | others

    loaded = load_transformer(written(tmp_path, mixture))

    state = loaded.model.state_dict()
    kinds = [state[f"blocks.{n}.weight"].dtype for n in ("0.ffn.0", "1.self_attn.q", "1.ffn.0")]
    assert kinds == [torch.float32, torch.float8_e4m3fn, torch.uint8]
    assert torch.equal(run(loaded.model), run(dequantised(mixture)))


Change = Callable[[dict[str, Tensor], str], object]


def with_nan(tensors: dict[str, Tensor], stem: str) -> None:
    scale = tensors[stem + "weight_scale"]
    stored = scale.view(torch.uint8).clone()
    stored[3, 1] = 0xFF
    tensors[stem + "weight_scale"] = stored.view(scale.dtype)


def cut(leaf: str, columns: int) -> Change:
    return lambda t, stem: t.update({stem + leaf: t[stem + leaf][:, :columns]})


def put(leaf: str, value: Tensor) -> Change:
    return lambda t, stem: t.update({stem + leaf: value})


def remove(leaf: str) -> Change:
    return lambda t, stem: t.pop(stem + leaf)


def as_bytes(tensors: dict[str, Tensor], stem: str) -> None:
    tensors[stem + "weight_scale"] = tensors[stem + "weight_scale"].view(torch.uint8)


# What is done to one linear of a file of the form, and the words of its refusal.
BROKEN: list[tuple[str, Change, str]] = [
    ("nvfp4, ComfyUI", remove("weight_scale"), r"scales of .* are missing; .* needs \(256, 16\)"),
    ("mxfp8, ComfyUI", remove("weight_scale"), r"scales of .* are missing; .* needs \(256, 8\)"),
    ("nvfp4, ComfyUI", cut("weight_scale", 15), r"are \(256, 15\); a weight of 256x256 needs"),
    ("nvfp4, ComfyUI", with_nan, r"scales of 1 linears hold NaN or infinity \(blocks\.0"),
    ("mxfp8, ComfyUI", with_nan, r"scales of 1 linears hold NaN or infinity \(blocks\.0"),
    ("nvfp4, ComfyUI", remove("weight_scale_2"), r"has 0 scales for the tensor \(none\)"),
    ("nvfp4, ComfyUI", put("alpha", torch.ones(())), r"has 2 scales .* \(weight_scale_2, alpha\)"),
    ("nvfp4, ComfyUI", put("weight_scale_2", torch.tensor(float("inf"))), "NaN or infinity"),
    ("nvfp4, ComfyUI", put("weight_scale_2", torch.ones(4)), r"is F32 of shape \(4,\); one"),
    ("nvfp4, ComfyUI", remove("comfy_quant"), "so the order of its values is not known"),
    ("nvfp4, ComfyUI", cut("weight", 127), r"\(256, 127\), which is not whole blocks of 16 values"),
    ("nvfp4, LightX2V", remove("input_global_scale"), "has alpha and no input_global_scale"),
    ("nvfp4, LightX2V", as_bytes, "is stored as mxfp4 or mxfp6, which this version does not"),
]


@pytest.mark.parametrize(
    ("form", "change", "words"),
    BROKEN,
    ids=lambda value: getattr(value, "__qualname__", str(value))[:30],
)
def test_broken_blocks_are_refused_in_words(tmp_path, form, change, words):
    tensors = dict(FORMS[form])
    change(tensors, LINEARS[0].removesuffix("weight"))

    with pytest.raises(CheckpointError, match=words):
        load_transformer(written(tmp_path, tensors))


def test_a_width_of_another_model_is_refused(tmp_path):
    tensors, stem = dict(FORMS["nvfp4, ComfyUI"]), LINEARS[0].removesuffix("weight")
    cut("weight", 64)(tensors, stem)
    cut("weight_scale", 8)(tensors, stem)

    with pytest.raises(CheckpointError, match=r"has shape \(256, 64\), .* need \(256, 128\)"):
        load_transformer(written(tmp_path, tensors))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(tmp_path, value):
    tensors = dict(FORMS["fp8-row"])
    scale = tensors[LINEARS[0] + "_scale"].clone()
    scale[5] = value

    with pytest.raises(CheckpointError, match="scales of 1 linears hold NaN or infinity"):
        load_transformer(written(tmp_path, tensors | {LINEARS[0] + "_scale": scale}))


def test_integers_as_scales_are_refused(tmp_path):
    tensors = dict(FORMS["fp8-row"])
    tensors[LINEARS[0] + "_scale"] = torch.ones(256, 1, dtype=torch.int32)

    with pytest.raises(CheckpointError, match="is stored as I32; this version reads F32, F16"):
        load_transformer(written(tmp_path, tensors))
