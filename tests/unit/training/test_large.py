"""Distribution matching on one frozen base: what learns, from what, and what is refused."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightx2v_core.assemble import load_transformer, load_vae
from lightx2v_core.conditioning import image_condition
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.read import read_lora
from lightx2v_core.media import read_image
from lightx2v_core.presets import DEMO_FOLDER, demo_path
from lightx2v_core.wan.model import WanModel
from tests.conftest import fill
from training import conditions as conditions_module
from training.conditions import Conditions, random_conditions, read_conditions
from training.dmd import Question, critic_loss, roll_out
from training.files import save_weights
from training.large import Duel, main, make_parser, random_model
from training.sizes import SMOKE

SIZE = VideoSize(32, 32, 5)
KINDS = {"t2v": [], "i2v": ["--task", "i2v"], "i2v with CLIP": ["--task", "i2v", "--clip"]}
SMALL = ["--width", "32", "--height", "32", "--frames", "5", "--rank", "2"]


def options_of(kind: str, *more: str) -> Namespace:
    words = ["--random", "tiny", "--out", ".", *SMALL, *KINDS[kind], *more]
    options = make_parser().parse_args(words)
    options.device, options.dtype = torch.device("cpu"), torch.float32
    return options


def duel_of(kind: str, *more: str) -> tuple[Duel, Conditions]:
    torch.manual_seed(1)
    options = options_of(kind, *more)
    model = random_model(options)
    return Duel(model, options), random_conditions(model.config, SIZE)


def asked(conditions: Conditions, row: int = 0) -> Question:
    rng = torch.Generator().manual_seed(2)
    return conditions.ask(row, torch.randn(SIZE.latent_shape(), generator=rng))


def copied(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def is_as(module: nn.Module, before: list[Tensor]) -> bool:
    return all(map(torch.equal, copied(module), before))


@pytest.mark.parametrize("kind", KINDS)
def test_each_update_changes_its_own_set_and_neither_changes_the_base(kind: str) -> None:
    duel, conditions = duel_of(kind)
    empty = conditions.empty(torch.device("cpu"))
    base, student, fake = duel.model, duel.student.adapters, duel.fake.adapters
    before = copied(base), copied(student), copied(fake)

    duel.update_fake(asked(conditions), empty, 1)
    after_fake = is_as(base, before[0]), is_as(student, before[1]), is_as(fake, before[2])
    kept = copied(fake)
    duel.update_student(asked(conditions), empty, 1)
    after_student = is_as(base, before[0]), is_as(student, before[1]), is_as(fake, kept)

    assert (after_fake, after_student) == ((True, True, False), (True, False, True))
    touched = {name.split(".", 2)[2] for name in student.names}
    assert ("cross_attn.k_img" in touched) == (kind == "i2v with CLIP")
    still = [n for n, up in zip(student.names, student.up, strict=True) if not up.any()]
    assert not still, "every linear of the set has learnt"


@pytest.mark.parametrize(("part", "kind"), [("image", "i2v"), ("clip", "i2v with CLIP")])
def test_the_picture_reaches_all_three_networks(part: str, kind: str) -> None:
    duel, conditions = duel_of(kind)
    empty = conditions.empty(torch.device("cpu"))
    question, sigma = asked(conditions), torch.tensor([0.9])
    clip = question.clip_BSE
    image = question.image_BCTHW
    other_clip = clip.flip(2) if part == "clip" else clip
    other_image = image.flip(4) if part == "image" else image

    for name in ("student", "fake", "real"):
        here, there = (getattr(duel.scores(empty, c), name) for c in (clip, other_clip))
        first = here(question.noise_BCTHW, sigma, question.text, image)
        second = there(question.noise_BCTHW, sigma, question.text, other_image)
        assert (first - second).norm() > 1e-3 * first.norm(), name


def test_mask_and_latent_stand_beside_the_noise_in_every_step() -> None:
    duel, conditions = duel_of("i2v")
    question, seen = asked(conditions), []
    duel.model.patch_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    roll_out(duel.scores(question.text, None).student, question, 2, "euler", duel.rng)

    assert [x.shape[1] for x in seen] == [36, 36, 36]
    assert torch.equal(seen[0][:, :16], question.noise_BCTHW)
    assert not torch.equal(seen[1][:, :16], question.noise_BCTHW)
    for x in seen:
        assert torch.equal(x[:, 16:], question.image_BCTHW)
        assert x[:, 16:20].flatten(2).mean(dim=2).tolist() == [[0.5] * 4], "first of two frames"


def test_the_fake_score_learns_a_batch_it_sees_again_and_again() -> None:
    duel, conditions = duel_of("i2v with CLIP", "--fake-lr", "5e-3", "--rank", "8")
    question, empty = asked(conditions), conditions.empty(torch.device("cpu"))
    scores = duel.scores(empty, question.clip_BSE)
    with torch.no_grad():
        clean = roll_out(scores.student, question, 0, "euler", duel.rng)

    def loss() -> Tensor:
        return critic_loss(scores, clean, question, torch.Generator().manual_seed(3))

    losses = [duel.fake.finish(duel.model, loss()) for _ in range(12)]

    assert losses[-1] < 0.7 * losses[0], losses


@pytest.mark.parametrize("kind", KINDS)
def test_two_sets_on_one_base_learn_in_turns_and_leave_a_lora(kind: str, tmp_path: Path) -> None:
    turns = ["--critic-per-student", "1"]
    main(["--random", "tiny", "--out", str(tmp_path), *turns, *SMALL, *KINDS[kind]])

    journal = (tmp_path / "journal.jsonl").read_text("utf-8")
    assert "fake update" in journal and "student update" in journal
    torch.manual_seed(1)
    model = random_model(options_of(kind))
    lora = read_lora(tmp_path / "student_lora.safetensors")
    (report,) = apply_loras(model, [(lora, 1.0)])
    assert not report.failed
    assert lora.metadata["lightx2v.task"] == kind[:3]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conditions of two prompts with a picture, by the demo's encoders."""
    folder = tmp_path_factory.mktemp("conditions")
    start = DEMO_FOLDER / "start.png"
    lines = [{"prompt": f"a {word} circle", "image": str(start)} for word in ("red", "blue")]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", "utf-8")
    files = ["--text-encoder", str(demo_path("text")), "--vae", str(demo_path("vae"))]
    out = folder / "conditions.safetensors"
    size = SMALL[: SMALL.index("--rank")]
    words = ["--lines", str(folder / "lines.jsonl"), *files, *size, "--device", "cpu"]
    conditions_module.main([*words, "--out", str(out)])
    return out


