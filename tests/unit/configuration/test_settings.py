"""Configurations and model folders into settings, on the demo model in LightX2V's layouts."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightx2v_core.checkpoint.convert import quantise_file
from lightx2v_core.configuration.read import make_configuration
from lightx2v_core.configuration.running import open_pipeline
from lightx2v_core.configuration.settings import (
    ConfiguredLora,
    Settings,
    check_processes,
    settings_for,
)
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.errors import CapabilityError, CheckpointError, RequestError
from lightx2v_core.presets import PRESETS
from tests.layouts import SMALL, add_encoders, arrange, link, plain_demo

PRESET = PRESETS["demo-4step"]


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8") / "demo_fp8.safetensors"
    quantise_file(plain_demo("t2v"), path, "fp8")
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A model folder with everything but a transformer."""
    add_encoders(tmp_path / "Wan2.1-T2V-14B")
    return tmp_path / "Wan2.1-T2V-14B"


def settings(
    home: Path | str, model_cls: str = "wan2.1_distill", task: str = "t2v", **values: object
) -> Settings:
    given = {k: v for k, v in (SMALL | values).items() if v is not None}
    return settings_for(model_cls, task, home, make_configuration(given, "c.json"))


def write_lora(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(5)
    name = "diffusion_model.blocks.0.self_attn.q"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 256, generator=generator),
        f"{name}.lora_up.weight": torch.randn(256, 4, generator=generator),
    }
    save_file(tensors, path)
    return path


def split_blocks(source: Path, folder: Path) -> None:
    """LightX2V's block-split folder."""
    folder.mkdir(parents=True)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(source).items():
        block = f"block_{name.split('.')[1]}" if name.startswith("blocks.") else "non_block"
        groups.setdefault(block, {})[name] = tensor
    for name, tensors in groups.items():
        save_file(tensors, folder / f"{name}.safetensors")


def test_the_documented_values_become_the_plan(home):
    link(plain_demo("t2v"), home / "distill_models/distill_model.safetensors")

    made = settings(home)

    assert made.overrides.denoising_list == (1000, 750, 500, 250)
    assert (made.overrides.shift, made.overrides.cfg, made.overrides.steps) == (5.0, 1.0, None)
    assert made.sizes.video(PRESET) == VideoSize(64, 64, 5)
    assert (made.attention, made.quantisation, made.vram_bytes) == ("auto", "keep", None)
    assert made.parts.tokenizer == home / "google/umt5-xxl"
    assert made.notes == ()
    assert pickle.loads(pickle.dumps(made)) == made, "it crosses to a worker as plain data"


@pytest.mark.parametrize(
    ("at", "changes"),
    [
        ("distill_models/distill_model.safetensors", {}),
        ("distill_models/wan2.1_t2v_14b_lightx2v_4step.safetensors", {}),
        ("wan2.1_t2v_14b_lightx2v_4step.safetensors", {}),
        ("original/diffusion_pytorch_model.safetensors", {}),
        ("elsewhere/any.safetensors", {"dit_original_ckpt": "elsewhere/any.safetensors"}),
        ("elsewhere/any.safetensors", {"dit_original_ckpt": "elsewhere"}),
        ("elsewhere/any.safetensors", {"dit_distill_ckpt": "elsewhere"}),
    ],
)
def test_a_transformer_is_found_in_each_documented_place(home, at, changes):
    link(plain_demo("t2v"), home / at)

    found = settings(home, **changes).parts.transformer

    assert found.resolve() == plain_demo("t2v").resolve()


def test_an_old_pickle_is_found(home):
    torch.save(load_file(plain_demo("t2v")), home / "distill_model.pt")

    assert settings(home).parts.transformer == home / "distill_model.pt"


