from __future__ import annotations

from pathlib import Path

import torch
from torch import Generator

from tests.unit.training.small_family import write_family
from training.bank import caption_rows
from training.context import Context
from training.files import TEXT
from training.progress import Journal
from training.reader import NOT_ASKED, Reader, attributes_of, start_encoder
from training.sizes import SMOKE
from training.text import official_tensors, read_encoder
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


def test_what_is_asked_by_colour_is_that_of_the_object_which_has_it() -> None:
    attributes = {attribute.name: attribute for attribute in attributes_of(WIDE)}
    scenes = sample_scenes(200, Generator().manual_seed(32), WIDE)

    first = attributes["shape by colour"].wanted(scenes)
    second = attributes["second direction by colour"].wanted(scenes)

    is_pair = scenes.count_B == 2
    assert (scenes.color_BO[is_pair, 0] != scenes.color_BO[is_pair, 1]).all(), "whose shape?"
    assert torch.equal(first, scenes.shape_BO[:, 0])
    assert torch.equal(second[is_pair], scenes.direction_BO[is_pair, 1])
    assert (second[~is_pair] == NOT_ASKED).all()


def test_an_answer_by_colour_follows_the_colour_of_the_object_that_is_asked_for() -> None:
    torch.manual_seed(1)
    attributes = attributes_of(WIDE)
    reader = Reader(16, attributes)
    states, mask = torch.randn(1, 6, 16), torch.ones(1, 6, dtype=torch.bool)

    before = reader(states, mask, torch.tensor([[2, 3]]))
    after = reader(states, mask, torch.tensor([[2, 5]]))

    changed = [
        one.name
        for one, a, b in zip(attributes, before, after, strict=True)
        if not torch.equal(a, b)
    ]
    assert changed == [one.name for one in attributes if one.by_color and one.thing == 1]


def test_training_goes_on_from_the_encoder_of_an_earlier_command(tmp_path: Path) -> None:
    (tmp_path / "earlier").mkdir()
    earlier = write_family(tmp_path / "earlier")
    context = Context(
        SMOKE, tmp_path, earlier, torch.device("cpu"), 0, Journal(tmp_path), world=PLAIN
    )

    encoder = start_encoder(context, caption_rows(context))

    saved = official_tensors(read_encoder(earlier / TEXT).transformer)
    for name, tensor in official_tensors(encoder.transformer).items():
        assert torch.equal(tensor, saved[name])
    assert all(parameter.requires_grad for parameter in encoder.parameters())
