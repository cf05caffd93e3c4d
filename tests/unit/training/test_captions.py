from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Generator

from lightx2v_core.text.clean import clean_prompt
from lightx2v_core.text.tokenizer import EOS, PAD, PromptTokenizer
from training.captions import (
    COLOR_WORDS,
    DIRECTION_WORDS,
    ORDER_WORDS,
    SHAPE_WORDS,
    TEXTURE_WORDS,
    caption,
    misheard,
    plain_prompt,
    stories,
)
from training.vocabulary import CaptionRows, learn_pieces
from training.world import make_scene, sample_scenes
from training.worlds import PLAIN, WIDE, World


def told(count: int, seed: int, world: World = WIDE) -> list:
    return stories(sample_scenes(count, Generator().manual_seed(seed), world))


def test_every_caption_names_all_that_the_judge_asks() -> None:
    rng = Random(1)
    for story in told(200, seed=1):
        text = caption(story, rng).lower()

        for thing in story.things:
            for words in (
                COLOR_WORDS[thing.color],
                SHAPE_WORDS[thing.shape],
                DIRECTION_WORDS[thing.direction],
                TEXTURE_WORDS[thing.texture],
            ):
                assert any(word in text for word in words), text
        assert len(story.things) == 1 or any(word in text for word in ORDER_WORDS[story.order])


def test_the_plain_prompt_is_one_grammatical_sentence() -> None:
    (story,) = stories(make_scene("orange", "star", "up left", pattern="striped"))

    assert plain_prompt(story) == (
        "an orange star moving up and to the left on a dark striped background"
    )


def test_captions_vary() -> None:
    story, rng = told(1, seed=2)[0], Random(2)

    assert len({caption(story, rng) for _ in range(50)}) > 40


@pytest.mark.parametrize("world", [PLAIN, WIDE], ids=lambda world: world.name)
def test_captions_are_spelt_as_the_product_spells_them(world: World) -> None:
    model, rng = learn_pieces(seed=3, count=600, world=world), Random(3)
    rows = CaptionRows(model, world)
    captions = [caption(story, rng) for story in told(60, 3, world)] + [""]

    ids = rows(captions)

    product = PromptTokenizer.from_sentencepiece(model, "the learnt model")
    expected, _ = product([clean_prompt(text) for text in captions], max_length=world.text_tokens)
    assert torch.equal(ids, expected)
    assert (ids[:, -1] == PAD).all(), "a padding column stays"
    assert ids[-1].tolist() == [EOS] + [PAD] * (world.text_tokens - 1)


def test_spelling_a_caption_and_reading_it_gives_its_words_in_lower_case() -> None:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_proto=learn_pieces(seed=3, count=600))

    assert pieces.decode(pieces.encode("A Red circle moving right")) == "a red circle moving right"


def test_the_plain_prompt_says_who_passes_in_front() -> None:
    story = next(story for story in told(200, seed=5) if story.order == "in front")

    first, second = plain_prompt(story).split(" in front of ")

    assert story.things[0].color in first and story.things[1].color in second


def test_a_careless_listener_gets_the_asked_share_wrong() -> None:
    rng, truth = Random(6), told(600, seed=6)

    heard = [misheard(story, 0.4, rng) for story in truth]

    pairs = list(zip(truth, heard, strict=True))
    wrong = sum(a.things[0].color != b.things[0].color for a, b in pairs) / len(pairs)
    assert 0.28 < wrong < 0.42, "0.4 less the eighth that is right by chance"
    assert all(misheard(story, 0.0, rng) == story for story in truth)


@pytest.mark.parametrize("world", [PLAIN, WIDE], ids=lambda world: world.name)
def test_no_caption_is_too_long_for_its_row(world: World) -> None:
    rows, rng = CaptionRows(learn_pieces(seed=3, count=600, world=world), world), Random(7)

    ids = rows([caption(story, rng) for story in told(1000, 7, world)])

    assert (ids[:, -2] == PAD).all(), "the longest caption is cut"
