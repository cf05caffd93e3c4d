from __future__ import annotations

import pytest
import torch

from lightx2v_core.conditioning import (
    IMAGE_FITS,
    Last,
    amplify_motion,
    check_pairing,
    fit_image,
    frame_mask,
    image_condition,
    place_images,
)
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.errors import RequestError
from lightx2v_core.wan.vae import VaeConfig, WanVae
from tests.conftest import VARIANTS, fill

SIZE = VideoSize(32, 16, 9)


@pytest.fixture(scope="module")
def vae() -> WanVae:
    return fill(WanVae(VaeConfig(encoder_dim=8, decoder_dim=8)))


def test_the_first_latent_frame_of_the_mask_has_four_ones_and_the_rest_none():
    mask = frame_mask(VideoSize(832, 480, 81), {0})

    assert mask.shape == (1, 4, 21, 60, 104)
    assert mask[:, :, 0].eq(1).all()
    assert mask[:, :, 1:].eq(0).all()


def test_the_last_frame_marks_the_last_of_four_channels():
    mask = frame_mask(VideoSize(832, 480, 81), {0, 80})

    assert mask[0, :, -1, 0, 0].tolist() == [0, 0, 0, 1]
    assert mask.sum() == 5 * 60 * 104


def official_mask(frames: int, last: bool) -> torch.Tensor:
    """The order of operations of the official pipeline, for one latent cell."""
    mask = torch.ones(1, frames)
    mask[:, 1 : frames - 1 if last else frames] = 0
    mask = torch.cat([mask[:, :1].repeat_interleave(4, dim=1), mask[:, 1:]], dim=1)
    return mask.view(1, mask.shape[1] // 4, 4).transpose(1, 2)[0]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("frames", [5, 17, 81])
def test_the_mask_equals_the_official_order_of_operations(frames, last):
    known = {0, frames - 1} if last else {0}

    mask = frame_mask(VideoSize(16, 16, frames), known)

    assert torch.equal(mask[0, :, :, 0, 0], official_mask(frames, last))


@torch.inference_mode()
def test_the_condition_is_mask_then_the_latent_of_picture_and_grey(vae):
    first, last = torch.rand(2, 3, 16, 32) * 2 - 1
    clip = torch.zeros(1, 3, 9, 16, 32)
    clip[0, :, 0], clip[0, :, 8] = first, last

    condition = image_condition(vae, SIZE, first, last)

    assert condition.shape == (1, 20, 3, 2, 4)
    assert torch.equal(condition[:, :4], frame_mask(SIZE, {0, 8}))
    assert torch.equal(condition[:, 4:], vae.encode(clip))


def test_a_picture_of_the_right_size_is_left_alone():
    image = torch.rand(3, 16, 32)

    assert fit_image(image, 32, 16) is image


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (100, 31), (9, 200)])
def test_a_picture_of_any_size_is_covered_and_cropped_in_the_middle(rows, columns):
    image = torch.zeros(3, rows, columns)
    image[:, rows // 2 - 2 : rows // 2 + 2, columns // 2 - 2 : columns // 2 + 2] = 1

    fitted = fit_image(image, 32, 16)

    weight = fitted[0].clamp(min=0)
    centre_row = (weight.sum(1) * torch.arange(16)).sum() / weight.sum()
    centre_column = (weight.sum(0) * torch.arange(32)).sum() / weight.sum()
    assert fitted.shape == (3, 16, 32)
    assert abs(centre_row - 7.5) < 1
    assert abs(centre_column - 15.5) < 1


@pytest.mark.parametrize(
    ("variant", "takes_image", "takes_last", "has_clip", "words"),
    [
        ("t2v", True, False, False, "start image is given and this is a text-to-video model"),
        ("i2v", False, False, False, "no start image is given"),
        ("i2v", True, True, False, "takes only a first one"),
        ("a14b_i2v", True, False, True, "has no CLIP branch"),
    ],
)
def test_a_wrong_pairing_is_refused(variant, takes_image, takes_last, has_clip, words):
    with pytest.raises(RequestError, match=words):
        check_pairing(VARIANTS[variant], takes_image, takes_last, has_clip)


@pytest.mark.parametrize(
    ("variant", "takes_image", "takes_last"),
    [("t2v", False, False), ("i2v", True, False), ("flf2v", True, True), ("a14b_i2v", True, True)],
)
def test_a_right_pairing_passes(variant, takes_image, takes_last):
    check_pairing(VARIANTS[variant], takes_image, takes_last)


def test_the_last_result_is_kept_for_equal_inputs_and_forgotten_after_an_error():
    last, made = Last(), []

    def make() -> int:
        made.append(1)
        return len(made)

    ones = torch.ones(3)
    assert [last.get((ones, "a"), make), last.get((torch.ones(3), "a"), make)] == [1, 1]
    assert last.get((torch.ones(4), "a"), make) == 2
    assert last.get((None, "a"), make) == 3
    assert last.get((ones, None), make) == 4
    with pytest.raises(ZeroDivisionError):
        last.get((), lambda: 1 // 0)
    assert last.get((ones, None), make) == 5


def test_padding_keeps_the_whole_picture_between_black_bars():
    fitted = fit_image(torch.full((3, 20, 20), 0.5), 32, 16, "pad")

    assert fitted.shape == (3, 16, 32)
    assert fitted[:, :, 8:24].allclose(torch.tensor(0.5))
    assert fitted[:, :, :8].eq(-1).all() and fitted[:, :, 24:].eq(-1).all()


def test_stretching_changes_the_aspect_and_loses_nothing():
    picture = torch.linspace(-1, 1, 40).expand(3, 10, 40).contiguous()

    fitted = fit_image(picture, 16, 16, "stretch")

    assert fitted.shape == (3, 16, 16)
    assert fitted[0, 0, 0] < -0.9 and fitted[0, 0, -1] > 0.9
    with pytest.raises(RequestError, match="'squeeze' is unknown; use crop, pad, stretch"):
        fit_image(picture, 16, 16, "squeeze")


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 500), (500, 1), (7, 3)])
@pytest.mark.parametrize("how", IMAGE_FITS)
def test_every_picture_becomes_exactly_the_size(rows, columns, how):
    assert fit_image(torch.zeros(3, rows, columns), 48, 32, how).shape == (3, 32, 48)


