"""The plain world is that of the shipped models: seeds give the clips their figures rest on."""

from __future__ import annotations

from dataclasses import fields
from hashlib import sha256
from random import Random

import pytest
import torch
from torch import Generator, Tensor

from training.again import draw_again
from training.captions import caption, stories
from training.judge import judge
from training.measures import clip_features
from training.world import Scenes, render, sample_scenes

# Of the code that the shipped models were made and measured with: 64 clips after 5 others.
DRAWN = {
    "count_B": 2080.0,
    "order_B": 0.0,
    "shape_BO": 12439.0,
    "color_BO": 28591.0,
    "texture_BO": 0.0,
    "direction_BO": 19530.0,
    "speed_BO": 7888.0,
    "size_BO": 8851.0,
    "tone_B": 1528.0,
    "pattern_B": 778.0,
    "start_BO2": 2120651.4183,
    "step_BO2": -405.5218,
    "radius_BO": 135506.1163,
    "turn_BO": 58.1842,
    "grain_BO2": 0.0,
    "rgb_BO3": 38259.8603,
    "value_B": 773.7669,
    "contrast_B": 265.1633,
    "phase_B2": 4304.354,
}
# Then the same captions once more.
DRAWN_AGAIN = DRAWN | {
    "start_BO2": 2077494.2781,
    "step_BO2": -309.0013,
    "radius_BO": 134342.9367,
    "turn_BO": -66.8839,
    "rgb_BO3": 38199.7234,
    "value_B": 782.9794,
    "contrast_B": 275.2057,
    "phase_B2": 3761.296,
}
CAPTIONS = "a5628f0afdf6c675"  # start of the SHA-256 of one caption of each
PIXELS = 6839274092.7045  # of eight of them, 48 x 48 x 5
MEANS = [
    62.266148,
    77.043938,
    72.743652,
    62.427029,
    18.615555,
    0.001136,
    43.815006,
    0.211657,
    -0.338801,
    0.184666,
    0.422264,
    0.235892,
    0.567121,
    0.017407,
    0.757768,
    0.310651,
    0.129745,
    0.806248,
    1.0,
]  # of their judge features

# Of them under the captions of others, and under noise.
VERDICTS = [
    {"color": 12.5, "shape": 25.0, "direction": 18.75, "count": 100.0, "all": 39.0625},
    {"color": 39.0625, "shape": 20.3125, "direction": 21.875, "count": 0.0, "all": 20.3125},
]


def fingerprint(tensor: Tensor) -> float:
    """A sum that knows the order."""
    values = tensor.double().flatten()
    return float(values @ torch.arange(1, len(values) + 1, dtype=torch.float64))


def drawn() -> tuple[Scenes, Generator]:
    rng = Generator().manual_seed(123)
    sample_scenes(5, rng)
    return sample_scenes(64, rng), rng


def test_a_seed_gives_the_clips_it_gave_at_the_first_release() -> None:
    scenes, rng = drawn()
    again = draw_again(scenes, rng)

    for expected, made in ((DRAWN, scenes), (DRAWN_AGAIN, again)):
        found = {field.name: fingerprint(getattr(made, field.name)) for field in fields(made)}
        assert found == pytest.approx(expected, rel=1e-6, abs=2e-3)


def test_clips_are_told_in_the_words_of_the_first_release() -> None:
    words = Random(4)

    told = [caption(story, words) for story in stories(drawn()[0])]

    assert sha256("\n".join(told).encode()).hexdigest().startswith(CAPTIONS)


def test_clips_look_as_at_the_first_release_and_have_its_features() -> None:
    scenes = drawn()[0][:8]

    pixels = render(scenes, 48, 48, 5)

    assert fingerprint(pixels) == pytest.approx(PIXELS, rel=1e-6)
    assert clip_features(pixels).mean(dim=0).tolist() == pytest.approx(MEANS, rel=1e-4, abs=1e-4)


def test_the_judge_finds_what_it_found_at_the_first_release() -> None:
    scenes = drawn()[0]
    pixels = render(scenes, 48, 48, 5)
    noisy = pixels + 0.35 * torch.randn(pixels.shape, generator=Generator().manual_seed(1))

    found = [
        judge(pixels, scenes[torch.arange(64).roll(1)]).scores(),
        judge(noisy, scenes).scores(),
    ]

    assert found == VERDICTS
