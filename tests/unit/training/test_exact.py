from __future__ import annotations

from itertools import pairwise

import torch
from torch import Generator

from training.denoising import STUDENT_SIGMAS, path_sigmas
from training.exact import ClipSet, commonness, euler, examine
from training.world import sample_alike, sample_scenes
from training.worlds import PLAIN, WIDE, World


def two_clips(distance: float) -> ClipSet:
    return ClipSet.of(torch.tensor([[0.0, 0.0], [distance, 0.0]]))


def test_the_posterior_is_that_of_the_squared_distance() -> None:
    clips = ClipSet.of(torch.randn(5, 7, generator=Generator().manual_seed(1)))
    x, sigma = torch.randn(3, 7, generator=Generator().manual_seed(2)), 0.7

    weights = clips.weights(x @ clips.clips_ND.T, sigma)

    squares = torch.cdist(x, (1 - sigma) * clips.clips_ND).square()
    torch.testing.assert_close(weights, (-squares / (2 * sigma**2)).softmax(dim=1))


def test_shares_of_noise_and_clips_walk_as_states_do() -> None:
    clips = ClipSet.of(torch.randn(6, 9, generator=Generator().manual_seed(3)))
    noise = torch.randn(2, 9, generator=Generator().manual_seed(4))

    made = euler(noise, clips, 6, STUDENT_SIGMAS)

    x = noise
    for sigma, to in pairwise(STUDENT_SIGMAS):
        clean = clips.weights(x @ clips.clips_ND.T, sigma) @ clips.clips_ND
        x = x + (to - sigma) * (x - clean) / sigma
    torch.testing.assert_close(made, x, atol=1e-5, rtol=1e-4)


def test_many_steps_end_at_a_clip_and_four_between_clips_that_are_close() -> None:
    clips = two_clips(2.0)
    noise = torch.randn(200, 2, generator=Generator().manual_seed(5))

    many, four = (euler(noise, clips, 2, sigmas) for sigmas in (path_sigmas(200), STUDENT_SIGMAS))

    between = [((x[:, 0] > 0.2) & (x[:, 0] < 1.8)).float().mean() for x in (many, four)]
    assert between[0] < 0.1
    assert between[1] > 0.3


def test_a_clip_told_wrongly_is_commoner_than_its_caption_makes_it() -> None:
    rng, world = Generator().manual_seed(6), World("careless", slip_share=0.3)
    asked = sample_scenes(1, rng, world)
    fitting = sample_alike(asked, 64, rng, world)

    common = commonness(fitting, asked, world)

    is_wrong = fitting.color_BO[:, 0] != asked.color_BO[:, 0]
    assert is_wrong.any()
    assert common[is_wrong].min() > common.min()
    assert float(common.exp().sum()) < 0.51


def test_samples_of_the_exact_denoiser_are_what_their_captions_say() -> None:
    for world in (PLAIN, WIDE):
        scores = examine(world, clips=6, prompts=4, gain=2.0)

        assert scores["truth"]["color"] >= 75
        assert scores["base, 50 steps, no cfg"]["all"] >= 75
        assert len(scores) == 4
