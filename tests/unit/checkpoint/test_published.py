"""Every published format by its reconstructed header: what `detect` and `inspect` make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightx2v_core.checkpoint.detect import CheckpointInfo, detect
from lightx2v_core.checkpoint.headers import TensorHeader
from lightx2v_core.checkpoint.registry import LORAS as LORA_ROWS
from lightx2v_core.checkpoint.registry import OTHERS as OTHER_ROWS
from lightx2v_core.checkpoint.registry import SOURCES, read_name
from lightx2v_core.checkpoint.registry import TRANSFORMERS as TRANSFORMER_ROWS
from lightx2v_core.checkpoint.source import Checkpoint
from lightx2v_core.presets import PRESETS
from lightx2v_core.quant.schemes import LINEARS
from lightx2v_core.report import make_report
from tests.headers.formats import (
    clip,
    extracted_lora,
    lightx2v_fp8,
    nvfp4,
    pairs_only,
    quantised,
    umt5,
)
from tests.headers.published import LORAS, PARTS, TRANSFORMERS, Fixture
from tests.headers.reconstruct import Header, reconstruct

FIELDS = ("family", "task", "expert", "size", "scheme", "release", "preset")


def as_checkpoint(header: Header, label: str = "x/model.safetensors", **metadata) -> Checkpoint:
    headers = {name: TensorHeader(*value) for name, value in header.items()}
    return Checkpoint(Path(label), headers, metadata)


def found(info: CheckpointInfo) -> str:
    values = (getattr(info, name) for name in FIELDS)
    return " ".join("-" if v in (None, "unknown") else v for v in values)


def label(fixture: Fixture) -> str:
    return fixture.label.rpartition("/")[2]


@pytest.mark.parametrize("fixture", (*TRANSFORMERS, *LORAS, *PARTS), ids=label)
def test_a_published_file_is_told_by_header_and_name(fixture):
    report = make_report(as_checkpoint(fixture.make(), fixture.label, **fixture.metadata))

    info = report.info
    kind = "transformer" if fixture in TRANSFORMERS else "lora" if fixture in LORAS else None
    assert found(info) == fixture.expected, fixture.note
    assert info.dialect == fixture.dialect, fixture.note
    assert kind in (info.kind, None)
    assert info.warnings == (), fixture.note
    assert (report.problem is None) == (kind != "transformer" or info.scheme in LINEARS)


# (header, bytes of tensor data, from where they are known)
SIZES = (
    (lambda: nvfp4("wan2.2_i2v_a14b_high_noise"), 8_379_610_368, 0, "gufisha/WAN2.2 on HF"),
    (
        lambda: quantised(
            "wan2.2_i2v_a14b_high_noise", "F8_E4M3", "weight_scale", ("rows", 1), "BF16"
        ),
        *(14_536_468_608, 0, "gufisha/WAN2.2 on HF"),
    ),
    (lambda: extracted_lora("wan2.1_i2v_14b", 64), 739e6, 0.005, "card of Wan2.1-Distill-Loras"),
    (lambda: extracted_lora("wan2.1_t2v_14b", 64), 631e6, 0.005, "card of Wan2.1-Distill-Loras"),
    (lambda: pairs_only("wan2.2_t2v_a14b_low_noise", 64), 614e6, 0.005, "Wan2.2-Distill-Loras"),
    (lambda: pairs_only("wan2.1_t2v_14b", 64, "F32", True), 1.23e9, 0.005, "Wan2.2-Lightning"),
    (lambda: lightx2v_fp8("wan2.2_i2v_a14b_high_noise"), 15e9, 0.01, "Wan2.2-Distill-Models"),
    (lambda: umt5("official", "F8_E4M3", "weight_scale"), 6.7e9, 0.01, "LightX2V's docs"),
    (lambda: umt5("huggingface", "F16"), 11.4e9, 0.01, "LightX2V's docs"),
    (lambda: clip("official"), 1.26e9, 0.01, "LightX2V's docs"),
)


@pytest.mark.parametrize(("make", "size", "within", "known_from"), SIZES)
def test_a_reconstructed_header_is_as_large_as_the_published_file(make, size, within, known_from):
    nbytes = as_checkpoint(make()).nbytes

    assert abs(nbytes - size) <= within * size, f"{nbytes} bytes; {known_from}"


@pytest.mark.parametrize("fixture", (*TRANSFORMERS, *LORAS, *PARTS), ids=label)
def test_every_fixture_names_the_code_that_wrote_it(fixture):
    assert fixture.note.startswith("reconstructed from ")
    assert ".py" in fixture.written_by


def test_every_row_has_a_source_and_a_preset_that_exists():
    rows = (*TRANSFORMER_ROWS, *LORA_ROWS, *(row for _, row in OTHER_ROWS))

    for pattern, release, repository, letters, preset, _ in rows:
        assert pattern == pattern.lower() and release and repository
        assert letters and set(letters) <= SOURCES.keys(), pattern
        assert preset == "" or preset in PRESETS, pattern


@pytest.mark.parametrize(
    ("header", "name", "words"),
    [
        ("wan2.1_i2v_14b", "x/Wan_T2V_v2.safetensors", "the name says t2v, the header says i2v"),
        ("wan2.1_t2v_14b", "x/wan_fp8.safetensors", "the name says fp8, the header says bf16"),
        ("wan2.1_t2v_1.3b", "x/wan2.1_t2v_14b.safetensors", "says 14B, the header says 1.3B"),
        ("wan2.1_i2v_14b", "x/wan2.2_i2v.safetensors", "says wan2.2, the header says wan2.1"),
        ("wan2.1_t2v_14b", "x/Wan2.1_VACE_14B.safetensors", "VACE, and its header shows a plain"),
        ("wan2.1_t2v_14b", "x/Phantom-Wan-14B_fp16.safetensors", "without reference pictures"),
    ],
)
def test_a_name_that_contradicts_the_header_is_a_warning_and_changes_nothing(header, name, words):
    info = detect(as_checkpoint(reconstruct(header), name))

    plain = detect(as_checkpoint(reconstruct(header)))
    assert words in " ".join((*info.warnings, *info.notes))
    assert (info.task, info.size, info.scheme) == (plain.task, plain.size, plain.scheme)
    assert info.family in (plain.family, "wan2.1")
    assert info.refusal is None


def test_a_renamed_file_does_not_get_the_release_of_its_name():
    name = "x/wan2.1_t2v_14b_lightx2v_4step.safetensors"

    info = detect(as_checkpoint(reconstruct("wan2.1_i2v_14b"), name))

    assert (info.release, info.preset, info.repository) == ("unknown", None, None)
    assert "its name is that of lightx2v/Wan2.1-Distill-Models" in " ".join(info.warnings)


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_high_noise.safetensors", "high"),
        ("Wan2_2-I2V-A14B-LOW_bf16.safetensors", "low"),
        ("high_quality_wan2.2.safetensors", None),
        ("wan2.2_slowmotion.safetensors", None),
        ("wan2.2_high_noise_to_low_noise.safetensors", None),
    ],
)
def test_an_expert_is_read_where_the_name_speaks_of_experts(name, expert):
    assert read_name(name.lower()).get("expert") == expert


def test_our_own_metadata_wins_over_a_name():
    name = "x/wan2.2_t2v_A14b_high_noise_lightx2v_4step.safetensors"
    ours = {"lightx2v.release": "demo", "lightx2v.expert": "low"}

    info = detect(as_checkpoint(reconstruct("wan2.2_t2v_a14b_low_noise"), name, **ours))

    assert (info.release, info.expert) == ("demo", "low")


# (a tensor of the family, its shape, the family named in the refusal)
FAMILIES = (
    ("vace_patch_embedding.weight", "VACE"),
    ("vace_blocks.0.after_proj.weight", "VACE"),
    ("control_adapter.conv.weight", "Fun Camera"),
    ("ref_conv.weight", "Fun Control"),
    ("pose_patch_embedding.weight", "Animate"),
    ("face_adapter.fuser_blocks.0.k_norm.weight", "Animate"),
    ("patch_embedding_pose.weight", "SCAIL"),
    ("audio_proj.audio_proj_glob_1.layer.bias", "HuMo"),
    ("casual_audio_encoder.encoder.final_linear.weight", "S2V"),
    ("audio_injector.injector.0.k.weight", "S2V"),
    ("multitalk_audio_proj.proj1.weight", "MultiTalk"),
    ("blocks.0.audio_cross_attn.kv_linear.weight", "InfiniteTalk"),
    ("blocks.0.self_attn.ref_adapter.to_k_ref.weight", "Lynx"),
    ("blocks.0.cam_encoder.weight", "ReCamMaster"),
    ("text_projection.0.weight", "Bindweave"),
    ("fps_embedding.weight", "SkyReels"),
    ("condition_embedding_align.cross_attn.in_proj_bias", "SteadyDancer"),
    ("guidance_embedding.linear_1.weight", "dynamic-CFG"),
    ("time_embedding_r.0.weight", "mean-flow"),
)


@pytest.mark.parametrize(("tensor", "family"), FAMILIES)
def test_a_family_this_version_does_not_run_is_refused_by_name(tensor, family):
    header = reconstruct("wan2.1_t2v_1.3b") | {tensor: ((8, 8), "BF16")}

    report = make_report(as_checkpoint(header))

    assert f"is a Wan {family}" in report.problem or f"or {family} model" in report.problem
    assert "which this version does not run" in report.lines()[-1]


@pytest.mark.parametrize(
    ("channels", "out", "words"),
    [(48, 48, "the Wan 2.2 5B model"), (48, 16, "takes 48 input channels: a control variant")],
)
def test_channel_counts_tell_the_5b_and_control_models(channels, out, words):
    header = reconstruct("wan2.1_t2v_1.3b")
    header["patch_embedding.weight"] = ((1536, channels, 1, 2, 2), "BF16")
    header |= {"head.head.weight": ((out * 4, 1536), "BF16"), "head.head.bias": ((out * 4,), "F32")}

    assert words in detect(as_checkpoint(header)).refusal


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"vace_blocks.0.after_proj.weight": ((8, 8), "F16")}, "belongs to Wan VACE"),
        ({"blocks.3.self_attn.q.weight": ((8, 8), "F16")}, "holds blocks of a Wan transformer"),
        ({"blocks.0.audio_cross_attn.proj.weight": ((8, 8), "F16")}, "MultiTalk or InfiniteTalk"),
        ({"text_projection.0.weight": ((8, 8), "F16")}, "of no kind known here"),
        ({}, "of no kind known here"),
    ],
)
def test_parts_and_add_ons_are_told_what_they_belong_to(header, words):
    assert words in detect(as_checkpoint(header)).refusal


def t5_xxl() -> Header:
    header = umt5("huggingface")
    tables = [name for name in header if "relative_attention_bias" in name]
    return {name: value for name, value in header.items() if name not in tables[1:]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (t5_xxl(), "T5, not UMT5: Wan needs umt5_xxl"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": ((8, 8), "F16")}, "a CLIP text encoder"),
        (
            {
                "vision_model.embeddings.patch_embedding.weight": ((1024, 3, 14, 14), "F16"),
                "vision_model.encoder.layers.0.mlp.fc1.weight": ((8, 8), "F16"),
            },
            "needs clip_vision_h",
        ),
        ({"diffusion_model.blocks.0.ffn.0.lokr_w1": ((8, 8), "F16")}, "LoKr adapter"),
        ({"lora_unet_down_0.lora_up.weight": ((8, 8), "F16")}, "another model than Wan"),
    ],
)
def test_a_part_that_no_wan_model_can_use_is_told_so(header, words):
    report = make_report(as_checkpoint(header))

    assert words in report.problem
    assert report.lines()[-1].startswith("this version: does not use it")
    assert report.as_json()["runs"] is False


def test_a_report_says_what_a_file_needs_and_goes_with():
    name = "x/wan2.2_i2v_A14b_high_noise_lightx2v_4step.safetensors"

    report = make_report(as_checkpoint(reconstruct("wan2.2_i2v_a14b_high_noise"), name))

    text = "\n".join(report.lines())
    assert report.needs.weights == pytest.approx(28.6e9, rel=0.01)
    assert 3e9 < report.needs.activations < 8e9
    assert report.needs.converted == 0
    assert "wan2.2_i2v_A14b_low_noise_lightx2v_4step.safetensors" in text
    assert "lightx2v/Wan2.2-Distill-Models, Apache-2.0" in text
    assert "steps 1000, 750, 500, 250; shift 5; CFG off; 832x480, 81 frames" in text
    assert "this version: runs it" in text


def test_a_full_precision_file_says_that_it_is_converted_in_ram():
    report = make_report(as_checkpoint(reconstruct("wan2.1_i2v_14b", "F32")))

    assert report.needs.converted == report.needs.weights == report.info.bytes // 2
    assert any("clip_vision_h" in part for part in report.goes_with)


def test_a_lora_report_counts_pairs_ranks_and_differences():
    header = pairs_only("wan2.1_t2v_1.3b", 32, alpha=True)

    lines = make_report(as_checkpoint(header, "x/some_lora.safetensors")).lines()

    assert "holds: 300 pairs of rank 32, 0 differences; scaled by the alpha in the file" in lines
    assert lines[-1] == "this version: applies it with Apply LoRA"


def test_an_undistilled_model_is_said_to_need_a_lora():
    name = "x/wan2.1_t2v_14B_bf16.safetensors"

    lines = make_report(as_checkpoint(reconstruct("wan2.1_t2v_14b"), name)).lines()

    assert any("four steps need a distillation LoRA" in line for line in lines)


def test_a_lora_tells_its_preset_and_strength_and_a_base_model_its_own():
    lora = make_report(
        as_checkpoint(
            extracted_lora("wan2.1_t2v_14b", 32), "x/Wan21_CausVid_14B_T2V_lora_rank32.safetensors"
        )
    )
    pair = make_report(
        as_checkpoint(
            reconstruct("wan2.2_t2v_a14b_low_noise"),
            "x/wan2.2_t2v_low_noise_14B_fp16.safetensors",
        )
    )

    told = "\n".join(lora.lines() + pair.lines())
    assert "causvid-12step: 12 equal steps; shift 7; CFG off; 832x480" in told
    assert "strength 0.3, on a base model" in told
    assert "base-t2v-a14b: 40 equal steps; shift 12; CFG 4 (low noise 3)" in told