def test_distilled_weights_come_before_the_base_beside_them(home, fp8):
    link(plain_demo("t2v"), home / "distill_models/distill_model.safetensors")
    base = link(fp8, home / "diffusion_pytorch_model.safetensors")

    assert settings(home).parts.transformer.parent.name == "distill_models"
    lora = str(write_lora(home / "loras/distill.safetensors"))
    with_lora = settings(home, lora_configs=[{"path": lora}])
    assert with_lora.parts.transformer == base, "a LoRA is for the base"


@pytest.mark.parametrize(
    ("folder", "model_cls", "changes"),
    [
        ("distill_fp8", "wan2.1_distill", {}),
        ("fp8", "wan2.1", {"scheduler_type": "WanStepDistillScheduler"}),
        (".", "wan2.1_distill", {}),
    ],
)
def test_quantised_weights_are_found_by_their_scheme(home, fp8, folder, model_cls, changes):
    link(fp8, home / folder / "model.safetensors")
    made = settings(home, model_cls, dit_quantized=True, dit_quant_scheme="fp8-sgl", **changes)

    assert made.parts.transformer.resolve() == fp8
    assert made.quantisation == "keep"


def test_a_block_split_folder_runs(home, fp8):
    split_blocks(fp8, home / "distill_fp8")
    made = settings(home, dit_quantized=True, dit_quant_scheme="fp8-vllm", lazy_load=True)

    pipeline, lines = open_pipeline(made, torch.device("cpu"))

    assert made.parts.transformer == home / "distill_fp8"
    assert len(pipeline.experts) == 1
    assert "fp8-row" in lines[0]


def test_of_several_models_the_configurations_format_decides(home, fp8):
    link(plain_demo("t2v"), home / "wan2.1_t2v_14b_lightx2v_4step.safetensors")
    link(fp8, home / "wan2.1_t2v_14b_scaled_fp8_e4m3_lightx2v_4step.safetensors")

    full = settings(home)
    quantised = settings(home, dit_quantized=True, dit_quant_scheme="fp8-q8f")

    assert "scaled_fp8" not in full.parts.transformer.name
    assert "scaled_fp8" in quantised.parts.transformer.name
    assert "taken out of 2 models" in quantised.notes[0]
    with pytest.raises(RequestError, match=r"holds 2 models \(.*name one with dit_quantized_ckpt"):
        settings(home, dit_quantized=True, dit_quant_scheme="int8-vllm")


def test_a_full_file_is_quantised_while_loading_only_where_that_is_asked(home):
    link(plain_demo("t2v"), home / "model.safetensors")
    quantised = {"dit_quantized": True, "dit_quant_scheme": "int8-torchao"}

    with pytest.raises(RequestError, match=r"is to be int8-torchao, and its file is fp16.*auto_qu"):
        settings(home, **quantised)

    assert settings(home, **quantised, weight_auto_quant=True).quantisation == "int8"


def test_a_quantised_file_that_nobody_announced_is_told(home, fp8):
    link(fp8, home / "model.safetensors")

    assert "no dit_quantized, and model.safetensors is fp8-row" in settings(home).notes[0]


def test_the_older_form_of_schemes_is_read(home, fp8):
    link(fp8, home / "distill_fp8/model.safetensors")
    kind = "W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Vllm"

    assert settings(home, mm_config={"mm_type": kind}).parts.transformer.resolve() == fp8


def test_two_experts_come_from_their_folders_or_keys(tmp_path):
    home = tmp_path / "Wan2.2-I2V-A14B"
    add_encoders(home)
    for expert in ("high", "low"):
        link(plain_demo("i2v"), home / f"{expert}_noise_model/{expert}.safetensors")
    named = {
        f"{e}_noise_original_ckpt": f"{e}_noise_model/{e}.safetensors" for e in ("high", "low")
    }
    moe = {"model_cls": "wan2.2_moe_distill", "task": "i2v", "use_image_encoder": False}

    found = settings(home, **moe, boundary_step_index=2)
    keys = settings(home, **moe, **named)

    assert found.parts == keys.parts
    assert found.parts.low == home / "low_noise_model/low.safetensors"
    assert (found.overrides.high_steps, keys.overrides.high_steps) == (2, None)


