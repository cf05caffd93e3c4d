from __future__ import annotations

from random import Random

import torch
from torch import Generator

from lightx2v_core.text.clean import clean_prompt
from lightx2v_core.text.tokenizer import EOS, PAD, PromptTokenizer
from training.captions import (
    COLOR_WORDS,
    DIRECTION_WORDS,
    SHAPE_WORDS,
    caption,
    plain_prompt,
    stories,
)
from training.vocabulary import TEXT_TOKENS, CaptionRows, learn_pieces
from training.world import make_scene, sample_scenes


def told(count: int, seed: int) -> list:
    return stories(sample_scenes(count, Generator().manual_seed(seed)))


def test_every_caption_names_color_shape_and_direction() -> None:
    rng = Random(1)
    for story in told(200, seed=1):
        text = caption(story, rng).lower()

        for thing in story.things:
            for words in (
                COLOR_WORDS[thing.color],
                SHAPE_WORDS[thing.shape],
                DIRECTION_WORDS[thing.direction],
            ):
                assert any(word in text for word in words), text


def test_the_plain_prompt_is_one_grammatical_sentence() -> None:
    (story,) = stories(make_scene("orange", "star", "up left", pattern="striped"))

    assert plain_prompt(story) == (
        "an orange star moving up and to the left on a dark striped background"
    )


def test_captions_vary() -> None:
    story, rng = told(1, seed=2)[0], Random(2)

    assert len({caption(story, rng) for _ in range(50)}) > 40


def test_captions_are_spelt_as_the_product_spells_them() -> None:
    model, rng = learn_pieces(seed=3, count=600), Random(3)
    rows = CaptionRows(model)
    captions = [caption(story, rng) for story in told(60, seed=3)] + [""]

    ids = rows(captions)

    product = PromptTokenizer.from_sentencepiece(model, "the learnt model")
    expected, _ = product([clean_prompt(text) for text in captions], max_length=TEXT_TOKENS)
    assert torch.equal(ids, expected)
    assert (ids[:, -1] == PAD).all(), "a padding column stays"
    assert ids[-1].tolist() == [EOS] + [PAD] * (TEXT_TOKENS - 1)


def test_spelling_a_caption_and_reading_it_gives_its_words_in_lower_case() -> None:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_proto=learn_pieces(seed=3, count=600))

    assert pieces.decode(pieces.encode("A Red circle moving right")) == "a red circle moving right"
