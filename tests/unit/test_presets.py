from __future__ import annotations

import pytest

from lightx2v_core.checkpoint.detect import CheckpointInfo
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.errors import RequestError
from lightx2v_core.presets import PRESETS, Overrides, make_plan, note_for, preset_for

DISTILL = PRESETS["distill-4step"]


def test_a_distilled_model_runs_four_steps_without_guidance():
    plan = make_plan(DISTILL)

    assert plan.sigmas == pytest.approx((1, 0.9375, 0.8333333, 0.625, 0))
    assert (plan.cfg, plan.solver, plan.experts) == (1.0, "euler", ())


def test_two_experts_share_four_steps_by_index():
    plan = make_plan(DISTILL, experts=2)

    assert plan.experts == (0, 0, 1, 1)
    assert plan.stages() == [(0, range(2)), (1, range(2, 4))]
    assert "high noise for the first 2 steps" in plan.rule


def test_first_last_frame_follows_the_index_and_not_the_boundary():
    plan = make_plan(PRESETS["flf2v-4step"], experts=2)

    assert plan.sigmas[1] == pytest.approx(0.97959184)
    assert plan.experts == (0, 0, 1, 1)


def test_a_boundary_wins_over_the_index_and_is_named():
    plan = make_plan(DISTILL, Overrides(steps=8, boundary=0.9), experts=2)

    assert plan.experts == (0, 0, 0, 1, 1, 1, 1, 1)
    assert "sigma >= 0.9" in plan.rule


def test_a_list_wins_over_steps():
    plan = make_plan(DISTILL, Overrides(steps=8, denoising_list=(1000, 500)))

    assert plan.steps == 2


def test_a_file_of_unknown_release_gets_the_common_schedule():
    assert preset_for(CheckpointInfo("transformer")) is DISTILL
    assert preset_for(CheckpointInfo("transformer", release="demo")).size == VideoSize(128, 128, 17)


@pytest.mark.parametrize("cfg", [0.5, 31])
def test_a_guidance_out_of_range_is_refused(cfg):
    with pytest.raises(RequestError, match="CFG .* use 1 for distilled"):
        make_plan(DISTILL, Overrides(cfg=cfg))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (VideoSize(640, 360, 81), "640x360 is not divisible by 16; use 640x368"),
        (VideoSize(832, 480, 80), r"80 frames is not 4\*n \+ 1; use 81"),
        (VideoSize(0, 480, 81), "0x480 is not divisible by 16; use 16x480"),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_the_nearest(size, words):
    with pytest.raises(RequestError, match=words):
        size.check()


@pytest.mark.parametrize("frames", [1, 5, 17, 81, 121])
def test_every_snapped_size_passes_its_own_check(frames):
    for side in range(1, 200, 7):
        VideoSize(side, 2 * side, frames).snapped().check()


def known(release: str, preset: str | None, **facts: str) -> CheckpointInfo:
    return CheckpointInfo("transformer", release=release, preset=preset, **facts)


def test_a_distillation_lora_decides_on_a_base_model_and_not_on_a_distilled_one():
    base = known("base", "base-t2v-14b", family="wan2.1", task="t2v")
    distilled = known("distill", "distill-4step-720p", family="wan2.1", task="i2v")
    lora = CheckpointInfo("lora", release="causvid", preset="causvid-12step")
    style = CheckpointInfo("lora")

    assert preset_for(base).name == "base-t2v-14b"
    assert preset_for(base, [lora]).name == "causvid-12step"
    assert preset_for(base, [style, lora]).lora_strength == 0.3
    assert preset_for(base, [style]).name == "distill-4step"
    assert preset_for(distilled, [lora]).name == "distill-4step-720p"
    assert "release causvid" in note_for(base, [lora])
    assert "LoRA unknown" in note_for(base, [style])


def test_a_first_last_frame_model_keeps_its_shift_under_any_lora():
    base = known("base", "base-flf2v", family="wan2.1", task="flf2v")
    lora = CheckpointInfo("lora", release="distill", preset="distill-4step")

    assert (preset_for(base).shift, preset_for(base).cfg) == (16.0, 5.5)
    assert preset_for(base, [lora]).name == "flf2v-4step"


def test_a_pair_that_is_not_distilled_splits_by_its_boundary_with_a_guidance_each():
    pair = known("base", "base-t2v-a14b", family="wan2.2", task="t2v")

    plan = make_plan(preset_for(pair), experts=2)

    high = plan.experts.count(0)
    assert (plan.steps, plan.cfg) == (40, 4.0)
    assert plan.sigmas[high - 1] >= 0.875 > plan.sigmas[high]
    assert plan.cfgs == (4.0,) * high + (3.0,) * (40 - high)


def test_the_plan_says_where_half_and_boundary_disagree():
    image = preset_for(known("distill", "distill-4step", family="wan2.2", task="i2v"))
    text = preset_for(known("distill", "distill-4step", family="wan2.2", task="t2v"))

    eight = make_plan(image, Overrides(steps=8), experts=2)
    shifted = make_plan(text, Overrides(shift=8.0), experts=2)

    assert "first 4 steps (by the boundary 0.9 it would be 3)" in eight.rule
    assert "first 2 steps (by the boundary 0.875 it would be 3)" in shifted.rule
    assert "boundary" not in make_plan(image, experts=2).rule


def test_three_stages_divide_the_first_step_for_the_base_model():
    plan = make_plan(DISTILL, Overrides(base_steps=5), experts=2)

    assert plan.experts == (2, 2, 2, 2, 2, 0, 1, 1)
    assert plan.sigmas[5:] == make_plan(DISTILL).sigmas[1:]
    assert plan.cfgs == (3.5,) * 5 + (1.0,) * 3
    assert make_plan(DISTILL, Overrides(base_steps=1)).experts == (2, 0, 0, 0)
    with pytest.raises(RequestError, match="only step of the distilled high-noise expert"):
        make_plan(DISTILL, Overrides(base_steps=5, high_steps=1), experts=2)


def test_a_guidance_for_each_step_is_in_the_plan_and_a_wrong_number_is_refused():
    plan = make_plan(DISTILL, Overrides(cfgs=(3.5, 1, 1, 1)))

    assert [plan.cfg_at(step) for step in range(4)] == [3.5, 1, 1, 1]
    assert plan.cfg == 3.5
    assert make_plan(DISTILL, Overrides(cfgs=(1, 1, 1, 1))).cfgs == ()
    with pytest.raises(RequestError, match="2 CFG values are given and the run has 4 steps"):
        make_plan(DISTILL, Overrides(cfgs=(3.5, 1)))