def test_loras_are_found_by_both_forms_and_go_to_the_expert_named(tmp_path):
    home = tmp_path / "Wan2.2-I2V-A14B"
    add_encoders(home)
    for expert in ("high", "low"):
        link(plain_demo("i2v"), home / f"{expert}_noise_model/{expert}.safetensors")
    write_lora(home / "loras/mine.safetensors")
    entries = [
        {"name": "high_noise_model", "path": "mine.safetensors", "strength": 0.5, "alpha": None},
        {"name": "low_noise_model", "path": "mine.safetensors"},
    ]
    moe = {"model_cls": "wan2.2_moe_distill", "task": "i2v", "use_image_encoder": False}

    made = settings(home, **moe, lora_configs=entries)
    old = settings(home, **moe, lora_path="mine.safetensors", strength_model=0.7)
    _, lines = open_pipeline(made, torch.device("cpu"))

    assert [(lora.strength, lora.expert) for lora in made.loras] == [(0.5, "high"), (1.0, "low")]
    assert [(lora.strength, lora.expert) for lora in old.loras] == [(0.7, None)]
    told = [line.split(":")[0] for line in lines if "mine.safetensors" in line and "noise" in line]
    assert told == ["high noise", "low noise"]
    with pytest.raises(RequestError, match=r"lora_configs\[0\].name middle is no expert"):
        settings(home, **moe, lora_configs=[{"name": "middle", "path": "mine.safetensors"}])


def test_a_lora_path_is_taken_from_beside_the_model_folder_too(home):
    link(plain_demo("t2v"), home / "model.safetensors")
    path = "Wan2.1-T2V-14B/loras/distill.safetensors"
    write_lora(home.parent / path)

    made = settings(home, lora_path=[path])

    assert made.loras == (ConfiguredLora(home.parent / path),)


def test_encoders_are_searched_in_lightx2vs_order(home):
    link(plain_demo("t2v"), home / "model.safetensors")
    (home / "fp8").mkdir()
    quantised = link(plain_demo("text"), home / "fp8/models_t5_umt5-xxl-enc-fp8.pth")
    light = link(plain_demo("vae"), home / "lightvaew2_1.pth")
    tiny = link(plain_demo("vae"), home / "lighttaew2_1.pth")

    made = settings(
        home,
        t5_quantized=True,
        t5_quant_scheme="fp8-sgl",
        use_lightvae=True,
        use_tae=True,
        need_scaled=False,
    )

    assert (made.parts.text, made.parts.vae, made.parts.tae) == (quantised, light, tiny)
    assert "need_scaled is false, and the name lighttaew2_1.pth says otherwise" in made.notes[0]


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("models_t5_umt5-xxl-enc-bf16.pth", "no text encoder below .*t5_original_ckpt"),
        ("Wan2.1_VAE.pth", r"no VAE below .*distill_int8, .* for Wan2.1_VAE.pth, .*vae_path"),
        ("model.safetensors", "no transformer found: .*dit_original_ckpt"),
    ],
)
def test_what_is_missing_is_named_with_its_places_and_its_key(home, gone, words):
    link(plain_demo("t2v"), home / "model.safetensors")
    (home / gone).unlink()

    with pytest.raises(CheckpointError, match=words):
        settings(home)


