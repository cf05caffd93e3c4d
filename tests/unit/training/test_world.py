from __future__ import annotations

import pytest
import torch
from torch import Generator

from training.judge import faithful_share, judge
from training.world import COLORS, DIRECTIONS, SHAPES, UNIT, make_scene, render, sample_scenes


def test_judge_reads_every_attribute_of_rendered_clips() -> None:
    scenes = sample_scenes(48, Generator().manual_seed(11), pair_share=0.3)

    scores = judge(render(scenes, 64, 64, 5), scenes).scores()

    assert min(scores.values()) >= 99.0, scores


@pytest.mark.parametrize(("name", "least"), [("color", 70), ("shape", 70), ("direction", 60)])
def test_judge_finds_fault_with_the_clips_of_other_captions(name: str, least: float) -> None:
    scenes = sample_scenes(32, Generator().manual_seed(12), pair_share=0.0)

    scores = judge(render(scenes, 48, 48, 5), scenes[torch.arange(32).roll(1)]).scores()

    assert scores[name] < 100 - least


def test_an_empty_picture_scores_nothing() -> None:
    scenes = make_scene("red", "circle", "right")

    scores = judge(torch.zeros(1, 3, 5, 64, 64), scenes).scores()

    assert scores["count"] == 0
    assert scores["direction"] == 0


def test_whole_paths_lie_inside_the_picture() -> None:
    scenes = sample_scenes(200, Generator().manual_seed(13))

    for center in (scenes.start_BO2, scenes.start_BO2 + 16 * scenes.step_BO2):
        edge = torch.minimum(center, UNIT - center).amin(dim=-1)
        assert (edge >= scenes.radius_BO)[:, 0].all()


def test_two_objects_have_two_colors_and_never_touch() -> None:
    scenes = sample_scenes(300, Generator().manual_seed(14), pair_share=1.0)

    pairs = scenes[scenes.count_B == 2]

    assert len(pairs) > 150
    assert (pairs.color_BO[:, 0] != pairs.color_BO[:, 1]).all()
    times = torch.arange(17).view(-1, 1)
    paths = pairs.start_BO2[:, :, None] + pairs.step_BO2[:, :, None] * times
    gap = (paths[:, 0] - paths[:, 1]).norm(dim=-1).amin(dim=-1)
    assert (gap > pairs.radius_BO.sum(dim=1)).all()


def test_a_made_scene_is_what_its_words_say() -> None:
    for color, shape, direction in zip(COLORS, [*SHAPES, "star"], DIRECTIONS, strict=True):
        scenes = make_scene(color, shape, direction)

        scores = judge(render(scenes, 64, 64, 5), scenes).scores()

        assert scores["all"] == 100, (color, shape, direction, scores)


def test_first_frames_are_faithful_only_to_their_own_clip() -> None:
    clip = render(make_scene("red", "circle", "right"), 64, 64, 5)
    other = render(make_scene("red", "circle", "right", tone="light"), 64, 64, 5)

    assert faithful_share(clip, clip[:, :, 0])[0] == 100
    assert faithful_share(other, clip[:, :, 0])[0] == 0
