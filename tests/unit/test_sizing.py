from __future__ import annotations

import pytest
import torch

from lightx2v_core.datatypes import VideoSize
from lightx2v_core.errors import RequestError
from lightx2v_core.presets import PRESETS, make_plan
from lightx2v_core.sizing import FITS, fit_size


@pytest.mark.parametrize("fit", FITS)
def test_every_side_from_1_to_2000_can_be_made_and_comes_back_exactly(fit):
    for side in range(1, 2001):
        wide = fit_size(VideoSize(side, 16, 1), fit)
        high = fit_size(VideoSize(16, side, 1), fit)

        wide.made.check()
        high.made.check()
        assert abs(wide.made.width - side) < 16
        assert wide.trim(torch.zeros(1, 16, wide.made.width, 3)).shape == (1, 16, side, 3)
        assert high.trim(torch.zeros(1, high.made.height, 16, 3)).shape == (1, side, 16, 3)


@pytest.mark.parametrize("fit", FITS)
def test_every_length_from_1_to_300_can_be_made_and_comes_back_exactly(fit):
    for frames in range(1, 301):
        fitted = fit_size(VideoSize(17, 31, frames), fit)

        fitted.made.check()
        assert 0 <= fitted.made.frames - frames < 4
        made = torch.zeros(fitted.made.frames, fitted.made.height, fitted.made.width, 3)
        assert fitted.trim(made).shape == (frames, 31, 17, 3)


def test_every_preset_gives_a_plan_for_one_and_for_two_experts():
    for preset in PRESETS.values():
        for experts in (1, 2):
            plan = make_plan(preset, experts=experts)

            assert plan.steps == preset.steps
            assert set(plan.experts) == ({0, 1} if experts == 2 else set())


def test_crop_takes_the_middle_of_a_larger_clip():
    fitted = fit_size(VideoSize(640, 360, 80))
    rows = torch.arange(368.0).view(1, 368, 1, 1).expand(81, 368, 640, 1)

    frames = fitted.trim(rows)

    assert fitted.made == VideoSize(640, 368, 81)
    assert frames.shape == (80, 360, 640, 1)
    assert frames[0, :, 0, 0].tolist() == list(range(4, 364))
    assert fitted.describe() == (
        "640x360, 80 frames does not fit Wan (sides divisible by 16, 4*n + 1 frames): 640x368, "
        "81 frames are made, then cropped and the last 1 dropped"
    )


def test_pad_puts_black_around_a_smaller_clip():
    fitted = fit_size(VideoSize(50, 33, 5), "pad")

    frames = fitted.trim(torch.ones(5, 32, 48, 3, dtype=torch.uint8))

    assert fitted.made == VideoSize(48, 32, 5)
    assert frames[:, :32, 1:49].eq(1).all()
    assert frames.sum() == 5 * 32 * 48 * 3
    assert "padded with black" in fitted.describe()


def test_a_size_that_fits_is_left_alone_and_nothing_is_said():
    fitted = fit_size(VideoSize(832, 480, 81))

    assert fitted.made == fitted.asked
    assert fitted.describe() == ""


@pytest.mark.parametrize(
    ("size", "fit", "words"),
    [
        (VideoSize(0, 16, 1), "crop", "width 0 is not between 1 and 8192"),
        (VideoSize(16, 8193, 1), "crop", "height 8193 is not between"),
        (VideoSize(16, 16, 2002), "pad", "frames 2002 is not between 1 and 2001"),
        (VideoSize(16, 16, 1), "squeeze", "fit 'squeeze' is unknown; use crop or pad"),
    ],
)
def test_a_size_nobody_can_make_is_refused(size, fit, words):
    with pytest.raises(RequestError, match=words):
        fit_size(size, fit)