@pytest.mark.parametrize(
    ("error", "changes", "words"),
    [
        (CapabilityError, {"model_cls": "wan2.2_animate"}, "is for Animate models"),
        (CapabilityError, {"model_cls": "wan2.1"}, "models that are not distilled"),
        (RequestError, {"model_cls": "wan3"}, "not one that is run here; use wan2.1_distill"),
        (CapabilityError, {"task": "s2v"}, "--task s2v is not run here; use t2v, i2v, flf2v"),
        (RequestError, {"task": "i2v"}, "demo_t2v.safetensors is a text-to-video model"),
        (CapabilityError, {"changing_resolution": True}, "changing_resolution is not done yet"),
        (CapabilityError, {"feature_caching": "Tea"}, "feature_caching is not done yet"),
        (CapabilityError, {"ar_config": {"chunks": 3}}, "ar_config is not done yet"),
        (CapabilityError, {"enable_dynamic_cfg": True}, "guidance_embedding"),
        (RequestError, {"text_len": 256}, "text_len is 256, and every Wan model has 512"),
        (RequestError, {"dit_quantized": True}, "without dit_quant_scheme"),
        (
            CapabilityError,
            {"dit_quantized": True, "dit_quant_scheme": "int4-g128-marlin"},
            "int4 with a scale for each group of 128, which this version does not load",
        ),
        (
            RequestError,
            {"dit_quantized": True, "dit_quant_scheme": "fp8-magic"},
            "fp8-magic is no scheme that LightX2V has",
        ),
        (
            CapabilityError,
            {"enable_cfg": True, "sample_guide_scale": [3.5, 4.0]},
            "differs for the two experts",
        ),
        (RequestError, {"resize_mode": "crop"}, "resize_mode crop is unknown; use adaptive"),
        (CheckpointError, {"lora_path": "none.safetensors"}, "lora_path none.safetensors does not"),
    ],
)
def test_what_is_not_done_or_contradicts_itself_is_refused(home, error, changes, words):
    demo = plain_demo("t2v")

    with pytest.raises(error, match=words):
        settings(link(demo, home / demo.name), **changes)


def test_what_asks_for_nothing_is_no_reason_to_refuse(home):
    link(plain_demo("t2v"), home / "model.safetensors")
    off = {"changing_resolution": False, "feature_caching": "NoCaching", "parallel": False}

    made = settings(home, **off, dit_quant_scheme="Default", lora_configs=None)

    assert made.notes == ()


def test_several_gpus_are_told_and_processes_refused(home):
    link(plain_demo("t2v"), home / "model.safetensors")
    made = settings(home, parallel={"seq_p_size": 4, "seq_p_attn_type": "ulysses"})

    assert made.notes == (
        "c.json: parallel: not yet; several GPUs are not used yet: the same frames come from one",
    )
    with pytest.raises(CapabilityError, match="8 processes are asked for"):
        check_processes(8)


def test_guidance_that_a_distilled_model_burns_with_is_a_warning(home):
    link(plain_demo("t2v"), home / "model.safetensors")

    guided = settings(home, enable_cfg=True, sample_guide_scale=[3.5, 3.5])
    off = settings(home, enable_cfg=False, sample_guide_scale=6)

    assert (guided.overrides.cfg, off.overrides.cfg) == (3.5, 1.0)
    assert "a distilled model burns with CFG: set it to false" in guided.notes[0]


def test_an_attention_that_is_not_installed_gives_way_to_the_exact_one(home):
    link(plain_demo("t2v"), home / "model.safetensors")
    named = {"cross_attn_1_type": None, "cross_attn_2_type": None}

    sage = settings(home, self_attn_1_type="sage_attn2", **named)
    sparse = settings(home, self_attn_1_type="radial_attn", **named)
    _, lines = open_pipeline(sage, torch.device("cpu"))

    assert sage.attention == "sage"
    assert "attention sage cannot run here" in lines[0]
    assert "radial_attn leaves out part of the work" in sparse.notes[0]


def test_a_list_decides_over_a_number_of_steps(home):
    link(plain_demo("t2v"), home / "model.safetensors")

    both = settings(home, infer_steps=8)
    alone = settings(home, infer_steps=8, denoising_step_list=None)

    assert "infer_steps is 8, and denoising_step_list has 4; the list decides" in both.notes[0]
    assert (both.overrides.steps, alone.overrides.steps) == (None, 8)


def test_a_folder_is_not_needed_for_a_file_with_its_encoders_beside(tmp_path):
    home = arrange(tmp_path / "m", at="one")

    assert settings(home / "one.safetensors").parts.vae == home / "Wan2.1_VAE.pth"
