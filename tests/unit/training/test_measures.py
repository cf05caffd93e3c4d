from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor

from training.again import draw_again
from training.intervals import mean_interval, paired_interval
from training.judge import judge
from training.measures import (
    FEATURES,
    Reference,
    clip_features,
    clip_scores,
    first_frame_psnr,
    frechet_distance,
    mean_pair_distance,
)
from training.reporting import Made
from training.verdicts import Sums
from training.world import Scenes, render, sample_scenes
from training.worlds import PLAIN, WIDE, World

SIDE, FRAMES = 48, 5


def draws(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, dtype=torch.float64, generator=Generator().manual_seed(seed))


def whitened(points: Tensor) -> Tensor:
    """The same points with mean 0 and covariance 1, exactly."""
    centred = points - points.mean(dim=0)
    root = torch.linalg.cholesky(torch.cov(centred.T))
    return torch.linalg.solve_triangular(root, centred.T, upper=False).T


def test_a_set_is_at_no_frechet_distance_from_itself() -> None:
    points = draws(50, 6, seed=1) @ draws(6, 6, seed=2)

    assert frechet_distance(points, points) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_gaussians_is_their_closed_form() -> None:
    points = whitened(draws(400, 3, seed=3))
    scales, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 0.0, -1.0])

    distance = frechet_distance(points * scales + shift, points)

    # Diagonal covariances: squared shifts, and squared differences of deviations.
    assert distance == pytest.approx(9 + 1 + 1 + 0.25, rel=1e-6)


def test_frechet_distance_of_turned_gaussians_matches_a_general_matrix_root() -> None:
    a = draws(60, 4, seed=4) @ draws(4, 4, seed=5)
    b = draws(80, 4, seed=6) @ draws(4, 4, seed=7)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.sqrt().sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    expected = float(shift + cov_a.trace() + cov_b.trace() - 2 * roots)

    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_bears_features_that_do_not_vary_or_depend_on_each_other() -> None:
    points = draws(5, 3, seed=8)
    flat = torch.cat((points, torch.zeros(5, 1), points, points.sum(1, keepdim=True)), dim=1)

    distance = frechet_distance(flat, flat + 1.0)

    assert distance == pytest.approx(flat.shape[1], rel=1e-6)


def test_mean_pair_distance_is_over_the_clips_of_one_prompt_only() -> None:
    points = torch.tensor([[[0.0], [1.0], [2.0]], [[100.0], [100.0], [100.0]]])

    assert mean_pair_distance(points) == pytest.approx((1 + 1 + 2) / 6)
    assert math.isnan(mean_pair_distance(points[:, :1]))


def rendered(count: int = 32, seed: int = 21) -> tuple[Scenes, Tensor]:
    scenes = sample_scenes(count, Generator().manual_seed(seed))
    return scenes, render(scenes, SIDE, SIDE, FRAMES)


@pytest.fixture(scope="module")
def real() -> Reference:
    return Reference.of(clip_features(rendered(96, seed=20)[1]))


def blurred(pixels: Tensor) -> Tensor:
    flat = torch.nn.functional.avg_pool2d(pixels.flatten(0, 1), 5, stride=1, padding=2)
    return flat.unflatten(0, pixels.shape[:2])


def recoloured(pixels: Tensor) -> Tensor:
    """Whatever is coloured becomes red."""
    high, low = pixels.amax(dim=1, keepdim=True), pixels.amin(dim=1, keepdim=True)
    return torch.cat((high, low, low), dim=1)


def slowed(pixels: Tensor) -> Tensor:
    return pixels[:, :, [0, 0, 1, 1, 2]]


@pytest.mark.parametrize("worsen", [blurred, recoloured, slowed])
def test_worse_clips_are_farther_from_rendered_ones(real: Reference, worsen) -> None:
    pixels = rendered()[1]

    good, bad = (real.distance(clip_features(clips)) for clips in (pixels, worsen(pixels)))

    assert bad > 1.25 * good, (worsen.__name__, good, bad)


@pytest.mark.parametrize(
    ("worsen", "feature"),
    [(blurred, "edge width"), (recoloured, "hue y"), (slowed, "path")],
)
def test_each_fault_shows_in_its_feature(worsen, feature: str) -> None:
    pixels = rendered(12)[1]
    column = list(FEATURES).index(feature)

    before, after = (clip_features(clips)[:, column] for clips in (pixels, worsen(pixels)))

    assert (after - before).abs().mean() > FEATURES[feature]


