from __future__ import annotations

import pytest

from lightx2v_core.datatypes import SamplerPlan
from lightx2v_core.errors import RequestError
from lightx2v_core.sampling.schedule import (
    describe,
    experts_by_boundary,
    experts_by_step,
    list_sigmas,
    split_first,
    step_sigmas,
)
from tests.tolerances import SIGMA_TABLE

# The table of the published schedules: shift -> sigmas of [1000, 750, 500, 250].
PUBLISHED = {
    3: (1.0, 0.9, 0.75, 0.5),
    5: (1.0, 0.9375, 0.83333333, 0.625),
    7: (1.0, 0.95454545, 0.875, 0.7),
    8: (1.0, 0.96, 0.88888889, 0.72727273),
    12: (1.0, 0.97297297, 0.92307692, 0.8),
    16: (1.0, 0.97959184, 0.94117647, 0.84210526),
}


@pytest.mark.parametrize("shift", PUBLISHED)
def test_the_published_list_gives_the_published_sigmas(shift):
    sigmas = list_sigmas([1000, 750, 500, 250], shift)

    assert sigmas == pytest.approx((*PUBLISHED[shift], 0.0), abs=SIGMA_TABLE)


def test_the_older_list_differs_in_the_first_sigma_alone():
    newer, older = (list_sigmas([first, 750, 500, 250], 5) for first in (1000, 999))

    assert older[0] == pytest.approx(0.99979984, abs=SIGMA_TABLE)
    assert older[1:] == newer[1:]


def test_eight_steps_land_on_the_authors_timesteps():
    sigmas = step_sigmas(8, 5)

    expected = (1, 0.97222, 0.9375, 0.89286, 0.83333, 0.75, 0.625, 0.41667, 0)
    assert sigmas == pytest.approx(expected, abs=1e-5)


def test_four_steps_are_the_published_list():
    assert step_sigmas(4, 5) == pytest.approx(list_sigmas([1000, 750, 500, 250], 5), abs=1e-15)


# steps, shift -> (high, low) steps for boundary 0.900 and for 0.875, sigma >= boundary is high.
SPLITS = {
    (4, 3): ((2, 2), (2, 2)),  # sigma 0.9 itself: a float-equality trap
    (4, 5): ((2, 2), (2, 2)),
    (4, 8): ((2, 2), (3, 1)),
    (4, 12): ((3, 1), (3, 1)),
    (6, 5): ((3, 3), (3, 3)),
    (6, 8): ((3, 3), (4, 2)),
    (8, 5): ((3, 5), (4, 4)),
    (8, 8): ((4, 4), (5, 3)),
}


@pytest.mark.parametrize(("steps", "shift"), SPLITS)
def test_the_boundary_splits_the_steps_as_in_the_table(steps, shift):
    sigmas = step_sigmas(steps, shift)

    counts = []
    for boundary in (0.900, 0.875):
        experts = experts_by_boundary(sigmas, boundary, shift)
        counts.append((experts.count(0), experts.count(1)))

    assert tuple(counts) == SPLITS[steps, shift]


@pytest.mark.parametrize("boundary", [0.01, 1.01])
def test_a_boundary_that_leaves_an_expert_idle_is_refused_with_both_names(boundary):
    with pytest.raises(RequestError, match=rf"boundary {boundary} with shift 5 gives .* change"):
        experts_by_boundary(step_sigmas(4, 5), boundary, 5)


@pytest.mark.parametrize("high_steps", [0, 4])
def test_no_step_for_one_expert_is_refused(high_steps):
    with pytest.raises(RequestError, match="leaves one expert without work"):
        experts_by_step(4, high_steps)


@pytest.mark.parametrize("values", [[], [500, 750], [1000, 1000], [1001, 500], [500, 0]])
def test_a_list_that_does_not_fall_is_refused(values):
    with pytest.raises(RequestError, match="must fall from 1000"):
        list_sigmas(values, 5)


@pytest.mark.parametrize("shift", [0, -1, 101])
def test_a_shift_out_of_range_is_refused(shift):
    with pytest.raises(RequestError, match="shift .* is not between"):
        step_sigmas(4, shift)


def test_the_plan_is_told_step_by_step():
    sigmas = list_sigmas([1000, 750, 500, 250], 5)

    text = describe(SamplerPlan(sigmas, experts=(0, 0, 1, 1), rule="preset x"))

    assert text.splitlines() == [
        "4 steps, euler, CFG off (preset x)",
        "  step 1-2, high noise: sigma 1.0000 → 0.9375 → 0.8333; timesteps 1000.0, 937.5",
        "  step 3-4, low noise: sigma 0.8333 → 0.6250 → 0.0000; timesteps 833.3, 625.0",
    ]


@pytest.mark.parametrize("sigmas", [(1.0,), (0.5, 1.0), (1.0, 1.0, 0.0)])
def test_sigmas_that_do_not_fall_make_no_plan(sigmas):
    with pytest.raises(RequestError):
        SamplerPlan(sigmas)


def test_a_shift_for_each_step_warps_each_value_by_its_own():
    sigmas = list_sigmas([1000, 750, 500, 250], (8, 8, 5, 5))

    assert sigmas == pytest.approx((1.0, 0.96, 0.83333333, 0.625, 0.0), abs=SIGMA_TABLE)


@pytest.mark.parametrize(
    ("shifts", "words"),
    [
        ((5, 8), "2 shifts are given and the run has 4 steps"),
        ((1, 1, 1, 50), r"make sigma rise from 0\.5000 to 0\.9434 after step 3"),
    ],
)
def test_shifts_of_the_wrong_number_or_that_rise_too_far_are_refused(shifts, words):
    with pytest.raises(RequestError, match=words):
        list_sigmas([1000, 750, 500, 250], shifts)


def test_the_first_step_can_be_divided_for_a_model_that_is_not_distilled():
    values = split_first((1000, 750, 500, 250), 5)

    assert values == (1000, 950, 900, 850, 800, 750, 500, 250)
    with pytest.raises(RequestError, match="at least two steps"):
        split_first((1000,), 5)


def test_the_plan_tells_cfg_loras_seconds_and_warnings_stage_by_stage():
    sigmas = list_sigmas([1000, 900, 750, 500, 250], 5)
    plan = SamplerPlan(
        sigmas, "euler", (2, 2, 0, 1, 1), 3.5, "", (3.5, 3.5, 1, 1, 1), ("shift: too much; less",)
    )

    text = describe(plan, [["a.safetensors 1"], ["b.safetensors 1"], []], [4.25, 1.0])

    assert text.splitlines() == [
        "5 steps, euler, CFG 3.5, 3.5, 1, 1, 1",
        "  step 1-2, not distilled: sigma 1.0000 → 0.9783 → 0.9375; timesteps 1000.0, 978.3; "
        "CFG 3.5; 4.2 s",
        "  step 3, high noise: sigma 0.9375 → 0.8333; timesteps 937.5; CFG off; "
        "LoRA a.safetensors 1; 1.0 s",
        "  step 4-5, low noise: sigma 0.8333 → 0.6250 → 0.0000; timesteps 833.3, 625.0; CFG off; "
        "LoRA b.safetensors 1",
        "warning: shift: too much; less",
    ]
