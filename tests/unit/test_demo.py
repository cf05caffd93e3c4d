"""The shipped demo family: whole, small enough, and able to do what its card says it can."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Generator

from lightx2v_core.assemble import find_parts, load_transformer, load_vae
from lightx2v_core.media import read_image
from lightx2v_core.pipeline import GenerateRequest, Pipeline
from lightx2v_core.presets import DEMO_FILES, DEMO_FOLDER, Overrides, demo_path
from training.captions import plain_prompt, stories
from training.judge import faithful_share, judge
from training.world import Scenes, render, sample_scenes

CPU = torch.device("cpu")


def generate(task: str, clips: int, **changes: object) -> tuple[torch.Tensor, Scenes]:
    """Clips of held-out scenes, BCFHW in [-1, 1], and the scenes."""
    pipeline = Pipeline(find_parts("demo", task), CPU)
    scenes = sample_scenes(64, Generator().manual_seed(123))[:clips]
    first = render(scenes, 128, 128, 17)[:, :, 0]
    made = []
    for index, story in enumerate(stories(scenes)):
        image = first[index] if task == "i2v" else None
        request = GenerateRequest(plain_prompt(story), image=image, seed=index)
        frames = pipeline.generate(replace(request, **changes)).frames
        made.append(frames.permute(3, 0, 1, 2).float() / 127.5 - 1)
    return torch.stack(made), scenes


@pytest.fixture(scope="module")
def told() -> tuple[torch.Tensor, Scenes]:
    """Text-to-video clips, and what was asked for."""
    return generate("t2v", 10)


def test_the_family_is_whole_and_within_thirty_megabytes():
    sizes = {part: demo_path(part).stat().st_size for part in DEMO_FILES}

    assert sum(sizes.values()) < 30_000_000
    assert (DEMO_FOLDER / "README.md").is_file()


@pytest.mark.parametrize(
    ("task", "family", "channels"), [("t2v", "wan2.1", 16), ("i2v", "wan2.2", 36)]
)
def test_a_demo_transformer_is_detected_as_what_it_is(task, family, channels):
    info = load_transformer(demo_path(task)).info

    assert (info.release, info.task, info.family) == ("demo", task, family)
    assert (info.config.in_dim, info.config.clip_tokens) == (channels, 0)


def test_the_folded_vae_gives_unit_latents_and_clear_pictures():
    vae = load_vae(demo_path("vae"))
    pixels = render(sample_scenes(3, Generator().manual_seed(5)), 128, 128, 17)

    with torch.inference_mode():
        latent = vae.encode(pixels)
        made = vae.decode(latent)

    psnr = 10 * torch.log10(4 / (made - pixels).square().mean())
    assert abs(float(latent.mean())) < 0.1
    assert 0.8 < float(latent.std()) < 1.2
    assert psnr > 29, f"{psnr:.1f} dB"


def test_words_decide_the_colour_in_four_steps(told):
    clips, scenes = told

    assert judge(clips, scenes).scores()["color"] >= 80


def test_a_picture_is_continued_in_the_direction_the_words_say():
    clips, scenes = generate("i2v", 5)
    first = render(scenes, 128, 128, 17)[:, :, 0]

    scores = judge(clips, scenes).scores()
    _, psnr = faithful_share(clips, first)

    assert (scores["color"], scores["direction"]) == (100, 100)
    assert psnr > 30, f"first frame {psnr:.1f} dB"


def test_one_step_is_blurrier_than_the_four_it_was_trained_for(told):
    trained, _ = told

    hurried, _ = generate("t2v", 3, overrides=Overrides(steps=1))

    four, one = (clips.diff(dim=-1).abs().mean() for clips in (trained[:3], hurried))
    assert one < 0.8 * four


def test_the_start_picture_is_one_of_the_demos_world():
    picture = read_image(DEMO_FOLDER / "start.png")

    assert picture.shape == (3, 128, 128)
    assert float(picture[0].max()) > 0.5 > float(picture[2].max())


def test_the_card_quotes_the_measured_scores():
    metrics = json.loads((DEMO_FOLDER / "metrics.json").read_text())
    card = (DEMO_FOLDER / "README.md").read_text()

    for task, row in (("t2v", "T2V shipped"), ("i2v", "I2V shipped")):
        line = next(line for line in card.splitlines() if row in line)
        scores = metrics[f"{task} student, 4 steps"]
        for name in ("color", "shape", "direction", "count"):
            assert f"**{scores[name]:.0f}**" in line, (row, name)
