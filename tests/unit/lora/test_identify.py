"""What a LoRA was made for, and the warning where that is not the model it is put on."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from lightx2v_core.checkpoint.source import Checkpoint, open_checkpoint
from lightx2v_core.errors import CheckpointError
from lightx2v_core.lora.branches import weight_shapes
from lightx2v_core.lora.identify import identify
from lightx2v_core.lora.match import match_lora
from lightx2v_core.lora.read import read_lora
from lightx2v_core.report import make_report
from lightx2v_core.wan.model import WanModel
from tests.conftest import VARIANTS
from tests.unit.lora.samples import pair, written

# (folder, file, expert, task): names as published by lightx2v, Kijai and trainers.
NAMES = [
    ("", "wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022", "high", "i2v"),
    ("", "wan2.2_i2v_A14b_low_noise_lora_rank64_lightx2v_4step_1022", "low", "i2v"),
    ("", "wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217", "high", "t2v"),
    ("Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1", "high_noise_model", "high", "t2v"),
    ("Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1", "low_noise_model", "low", "i2v"),
    ("", "Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16", "high", "t2v"),
    ("", "Wan2.2-Lightning_T2V-v1.1-A14B-4steps-lora_LOW_fp16", "low", "t2v"),
    ("", "wan2.1_i2v_lora_rank64_lightx2v_4step", None, "i2v"),
    ("", "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64", None, "t2v"),
    ("", "my_character_wan22_HighNoise", "high", None),
    ("", "high_quality_details", None, None),
    ("", "wan22_high_quality", None, None),
    ("", "wan2.2_high_and_low_noise_merged_high", None, None),
    ("", "slow_motion_v2", None, None),
    ("i2v", "style_t2v", None, None),
]


@pytest.mark.parametrize(("folder", "file", "expert", "task"), NAMES)
def test_names_tell_expert_and_task_or_nothing(tmp_path, folder, file, expert, task):
    tensors = pair("blocks.0.self_attn.q")

    origin = identify(read_lora(written(tmp_path / "x" / folder, tensors, f"{file}.safetensors")))

    assert (origin.expert, origin.task, origin.width) == (expert, task, 256)


def test_a_renamed_file_is_known_by_the_name_it_was_saved_under(tmp_path):
    tensors, title = pair("blocks.0.ffn.0", 512), "wan22_i2v_low_noise"

    origin = identify(read_lora(written(tmp_path / "x", tensors, ss_output_name=title)))

    assert (origin.expert, origin.task) == ("low", "i2v")


@cache
def shapes(variant):
    with torch.device("meta"):
        return weight_shapes(WanModel(VARIANTS[variant]))


def matched(folder, tensors, variant="t2v", expert=None, name="lora.safetensors"):
    lora = read_lora(written(folder / "x", tensors, name))
    return match_lora(lora, shapes(variant), 1.0, expert).report


def test_the_other_experts_lora_is_named_and_the_right_one_is_not(tmp_path):
    tensors, name = pair("blocks.0.self_attn.q"), "wan2.2_low_noise.safetensors"

    swapped = matched(tmp_path, tensors, "a14b_i2v", "high", name)

    assert "is for the low-noise expert and this is the high-noise one" in swapped.warnings[0]
    assert matched(tmp_path, tensors, "a14b_i2v", "low", name).warnings == ()
    assert matched(tmp_path, tensors, "a14b_i2v", None, name).warnings == ()


IMAGE = pair("blocks.0.cross_attn.k_img", seed=3) | {
    "diffusion_model.img_emb.proj.0.diff": torch.ones(1280),
}


def test_layers_of_the_clip_branch_are_applied_harmless_or_a_mix_up(tmp_path):
    tensors = pair("blocks.0.self_attn.q") | pair("blocks.1.self_attn.q", seed=2) | IMAGE

    own, a14b, t2v = (matched(tmp_path, tensors, kind) for kind in ("i2v", "a14b_i2v", "t2v"))

    assert (own.matched, own.harmless, own.warnings) == (4, (), ())
    assert (a14b.matched, len(a14b.harmless), a14b.warnings) == (2, 2, ())
    assert (t2v.matched, len(t2v.harmless)) == (2, 2)
    assert "is an image-to-video LoRA on a text-to-video model" in t2v.warnings[0]


@pytest.mark.parametrize(("channels", "variant"), [(36, "t2v"), (16, "i2v")])
def test_the_channels_of_the_patch_embedding_tell_the_task(tmp_path, channels, variant):
    tensors = pair("blocks.0.self_attn.q") | {
        "diffusion_model.patch_embedding.diff": torch.ones(256, channels, 1, 2, 2)
    }

    report = matched(tmp_path, tensors, variant)

    assert report.failed == ("patch_embedding.weight",)
    assert "-video LoRA on a" in report.warnings[0]


@pytest.mark.parametrize(("width", "size"), [(1536, "1.3B"), (3072, "5B"), (5120, "14B")])
def test_a_lora_of_another_size_names_both(tmp_path, width, size):
    words = rf"is {width}x{width} and this model's is 256x256 \(the LoRA is for the {size} model"

    with pytest.raises(CheckpointError, match=words):
        matched(tmp_path, pair("blocks.0.self_attn.q", width, width))


def test_less_than_half_is_a_warning(tmp_path):
    tensors = pair("blocks.0.self_attn.q") | {
        f"diffusion_model.blocks.{n}.ffn.0.diff_b": torch.ones(512) for n in (7, 8, 9)
    }

    report = matched(tmp_path, tensors)

    assert report.warnings == ("lora.safetensors: only 1 of 4 parts fit: for another model?",)
    assert "matched 1/4" in report.describe()


def test_the_line_of_the_published_kind_reads_as_documented(tmp_path):
    tensors = (
        pair("blocks.0.self_attn.q", rank=64)
        | IMAGE
        | {
            "diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(8.0),
            "diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 256),
        }
    )

    report = matched(tmp_path, tensors, "a14b_i2v")

    assert report.modulations == 1
    assert report.describe() == (
        "lora.safetensors: matched 2/4, rank 4/64, alpha 8, effective strength 1 x 0.125/1; "
        "ignored 2 image-embedding layers this model does not have: harmless"
    )


@pytest.mark.parametrize(("folder", "file", "expert", "task"), NAMES)
def test_inspect_says_of_a_lora_what_apply_goes_by_and_reads_no_weights(
    tmp_path, monkeypatch, folder, file, expert, task
):
    tensors = pair("blocks.0.self_attn.q", 5120, 5120, rank=3)
    path = written(tmp_path / "x" / folder, tensors, f"{file}.safetensors")
    monkeypatch.setattr(Checkpoint, "tensors", None)

    report = make_report(open_checkpoint(path))

    info, text = report.info, "\n".join(report.lines())
    assert info.expert == expert
    assert task is None or info.task == task
    assert (info.size, info.layout) == ("14B", "comfy")
    assert "1 pairs of rank 3" in text
    assert expert is None or f"{expert} noise" in text


def test_inspect_names_no_expert_where_the_name_and_the_title_inside_disagree(tmp_path):
    tensors = pair("blocks.0.self_attn.q") | {
        "diffusion_model.patch_embedding.diff": torch.ones(256, 36, 1, 2, 2)
    }
    file = "wan2.2_i2v_A14b_high_noise_lora_rank64_mine.safetensors"
    path = written(tmp_path / "x", tensors, file, ss_output_name="wan2.2_low_noise")

    info = make_report(open_checkpoint(path)).info

    assert (info.expert, info.task) == (identify(read_lora(path)).expert, "i2v") == (None, "i2v")
