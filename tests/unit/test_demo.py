"""The shipped demo family: whole, small enough, and able to do what its card says it can."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator

from lightx2v_core.assemble import (
    LoadedTransformer,
    find_parts,
    load_text_encoder,
    load_transformer,
    load_vae,
)
from lightx2v_core.checkpoint.detect import detect
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.cli import main
from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.read import read_lora
from lightx2v_core.media import read_image
from lightx2v_core.pipeline import GenerateRequest, Pipeline
from lightx2v_core.presets import (
    DEMO_FILES,
    DEMO_FOLDER,
    Overrides,
    demo_path,
    make_plan,
    preset_for,
)
from lightx2v_core.sampling.loop import make_noise, sample
from tests.conftest import relative_error
from training.captions import plain_prompt, stories
from training.card import ATTRIBUTES
from training.family import read_metrics, world_of
from training.judge import faithful_share, judge
from training.world import Scenes, render, sample_scenes

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
METRICS, WORLD = read_metrics(DEMO_FOLDER), world_of(DEMO_FOLDER)


def least(task: str, name: str, clips: int) -> float:
    """The quoted score, less two and a half deviations of that many clips, or one of them."""
    share = METRICS[f"{task} student, 4 steps"][name] / 100
    room = max(1 / clips, 2.5 * (share * (1 - share) / clips) ** 0.5)
    return 100 * (share - room) - 0.01


def generate(task: str, clips: int, **changes: object) -> tuple[torch.Tensor, Scenes]:
    """Clips of scenes that no training saw, BCFHW in [-1, 1], and the scenes."""
    pipeline = Pipeline(find_parts("demo", task), CPU)
    scenes = sample_scenes(64, Generator().manual_seed(123), WORLD, WORLD.exam_split)[:clips]
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
    return generate("t2v", 8)


def test_the_family_is_whole_within_thirty_megabytes_and_as_the_card_says():
    sizes = {name: demo_path(part).stat().st_size for part, name in DEMO_FILES.items()}

    card = (DEMO_FOLDER / "README.md").read_text("utf-8")
    rows = {line.split("`")[1]: line for line in card.splitlines() if line.startswith("| `demo")}
    total = sum(sizes.values())
    assert total <= 30_000_000
    assert METRICS["bytes"] == {**sizes, "all": total, "limit": 30_000_000}
    for name, size in sizes.items():
        assert rows[name].endswith(f"| {size / 1e6:.2f} |"), "training.ship writes the table"
    assert {path.name for path in DEMO_FOLDER.glob("*.safetensors")} == set(sizes)


def test_eight_bits_cost_the_judge_nothing_that_he_can_tell():
    lines = {line["sampler"]: line for line in METRICS["forms"]}

    assert {"t2v distilled, 4 steps", "i2v distilled, 4 steps"} <= set(lines)
    for name, line in lines.items():
        _, low, high = line["difference"]
        assert low <= 0.5 and high >= -0.5, f"{name}: {low} to {high} points"
        assert line["prompts"] >= 48


@pytest.mark.parametrize(
    ("task", "family", "channels"), [("t2v", "wan2.1", 16), ("i2v", "wan2.2", 36)]
)
def test_a_demo_transformer_is_detected_as_what_it_is(task, family, channels):
    info = load_transformer(demo_path(task)).info

    assert (info.release, info.task, info.family) == ("demo", task, family)
    assert (info.config.in_dim, info.config.clip_tokens) == (channels, 0)


def test_the_base_asks_for_fifty_guided_steps_and_with_a_lora_for_four():
    infos = {part: detect(open_checkpoint(demo_path(part))) for part in DEMO_FILES}

    bare = make_plan(preset_for(infos["base"]))
    shortened = make_plan(preset_for(infos["base"], [infos["lora"]]))
    two = make_plan(preset_for(infos["base"], [infos["high"], infos["low"]]), experts=2)

    assert (bare.steps, bare.cfg) == (50, 3.0)
    assert (shortened.steps, shortened.cfg) == (4, 1.0)
    assert shortened.sigmas == make_plan(preset_for(infos["t2v"])).sigmas
    assert (two.experts, two.cfg) == ((0, 0, 1, 1), 1.0)
    assert preset_for(infos["base"]).size == preset_for(infos["t2v"]).size


def test_the_command_line_finds_the_parts_beside_the_base_and_the_expert_of_each_lora(
    tmp_path, capsys
):
    base, lora, high, low = (str(demo_path(part)) for part in ("base", "lora", "high", "low"))
    common = ["generate", "--prompt", "a star", "--dry-run", "--output", str(tmp_path / "x.mp4")]

    codes = [
        main([*common, "--model", base]),
        main([*common, "--model", base, "--lora", lora, "--strict"]),
        main([*common, "--model", base, "--low-noise-model", base, "--lora", low, "--lora", high]),
    ]

    said, warned = capsys.readouterr()
    assert (codes, warned) == ([0, 0, 0], "")
    assert "50 steps, euler, CFG 3 (preset demo-base, shift 5; not distilled" in said
    assert "4 steps, euler, CFG off (preset demo-4step, shift 5; settings of the LoRA" in said
    assert "high noise: demo_high_noise_lora.safetensors: matched" in said
    assert "step 3-4, low noise" in said and "LoRA demo_low_noise_lora.safetensors 1" in said


@torch.inference_mode()
def walk(experts: list[LoadedTransformer]) -> torch.Tensor:
    """Latents of two prompts after the four distilled steps, walked by one expert or two."""
    preset = preset_for(detect(open_checkpoint(demo_path("t2v"))))
    plan = make_plan(preset, experts=len(experts))
    colors = ("red", "green")
    prompts = [f"a large {color} circle moving left on a grey background" for color in colors]
    text = load_text_encoder(demo_path("text"), dtype=torch.float32).encode(prompts)

    def denoise(x: torch.Tensor, sigma: float, step: int) -> torch.Tensor:
        return experts[plan.expert_at(step)].model(x, torch.full((2,), 1000 * sigma), text)

    rng = Generator().manual_seed(4)
    noise = torch.cat([make_noise(preset.size.latent_shape(), rng) for _ in prompts])
    return sample(denoise, noise, plan, rng)


def test_the_lora_and_the_experts_bring_the_base_to_what_the_distilled_model_makes():
    expected = walk([load_transformer(demo_path("t2v"))])
    bare = relative_error(walk([load_transformer(demo_path("base"))]), expected)

    errors = []
    for parts in (["lora"], ["high", "low"]):
        experts = [load_transformer(demo_path("base")) for _ in parts]
        for part, expert in zip(parts, experts, strict=True):
            apply_loras(expert.model, [(read_lora(demo_path(part)), 1.0)])
        errors.append(relative_error(walk(experts), expected))

    assert max(errors) < 0.95 * bare, f"{errors} of {bare}"


def test_the_folded_vae_gives_unit_latents_and_clear_pictures():
    vae = load_vae(demo_path("vae"))
    pixels = render(sample_scenes(2, Generator().manual_seed(5), WORLD), 128, 128, 17)

    with torch.inference_mode():
        latent = vae.encode(pixels)
        made = vae.decode(latent)

    psnr = 10 * torch.log10(4 / (made - pixels).square().mean())
    assert abs(float(latent.mean())) < 0.1
    assert 0.8 < float(latent.std()) < 1.2
    assert psnr > 28, f"{psnr:.1f} dB"


def test_words_decide_the_colour_in_four_steps(told):
    clips, scenes = told

    assert judge(clips, scenes, WORLD).scores()["color"] >= least("t2v", "color", 8)


def test_words_decide_shape_and_direction(told):
    clips, scenes = told

    scores = judge(clips, scenes, WORLD).scores()

    chance = {"shape": 100 / WORLD.shapes, "direction": 12.5}
    for name, share in chance.items():
        assert scores[name] >= max(least("t2v", name, 8), 2 * share), name


def test_a_picture_is_continued_in_the_direction_the_words_say():
    clips, scenes = generate("i2v", 4)
    first = render(scenes, 128, 128, 17)[:, :, 0]

    scores = judge(clips, scenes, WORLD).scores()
    _, psnr = faithful_share(clips, first)

    for name in ("color", "direction"):
        assert scores[name] >= least("i2v", name, 4), name
    quoted = METRICS["i2v student, 4 steps"]["first_frame_psnr"]
    assert psnr > quoted - 4, f"first frame {psnr:.1f} dB"


def test_one_step_is_blurrier_than_the_four_it_was_trained_for(told):
    trained, _ = told

    hurried, _ = generate("t2v", 2, overrides=Overrides(steps=1))

    four, one = (clips.diff(dim=-1).abs().mean() for clips in (trained[:2], hurried))
    assert one < 0.9 * four


def test_the_start_picture_shows_objects_in_colour_on_a_neutral_background():
    picture = read_image(DEMO_FOLDER / "start.png")

    colourful = picture.amax(dim=0) - picture.amin(dim=0) > 0.5
    assert picture.shape == (3, 128, 128)
    assert 0.02 < float(colourful.float().mean()) < 0.3
    assert not (colourful[0].any() or colourful[-1].any())


def test_what_make_demo_and_the_templates_ask_is_of_the_world_that_the_family_knows():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    asked = re.findall(r"^(?:DEMO|START)_PROMPT = (.+)$", makefile, re.MULTILINE)
    for path in sorted((ROOT / "workflows").glob("*_demo.json")):
        nodes = json.loads(path.read_text("utf-8"))["nodes"]
        texts = [n["widgets_values"][0] for n in nodes if n["type"] == "CLIPTextEncode"]
        asked += [text for text in texts if text]

    scenes = sample_scenes(400, Generator().manual_seed(9), WORLD)
    known = {word for story in stories(scenes) for word in plain_prompt(story).split()}
    assert len(asked) >= 5
    assert [prompt for prompt in asked if not set(prompt.split()) <= known] == []


def test_the_card_quotes_the_measured_scores():
    card = (DEMO_FOLDER / "README.md").read_text("utf-8")

    for task, row in (("t2v", "T2V shipped"), ("i2v", "I2V shipped")):
        line = next(line for line in card.splitlines() if row in line)
        scores = METRICS[f"{task} student, 4 steps"]
        for name in ATTRIBUTES.keys() & scores.keys():
            assert f"**{scores[name]:.0f}**" in line, (row, name)
