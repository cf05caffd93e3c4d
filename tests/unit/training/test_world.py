from __future__ import annotations

from dataclasses import replace
from functools import reduce

import pytest
import torch
from torch import Generator

from training.captions import plain_prompt, stories
from training.judge import faithful_share, judge
from training.outlines import SHAPES, TEXTURES
from training.places import UNIT
from training.world import Scenes, held_out, make_scene, render, sample_alike, sample_scenes
from training.worlds import COLORS, DIRECTIONS, ORDERS, PLAIN, WIDE, World


@pytest.mark.parametrize("world", [PLAIN, WIDE], ids=lambda world: world.name)
def test_judge_reads_every_attribute_of_rendered_clips(world: World) -> None:
    scenes = sample_scenes(48, Generator().manual_seed(11), world)

    scores = judge(render(scenes, 64, 64, 5), scenes, world).scores()

    assert min(scores.values()) >= 99.0, scores
    assert ("texture" in scores) == ("order" in scores) == (world is WIDE)


def test_judge_sees_which_of_two_passes_in_front() -> None:
    drawn = sample_scenes(100, Generator().manual_seed(15), WIDE)
    scenes = drawn[drawn.order_B > 0]
    swapped = replace(scenes, order_B=3 - scenes.order_B)
    pixels = render(scenes, 64, 64, 9)

    assert judge(pixels, scenes, WIDE).scores()["order"] == 100
    assert judge(pixels, swapped, WIDE).scores()["order"] == 0


@pytest.mark.parametrize("texture", TEXTURES[1:])
def test_judge_takes_a_texture_for_no_other(texture: str) -> None:
    shown = make_scene("blue", "square", "right", texture=texture)
    pixels = render(shown, 96, 96, 5)

    for other in TEXTURES[1:]:
        asked = make_scene("blue", "square", "right", texture=other)
        assert judge(pixels, asked, WIDE).scores()["texture"] == (100 if other == texture else 0)


def test_held_out_combinations_are_in_no_training_clip() -> None:
    train = sample_scenes(2000, Generator().manual_seed(16), WIDE)
    new = sample_scenes(600, Generator().manual_seed(17), WIDE, "held-out")
    everything = sample_scenes(2000, Generator().manual_seed(18), WIDE, "all")

    assert not held_out(train).any()
    assert held_out(new).all()
    single = everything[everything.count_B == 1]
    assert 0.05 < float(held_out(single).float().mean()) < 0.15
    for scenes in (train, new):
        for name, values in (("color", COLORS), ("shape", SHAPES), ("direction", DIRECTIONS)):
            assert len(getattr(scenes, f"{name}_BO")[:, 0].unique()) == len(values)


def test_the_plain_world_has_nothing_held_out() -> None:
    with pytest.raises(ValueError, match="plain world holds no combination out"):
        sample_scenes(4, Generator().manual_seed(1), PLAIN, split="held-out")


def test_clips_alike_share_all_words_and_differ_in_place() -> None:
    rng = Generator().manual_seed(19)
    drawn = sample_scenes(60, rng, WIDE)
    scene = drawn[drawn.order_B == ORDERS.index("behind")][:1]

    alike = sample_alike(scene, 20, rng, WIDE)

    assert set(map(plain_prompt, stories(alike))) == {plain_prompt(stories(scene)[0])}
    assert len(alike.start_BO2[:, 0, 0].unique()) == 20


@pytest.mark.parametrize(("name", "least"), [("color", 70), ("shape", 70), ("direction", 60)])
def test_judge_finds_fault_with_the_clips_of_other_captions(name: str, least: float) -> None:
    scenes = sample_scenes(32, Generator().manual_seed(12), PLAIN)

    scores = judge(render(scenes, 48, 48, 5), scenes[torch.arange(32).roll(1)]).scores()

    assert scores[name] < 100 - least


def test_an_empty_picture_scores_nothing() -> None:
    scenes = make_scene("red", "circle", "right")

    scores = judge(torch.zeros(1, 3, 5, 64, 64), scenes).scores()

    assert scores["count"] == 0
    assert scores["direction"] == 0


@pytest.mark.parametrize("world", [PLAIN, WIDE], ids=lambda world: world.name)
def test_whole_paths_lie_inside_the_picture(world: World) -> None:
    scenes = sample_scenes(200, Generator().manual_seed(13), world)

    for center in (scenes.start_BO2, scenes.start_BO2 + 16 * scenes.step_BO2):
        edge = torch.minimum(center, UNIT - center).amin(dim=-1)
        assert (edge >= scenes.radius_BO)[:, 0].all()


@pytest.mark.parametrize("world", [PLAIN, WIDE], ids=lambda world: world.name)
def test_two_objects_have_two_colors_and_never_touch(world: World) -> None:
    world = replace(world, pair_share=1.0, crossing_share=0.0)
    scenes = sample_scenes(300, Generator().manual_seed(14), world)

    pairs = scenes[scenes.count_B == 2]

    assert len(pairs) > 150
    assert (pairs.color_BO[:, 0] != pairs.color_BO[:, 1]).all()
    times = torch.arange(17).view(-1, 1)
    paths = pairs.start_BO2[:, :, None] + pairs.step_BO2[:, :, None] * times
    gap = (paths[:, 0] - paths[:, 1]).norm(dim=-1).amin(dim=-1)
    assert (gap > pairs.radius_BO.sum(dim=1)).all()


def test_a_made_scene_is_what_its_words_say() -> None:
    made = zip(COLORS, [*SHAPES, "star"], DIRECTIONS, strict=True)
    scenes = reduce(Scenes.join, (make_scene(*words) for words in made))
    pixels = render(scenes, 64, 64, 5)

    for world in (PLAIN, WIDE):
        scores = judge(pixels, scenes, world).scores()
        assert scores["all"] == 100, scores


def test_first_frames_are_faithful_only_to_their_own_clip() -> None:
    clip = render(make_scene("red", "circle", "right"), 64, 64, 5)
    other = render(make_scene("red", "circle", "right", tone="light"), 64, 64, 5)

    assert faithful_share(clip, clip[:, :, 0])[0] == 100
    assert faithful_share(other, clip[:, :, 0])[0] == 0