def test_several_first_and_last_pictures_are_the_first_and_last_frames():
    first, last = torch.full((3, 3, 16, 32), 0.25), torch.full((2, 3, 16, 32), -0.5)

    clip, known = place_images(SIZE, first, last)

    assert known == {0, 1, 2, 7, 8}
    assert clip[:3].eq(0.25).all() and clip[3:7].eq(0).all() and clip[7:].eq(-0.5).all()
    with pytest.raises(RequestError, match="8 start and 2 end images do not fit into 9 frames"):
        place_images(SIZE, torch.zeros(8, 3, 16, 32), last)


RAW = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(6))


def test_an_amplitude_of_one_is_the_same_tensor():
    assert amplify_motion(RAW, {0}, 1.0) is RAW


@pytest.mark.parametrize(("known", "kept"), [({0}, [0]), ({0, 1}, [0, 1]), ({0, 8}, [0, 2])])
def test_more_motion_leaves_given_latent_frames_and_moves_the_others_apart(known, kept):
    moved = amplify_motion(RAW, known, 1.2)

    assert torch.equal(moved[:, :, kept], RAW[:, :, kept])
    for frame in {1, 2} - set(kept):
        before, after = (x[:, :, frame] - x[:, :, 0] for x in (RAW, moved))
        torch.testing.assert_close(after.mean(), before.mean())
        torch.testing.assert_close(after - after.mean(), 1.2 * (before - before.mean()))


def test_what_is_amplified_stays_between_minus_and_plus_six():
    moved = amplify_motion(20 * RAW, {0}, 1.5)

    assert moved[:, :, 1:].abs().max() == 6.0
    assert torch.equal(moved[:, :, 0], 20 * RAW[:, :, 0])


@torch.inference_mode()
def test_the_condition_keeps_given_frames_bit_for_bit_under_more_motion(vae):
    first = torch.rand(3, 16, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1

    plain, moved = (image_condition(vae, SIZE, first, motion=m) for m in (1.0, 1.15))

    assert torch.equal(moved[:, :, 0], plain[:, :, 0])
    assert not torch.equal(moved[:, :, 1:], plain[:, :, 1:])
