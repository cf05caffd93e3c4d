from __future__ import annotations

import pytest

from lightx2v_core.checkpoint.detect import CheckpointInfo
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.errors import RequestError
from lightx2v_core.presets import PRESETS, Overrides, make_plan, preset_for

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
