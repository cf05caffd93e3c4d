"""The size of a video by LightX2V's rules; expected values worked out by hand from them."""

from __future__ import annotations

import pytest
import torch

from lightx2v_core.configuration.read import make_configuration
from lightx2v_core.configuration.running import Wish, check_images, stretch_image
from lightx2v_core.configuration.sizes import SizeRule, read_sizes
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.errors import RequestError
from lightx2v_core.presets import PRESETS

PRESET = PRESETS["distill-4step"]


def rule(**values: object) -> SizeRule:
    given = {"target_height": 480, "target_width": 832, "target_video_length": 81} | values
    return read_sizes(make_configuration(given))


@pytest.mark.parametrize(
    ("image", "width", "height"),
    [
        ((480, 832), 832, 480),
        ((1080, 1920), 832, 464),  # sqrt(399360 * 0.5625) = 473.9, sqrt(399360 / 0.5625) = 842.6
        ((1920, 1080), 464, 832),
        ((512, 512), 624, 624),  # 631.9 down to 16
    ],
)
def test_an_image_keeps_its_aspect_at_the_area_asked_for(image, width, height):
    assert rule().from_image(image, PRESET) == VideoSize(width, height, 81)


@pytest.mark.parametrize(
    ("changes", "width", "height"),
    [
        ({"resize_mode": "adaptive"}, 832, 480),
        ({"resize_mode": "adaptive", "resolution": "720p"}, 1280, 720),
        ({"resize_mode": "fixed_max_area"}, 1280, 720),
        ({"resize_mode": "keep_ratio_fixed_area"}, 832, 464),
        ({"resize_mode": "fixed_min_side"}, 848, 480),  # 480 / 0.5625 = 853.3
        ({"resize_mode": "fixed_shape", "fixed_shape": [512, 768]}, 768, 512),
        ({"resize_mode": "adaptive", "bucket_shape": {"1.0": [[96, 96]] * 3}}, 96, 96),
    ],
)
def test_resize_modes_choose_as_lightx2v_does(changes, width, height):
    assert rule(**changes).from_image((1080, 1920), PRESET) == VideoSize(width, height, 81)


def test_words_alone_take_the_size_of_the_request_then_the_file_then_the_model():
    assert rule().video(PRESET, (720, 720), 17) == VideoSize(720, 720, 17)
    assert rule().video(PRESET) == VideoSize(832, 480, 81)
    assert SizeRule().video(PRESETS["demo-4step"]) == VideoSize(128, 128, 17)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resolution": "4k"}, "resolution 4k is unknown"),
        ({"fixed_area": "4k"}, "fixed_area 4k is unknown"),
        ({"resize_mode": "fixed_shape"}, "needs fixed_shape, height and width"),
        ({"bucket_shape": {"wide": [[1, 2]]}}, "bucket_shape must hold lists of"),
        ({"bucket_shape": {"1.0": [[480, 480]]}}, "needs 3 sizes for each aspect ratio"),
    ],
)
def test_what_no_rule_knows_is_refused(changes, words):
    with pytest.raises(RequestError, match=words):
        rule(**changes)


def test_stretching_fills_the_size_without_cropping():
    ramp = torch.linspace(-1, 1, 40)[None, None].expand(3, 20, 40)

    stretched = stretch_image(ramp, 16, 16)

    assert stretched.shape == (3, 16, 16)
    assert stretched[0, 0, 0] < -0.9 and stretched[0, 0, -1] > 0.9, "both edges are still there"


@pytest.mark.parametrize(
    ("task", "wish", "words"),
    [
        ("t2v", Wish("x", image=torch.zeros(3, 8, 8)), "takes no image; leave it out"),
        ("i2v", Wish("x"), "takes one start image and no last one; give that"),
        ("flf2v", Wish("x", image=torch.zeros(3, 8, 8)), "takes a first and a last image"),
    ],
)
def test_images_that_do_not_go_with_the_task_are_refused(task, wish, words):
    with pytest.raises(RequestError, match=words):
        check_images(task, wish)
