from __future__ import annotations

import torch
from torch import Generator

from training.reader import NOT_ASKED, attributes_of
from training.world import sample_scenes
from training.worlds import PLAIN, WIDE


def test_captions_of_one_object_are_asked_for_that_object_alone() -> None:
    names = [attribute.name for attribute in attributes_of(PLAIN)]

    assert names == ["shape", "color", "direction", "size", "speed", "tone"]


def test_captions_of_pairs_are_asked_for_both_objects_and_their_order() -> None:
    attributes = {attribute.name: attribute for attribute in attributes_of(WIDE)}
    scenes = sample_scenes(40, Generator().manual_seed(31), WIDE)

    wanted = {name: attribute.wanted(scenes) for name, attribute in attributes.items()}

    is_pair = scenes.count_B == 2
    assert is_pair.any() and not is_pair.all()
    assert torch.equal(wanted["second color"][is_pair], scenes.color_BO[is_pair, 1])
    assert (wanted["second texture"][~is_pair] == NOT_ASKED).all()
    assert torch.equal(wanted["order"], scenes.order_B)
    for name, attribute in attributes.items():
        assert NOT_ASKED <= wanted[name].min() <= wanted[name].max() < attribute.answers