def test_a_file_of_pictures_and_prompts_is_what_the_product_would_make_of_them(
    pictures: Path,
) -> None:
    tensors = load_file(pictures)
    image = read_image(DEMO_FOLDER / "start.png")
    with torch.inference_mode():
        expected = image_condition(load_vae(demo_path("vae")), SIZE, image)

    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "states": (2, 512, 256),
        "empty": (1, 512, 256),
        "image": (2, 20, 2, 4, 4),
    }
    torch.testing.assert_close(tensors["image"][1:].float(), expected, atol=2e-3, rtol=2e-3)
    assert not torch.equal(tensors["states"][0], tensors["states"][1])


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer file that goes with `pictures`, float16."""
    path = tmp_path_factory.mktemp("model") / "i2v.safetensors"
    config = replace(SMOKE.transformer(takes_image=True), text_dim=256)
    save_weights(path, fill(WanModel(config)).state_dict(), "i2v")
    return path


def test_an_image_model_of_a_file_is_trained_on_pictures_of_a_file(
    image_model: Path, pictures: Path, tmp_path: Path
) -> None:
    files = ["--model", str(image_model), "--conditions", str(pictures)]

    main([*files, "--out", str(tmp_path), "--critic-per-student", "1", *SMALL])

    loaded = load_transformer(image_model)
    (report,) = apply_loras(loaded.model, [(read_lora(tmp_path / "student_lora.safetensors"), 1.0)])
    assert not report.failed and report.matched == 2 * 10


def test_conditions_of_another_size_or_without_pictures_are_refused(pictures: Path) -> None:
    image = replace(SMOKE.transformer(takes_image=True), text_dim=256)
    wide = replace(SIZE, width=64)

    with pytest.raises(SystemExit, match=r"`image` is N x 20 x 2 x 4 x 4, .* 20 x 2 x 4 x 8;"):
        read_conditions(pictures, image, wide)
    with pytest.raises(SystemExit, match="`clip` is missing"):
        read_conditions(pictures, replace(image, clip_tokens=257), SIZE)

    text_alone = read_conditions(pictures, replace(image, in_dim=16), wide)
    assert text_alone.image_NCTHW is None and len(text_alone) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "x.safetensors"], "give --conditions"),
        (["--random", "tiny", "--clip"], "give --task i2v"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*words, "--out", str(tmp_path / "out")])

    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n', "line 1 lacks image"),
        ('{"prompt": "a", "image": "p.png"}\n\n{"image": \n', "line 3 is not JSON"),
        ("7\n", "line 1 lacks prompt and image"),
        ("\n", "has no line"),
    ],
)
def test_lines_that_cannot_be_encoded_are_named_before_anything_is_loaded(
    text: str, said: str, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text(text, "utf-8")
    files = ["--text-encoder", "none.safetensors", "--vae", "none.safetensors"]

    with pytest.raises(SystemExit, match=said):
        conditions_module.main(["--lines", str(lines), *files, "--out", str(tmp_path / "out")])


def test_clip_without_a_vae_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--lines", "x", "--text-encoder", "x", "--clip-vision", "x"]

    with pytest.raises(SystemExit):
        conditions_module.main([*words, "--out", str(tmp_path / "out")])

    assert "give its --vae too" in capsys.readouterr().err