def test_a_clip_without_objects_has_finite_features() -> None:
    features = clip_features(torch.zeros(2, 3, FRAMES, SIDE, SIDE))

    assert features.shape == (2, len(FEATURES))
    assert features.isfinite().all()


def test_seeds_that_collapse_are_less_diverse_and_the_world_is_its_own_measure(
    real: Reference,
) -> None:
    scenes, rng = sample_scenes(12, Generator().manual_seed(22)), Generator().manual_seed(23)
    clips = [clip_features(render(draw_again(scenes, rng), SIDE, SIDE, FRAMES)) for _ in range(4)]
    varied = torch.stack(clips, dim=1)
    collapsed = varied[:, :1] + 0.1 * (varied - varied[:, :1])

    whole, half, little = (real.spread(x) for x in (varied, varied[:, :2], collapsed))

    assert 0.7 < half / whole < 1.3
    assert little == pytest.approx(0.1 * whole, rel=1e-6)


@pytest.mark.parametrize("world", [replace(PLAIN, pair_share=0.3), WIDE], ids=lambda w: w.name)
def test_clips_drawn_again_are_right_for_their_caption_and_different(world: World) -> None:
    scenes = sample_scenes(24, Generator().manual_seed(24), world)

    again = draw_again(scenes, Generator().manual_seed(25), world)

    assert judge(render(again, 64, 64, FRAMES), scenes, world).scores()["all"] >= 99
    is_one = scenes.count_B == 1
    assert ((again.start_BO2 - scenes.start_BO2).norm(dim=-1)[is_one, 0] > 0).all()
    assert torch.equal(again.direction_BO, scenes.direction_BO)


def test_scores_of_clips_average_to_the_scores_of_the_set() -> None:
    scenes, pixels = rendered(24)
    verdict = judge(pixels, scenes[torch.arange(24).roll(1)])

    scores = clip_scores(verdict)

    expected = verdict.scores()
    asked = {n: v for n, v in scores.items() if not v.isnan().all()}
    assert {n: 100 * float(v.nanmean()) for n, v in asked.items()} == pytest.approx(expected)
    assert scores["all"].std() > 0, "clips differ"


def test_the_psnr_of_first_frames_is_of_each_clip() -> None:
    pixels = torch.zeros(2, 3, 2, 8, 8)
    given = torch.stack((torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.02)))

    assert first_frame_psnr(pixels, given).tolist() == pytest.approx([20.0, 40.0], abs=1e-3)


def test_intervals_of_a_mean_are_those_of_the_normal_law() -> None:
    values = whitened(draws(400, 2, seed=9))[:, :1] + 5.0

    interval = mean_interval(values)

    assert interval.value == pytest.approx(5.0)
    assert interval.low == pytest.approx(5 - 1.96 / 20, abs=0.006)
    assert interval.high == pytest.approx(5 + 1.96 / 20, abs=0.006)
    assert mean_interval(values) == interval


def test_pairing_removes_what_prompts_have_in_common() -> None:
    hard = 10 * draws(100, 1, seed=10).expand(-1, 3)

    difference = paired_interval(hard + 1.0, hard)

    assert (difference.low, difference.high) == pytest.approx((1.0, 1.0))
    assert mean_interval(hard).high - mean_interval(hard).low > 2


def test_seeds_of_one_prompt_do_not_narrow_the_interval() -> None:
    values = draws(50, 1, seed=11)

    one, three = mean_interval(values), mean_interval(values.expand(-1, 3))

    assert (three.low, three.high) == pytest.approx((one.low, one.high))


def test_rows_of_different_prompts_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match=r"\(4, 1\) and \(5, 1\)"):
        paired_interval(torch.zeros(4, 1), torch.zeros(5, 1))


def test_weights_of_prompts_give_what_measuring_their_clips_gives() -> None:
    rng = Generator().manual_seed(11)
    reference = Reference.of(2 * torch.randn(200, len(FEATURES), generator=rng) + 1)
    features = torch.randn(12, 3, len(FEATURES), generator=rng)
    made = Made({"all": torch.rand(12, 3, generator=rng)}, features, None)
    picks = torch.randint(12, (12,), generator=rng)
    weights = torch.stack([(picks == prompt).sum() for prompt in range(12)]).double()

    measured = Sums.of(made, reference).measures(weights[None], reference)[0]

    score = 100 * float(made.scores["all"][picks].mean())
    frechet = reference.distance(features[picks].flatten(0, 1))
    assert measured.tolist() == pytest.approx([score, frechet, reference.spread(features[picks])])
