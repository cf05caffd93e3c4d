"""Requests through every stage, on small random files in the published folder layouts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightx2v_core import assemble
from lightx2v_core.assemble import find_parts, load_text_encoder, load_vae
from lightx2v_core.checkpoint.layouts import vae_to_diffusers
from lightx2v_core.cli import main
from lightx2v_core.conditioning import fit_image
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.errors import CapabilityError, CheckpointError, RequestError
from lightx2v_core.lora.read import read_lora
from lightx2v_core.media import contact_sheet, read_metadata, to_uint8
from lightx2v_core.ops.attention import sdpa
from lightx2v_core.pipeline import GenerateRequest, Pipeline
from lightx2v_core.presets import Overrides
from lightx2v_core.wan.model import WanModel
from lightx2v_core.wan.tae import TinyConfig, TinyVae
from lightx2v_core.wan.vae import VaeConfig, WanVae
from tests.conftest import VARIANTS, fill, tiny_model
from tests.unit.text.samples import (
    hugging_face_tensors,
    official_tensors,
    spiece_model,
    spiece_tensor,
)

SIZE = VideoSize(32, 16, 5)
CPU = torch.device("cpu")


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


def umt5_tensors(dim: int) -> dict[str, torch.Tensor]:
    return official_tensors(dim=dim) | {"spiece_model": spiece_tensor()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """t2v/ and a14b/ beside one text encoder and one VAE, under their published names."""
    root = tmp_path_factory.mktemp("models")
    write(root / "umt5_xxl_fp16.safetensors", umt5_tensors(64))
    write(root / "wan_2.1_vae.safetensors", fill(WanVae(VaeConfig(8, 8))).state_dict())
    tiny = TinyVae(TinyConfig("taew2_1", (16, 8, 8, 8), 8))
    write(root / "vae_approx/taew2_1.safetensors", fill(tiny).state_dict())
    write(root / "t2v/wan2.1_t2v_lightx2v_4step.safetensors", tiny_model("t2v").state_dict())
    for expert, scale in (("high", 1.0), ("low", 0.5)):
        weights = {k: v * scale for k, v in tiny_model("a14b_i2v").state_dict().items()}
        write(root / f"a14b/{expert}_noise_model/lightx2v_4step.safetensors", weights)
    contact_sheet([("", torch.randint(0, 255, (1, 40, 60, 3), dtype=torch.uint8))], root / "p.png")
    return root


@pytest.fixture(scope="module")
def t2v(models: Path) -> Pipeline:
    return Pipeline(find_parts(str(models / "t2v"), "t2v"), CPU)


@pytest.fixture(scope="module")
def experts(models: Path) -> Pipeline:
    return Pipeline(find_parts(str(models / "a14b"), "i2v"), CPU)


def request(**changes: object) -> GenerateRequest:
    return replace(GenerateRequest("a red circle", size=SIZE, seed=3), **changes)


def test_words_become_frames_of_the_size_asked_for(t2v):
    seen = []

    result = t2v.generate(request(), lambda *event: seen.append(event))

    assert result.frames.shape == (5, 16, 32, 3)
    assert result.frames.dtype == torch.uint8
    assert [e for e in seen if e[0] == "sampling"] == [("sampling", n, 4) for n in (1, 2, 3, 4)]
    assert [stage for stage, done, total in seen if done == total] == ["text", "sampling", "decode"]


def test_a_seed_repeats_and_another_differs(t2v):
    first, again, other = (t2v.generate(request(seed=s)).frames for s in (1, 1, 2))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.fixture
def encoded(models: Path) -> Callable[..., set[str]]:
    """Which encoders one request after the other runs."""
    pipeline = Pipeline(find_parts(str(models / "a14b"), "i2v"), CPU)
    counted = []
    for name, part in (("text", pipeline.text.transformer), ("vae", pipeline.vae.conv1)):
        part.register_forward_hook(lambda *_, name=name: counted.append(name))

    def run(**changes: object) -> set[str]:
        counted.clear()
        pipeline.generate(request(**changes))
        return set(counted)

    return run


def test_a_second_prompt_encodes_text_alone_and_the_same_request_nothing(encoded):
    image = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first = encoded(image=image)

    assert first == {"text", "vae"}
    assert encoded(image=image.clone(), seed=9) == set(), "equal values are the same picture"
    assert encoded(image=image, prompt="a blue one") == {"text"}
    assert encoded(image=-image, prompt="a blue one") == {"vae"}
    assert encoded(image=image, prompt="a blue one", size=VideoSize(48, 16, 5)) == {"vae"}


def test_pictures_are_encoded_again_for_what_changes_them_and_for_nothing_else(
    encoded, monkeypatch
):
    monkeypatch.setattr("lightx2v_core.pipeline.find_warnings", lambda *_: ())  # of the small size
    image = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0)) * 2 - 1
    others = {
        **{"prompt": "a blue one", "negative_prompt": "blur", "seed": 9, "strict": True},
        **{"overrides": Overrides(steps=3), "size_fit": "crop"},
    }
    of_images = {
        **{"image": -image, "last_image": image, "size": VideoSize(48, 16, 5)},
        **{"fit": partial(fit_image, how="pad"), "motion": 1.1},
    }
    assert {*others, *of_images} == {field.name for field in fields(GenerateRequest)}
    asked = {"image": image, "overrides": Overrides(steps=2)}
    encoded(**asked)

    assert "vae" not in encoded(**asked | others)
    for name, value in of_images.items():
        asked[name] = value
        assert "vae" in encoded(**asked), name


def test_guidance_of_one_calls_the_model_once_a_step_and_more_twice(t2v):
    calls = []
    handle = t2v.experts[0].model.register_forward_hook(lambda *_: calls.append(1))
    t2v.generate(request())
    once = len(calls)
    t2v.generate(request(overrides=Overrides(cfg=2.0), negative_prompt="blur"))
    handle.remove()

    assert (once, len(calls) - once) == (4, 8)


def test_two_experts_run_their_own_steps(experts):
    calls = []
    handles = [
        e.model.register_forward_hook(lambda *_, index=i: calls.append(index))
        for i, e in enumerate(experts.experts)
    ]
    image = torch.rand(3, 40, 60) * 2 - 1
    experts.generate(request(image=image))
    for handle in handles:
        handle.remove()

    assert [e.info.expert for e in experts.experts] == ["high", "low"]
    assert calls == [0, 0, 1, 1]
    assert all(e.residency.loaded_bytes == 0 for e in experts.experts), "nothing stays placed"


def test_two_experts_of_the_same_weights_equal_one_model_bit_for_bit(models):
    parts = find_parts(str(models / "t2v"), "t2v")
    pair = Pipeline(replace(parts, low=parts.transformer), CPU)

    one = Pipeline(parts, CPU).generate(request())
    two = pair.generate(request())

    assert two.plan.experts == (0, 0, 1, 1)
    assert torch.equal(one.frames, two.frames)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": VideoSize(30, 16, 5)}, "30x16 is not divisible by 16; use 32x16"),
        ({"size": VideoSize(32, 16, 4)}, r"4 frames is not 4\*n \+ 1; use 5"),
        ({"image": torch.zeros(3, 16, 32)}, "start image is given and this is a text-to-video"),
        ({"overrides": Overrides(steps=0)}, "0 steps asked for"),
    ],
)
def test_a_wrong_request_is_refused_before_any_stage(t2v, changes, words):
    seen = []

    with pytest.raises(RequestError, match=words):
        t2v.generate(request(**changes), lambda *event: seen.append(event))

    assert seen == []


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_any_size_and_length_comes_back_exactly_where_that_is_asked(t2v, fit):
    asked = VideoSize(33, 17, 6)

    result = t2v.generate(request(size=asked, size_fit=fit))

    assert result.frames.shape == (6, 17, 33, 3)
    assert result.size == asked


def test_guidance_for_each_step_costs_a_second_forward_only_where_it_is_on(t2v):
    calls = []
    handle = t2v.experts[0].model.register_forward_hook(lambda *_: calls.append(1))

    t2v.generate(request(overrides=Overrides(cfgs=(3.5, 1, 1, 1)), negative_prompt="blur"))
    handle.remove()

    assert len(calls) == 5


def test_strict_makes_an_error_of_a_warning_before_any_stage(t2v):
    seen, asked = [], request(overrides=Overrides(steps=2), strict=True)

    with pytest.raises(RequestError, match="strict is on: steps: 2 steps on a model distilled for"):
        t2v.generate(asked, lambda *event: seen.append(event))

    assert seen == []


def test_a_fast_row_that_overflows_is_replaced_by_the_plain_one_in_the_same_run(t2v, caplog):
    def overflowing(q, k, v):
        return sdpa(q, k, v) * float("inf")

    model, expected = t2v.experts[0].model, t2v.generate(request()).frames
    model.attend = overflowing

    result = t2v.generate(request())

    assert torch.equal(result.frames, expected)
    assert model.attend is sdpa
    assert "once more with the plain rows" in caplog.text


def test_more_motion_and_several_start_pictures_change_the_video(experts):
    picture = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(9)) * 2 - 1

    plain = experts.generate(request(image=picture, motion=1.0)).frames
    moved = experts.generate(request(image=picture, motion=1.5)).frames
    two = experts.generate(request(image=torch.stack((picture, -picture)))).frames

    assert torch.equal(plain, experts.generate(request(image=picture)).frames)
    assert not torch.equal(moved, plain)
    assert not torch.equal(two, plain)


def test_an_image_model_without_a_picture_is_refused(experts):
    with pytest.raises(RequestError, match="no start image is given"):
        experts.generate(request())


@pytest.mark.parametrize("stopped", [("text", 1), ("image", 1), ("sampling", 2), ("decode", 1)])
def test_a_cancel_in_any_stage_leaves_the_pipeline_usable(experts, tmp_path, stopped):
    def cancel(stage: str, done: int, total: int) -> None:
        if (stage, done) == stopped:
            raise KeyboardInterrupt

    asked = request(image=torch.zeros(3, 16, 32))
    expected = experts.generate(asked).frames
    other = replace(asked, image=torch.ones(3, 16, 32))  # nothing of it is known yet
    with pytest.raises(KeyboardInterrupt):
        experts.generate(other, cancel, tmp_path / "a.latent")

    assert all(expert.residency.device is None for expert in experts.experts)
    assert torch.equal(experts.generate(asked).frames, expected)
    assert list(tmp_path.iterdir()) == []


def test_a_text_encoder_of_another_width_is_refused(models, tmp_path):
    narrow = write(tmp_path / "umt5.safetensors", umt5_tensors(32))
    parts = replace(find_parts(str(models / "t2v"), "t2v"), text=narrow)

    with pytest.raises(RequestError, match="32 wide and this model needs 64"):
        Pipeline(parts, CPU)


def test_experts_of_two_kinds_are_refused(models):
    parts = find_parts(str(models / "a14b"), "i2v")
    t2v_file = models / "t2v/wan2.1_t2v_lightx2v_4step.safetensors"

    with pytest.raises(RequestError, match="the two experts are of different kinds"):
        Pipeline(replace(parts, low=t2v_file), CPU)


def test_a_clip_model_gets_its_features_only_where_it_has_the_branch(models, tmp_path):
    file = write(tmp_path / "i2v.safetensors", fill(WanModel(VARIANTS["i2v"])).state_dict())
    parts = replace(find_parts(str(models / "t2v"), "t2v"), transformer=file)

    result = Pipeline(parts, CPU).generate(request(image=torch.zeros(3, 16, 32)))

    assert result.frames.shape == (5, 16, 32, 3)


def test_a_vae_in_diffusers_names_is_the_same_vae(models, tmp_path):
    official = load_vae(models / "wan_2.1_vae.safetensors")
    renamed = {vae_to_diffusers(k): v for k, v in official.state_dict().items()}
    folder = write(tmp_path / "vae/diffusion_pytorch_model.safetensors", renamed).parent

    loaded = load_vae(folder)

    assert all(torch.equal(v, official.state_dict()[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("part", ["vae", "tae"])
def test_a_tiny_vae_decodes_what_was_sampled(models, t2v, monkeypatch, part):
    tiny = models / "vae_approx/taew2_1.safetensors"
    parts = find_parts(str(models / "t2v"), "t2v", given={part: tiny})
    pipeline, sampled = Pipeline(parts, CPU), []
    decode = pipeline.decoder.decode
    monkeypatch.setattr(
        pipeline.decoder, "decode", lambda x, *a, **k: sampled.append(x) or decode(x, *a, **k)
    )

    result = pipeline.generate(request())

    expected = load_vae(tiny).decode(sampled[0])
    assert torch.equal(result.frames, to_uint8(expected[0]))
    assert not torch.equal(result.frames, t2v.generate(request()).frames)


def test_a_start_image_is_encoded_by_the_real_vae_and_never_by_a_tiny_one(models):
    tiny = models / "vae_approx/taew2_1.safetensors"
    image = torch.rand(3, 16, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1
    a14b, seen = str(models / "a14b"), []
    both = Pipeline(find_parts(a14b, "i2v", given={"tae": tiny}), CPU)
    alone = Pipeline(find_parts(a14b, "i2v", given={"vae": tiny}), CPU)

    with pytest.raises(RequestError, match=r"must be encoded by the real VAE"):
        alone.generate(request(image=image), lambda *event: seen.append(event))

    assert not seen
    assert both.generate(request(image=image)).frames.shape == (5, 16, 32, 3)


def test_a_hugging_face_folder_of_shards_is_a_text_encoder(models, tmp_path):
    tensors = hugging_face_tensors(dim=64)
    names = sorted(tensors)
    weight_map = {}
    for part in range(2):
        file = f"model-{part + 1:05}-of-00002.safetensors"
        write(tmp_path / "text_encoder" / file, {k: tensors[k] for k in names[part::2]})
        weight_map |= dict.fromkeys(names[part::2], file)
    index = tmp_path / "text_encoder/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/spiece.model").write_bytes(spiece_model())

    from_folder = load_text_encoder(tmp_path / "text_encoder").encode(["a red fox"])
    from_file = load_text_encoder(models / "umt5_xxl_fp16.safetensors").encode(["a red fox"])

    assert torch.equal(from_folder, from_file)


def test_a_text_encoder_without_its_tokenizer_is_refused(tmp_path):
    file = write(tmp_path / "alone/umt5.safetensors", official_tensors(dim=64))

    with pytest.raises(CheckpointError, match=r"no UMT5 tokenizer for umt5\.safetensors"):
        load_text_encoder(file)


def test_a_transformer_given_as_text_encoder_is_named(models):
    with pytest.raises(CheckpointError, match="is a Wan transformer, not a UMT5 text encoder"):
        load_text_encoder(next((models / "t2v").glob("*.safetensors")))


def test_a_broken_transformers_package_is_a_sentence_with_its_cause(models, monkeypatch):
    def broken(*_arguments: object) -> None:
        raise ModuleNotFoundError("no module") from RuntimeError("TorchAudio of another PyTorch")

    monkeypatch.setattr(assemble, "build_text_encoder", broken)

    with pytest.raises(CapabilityError, match=r"transformers, .* \(TorchAudio of another PyTorch"):
        load_text_encoder(models / "umt5_xxl_fp16.safetensors")


def test_a_missing_part_says_where_it_was_searched_and_how_to_name_it(tmp_path):
    file = write(tmp_path / "m.safetensors", tiny_model().state_dict())

    with pytest.raises(
        CheckpointError, match=r"no vae file .* wan_2\.1_vae\.safetensors; .* --vae"
    ):
        find_parts(str(file), "t2v")


def generate_arguments(models: Path, output: Path, *more: str) -> list[str]:
    size = ["--width", "32", "--height", "16", "--frames", "5", "--device", "cpu"]
    return [
        *("generate", "--model", str(models / "t2v"), "--prompt", "a red circle", "--seed", "3"),
        *size,
        *("--output", str(output)),
        *more,
    ]


def test_the_command_line_writes_a_video_that_says_how_it_was_made(models, tmp_path, capsys):
    output, sheet = tmp_path / "new" / "a.mp4", tmp_path / "a.png"

    code = main(generate_arguments(models, output, "--contact-sheet", str(sheet)))

    told, metadata = capsys.readouterr().out, read_metadata(output)
    assert code == 0
    assert "4 steps, euler, CFG off" in told
    last = re.fullmatch(r"(.+): 5 frames; prompt .* s, .* s; .* s/step", told.splitlines()[-1])
    assert last[1] == str(output)
    assert (metadata["prompt"], metadata["seed"]) == ("a red circle", 3)
    assert "sigma 1.0000 → 0.9375" in metadata["plan"]
    assert sheet.is_file()


def test_a_video_that_its_folder_does_not_take_is_kept_elsewhere_and_named(
    models, tmp_path, capsys, caplog, monkeypatch
):
    (tmp_path / "blocked").write_text("a file where a folder should be")
    output = tmp_path / "blocked" / "a.mp4"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary" / "lightx2v").mkdir(parents=True)
    (tmp_path / "temporary" / "lightx2v" / "a.mp4").write_text("rescued before")

    code = main(generate_arguments(models, output))

    kept = tmp_path / "temporary" / "lightx2v" / "a-2.mp4"
    assert code == 0 and read_metadata(kept)["seed"] == 3
    assert f"{kept}: 5 frames" in capsys.readouterr().out
    assert "a.mp4 could not be written ([Errno" in caplog.text
    assert f"it is kept as {kept}" in caplog.text


def test_a_dry_run_prints_the_plan_and_makes_nothing(models, tmp_path, capsys):
    code = main(generate_arguments(models, tmp_path / "a.mp4", "--dry-run", "--steps", "2"))

    assert code == 0
    assert "2 equal steps, shift 5" in capsys.readouterr().out
    assert not (tmp_path / "a.mp4").exists()


def test_the_command_line_takes_any_size_lists_by_step_and_strict(models, tmp_path, capsys):
    output = tmp_path / "a.mp4"
    arguments = generate_arguments(models, output, "--cfg", "3.5,1,1,1", "--shift", "8,8,5,5")
    arguments[arguments.index("--width") + 1] = "33"

    codes = [main(arguments), main([*arguments, "--strict"])]

    told = capsys.readouterr()
    assert codes == [0, 1]
    assert "33x16, 5 frames does not fit Wan" in told.out
    assert "33x16 has an odd side, padded to 34x16 for mp4" in told.out
    assert "CFG 3.5, 1, 1, 1" in told.out and "warning: shift: shift 8, 8, 5, 5" in told.out
    assert told.err.startswith("error: strict is on: shift: ")


def test_a_lora_changes_the_video_and_is_told(models, tmp_path, capsys, experts):
    layer = "diffusion_model.blocks.0.ffn.0"
    pair = {
        f"{layer}.lora_up.weight": torch.ones(512, 2),
        f"{layer}.lora_down.weight": torch.ones(2, 256),
    }
    file = write(tmp_path / "style_high_noise.safetensors", pair)
    plain, styled = tmp_path / "a.mp4", tmp_path / "b.mp4"

    main(generate_arguments(models, plain))
    code = main(generate_arguments(models, styled, "--lora", f"{file}:0.5"))

    assert code == 0
    assert "matched 1/1, rank 2, effective strength 0.5 x 1" in capsys.readouterr().out
    assert plain.read_bytes() != styled.read_bytes()
    assert experts.set_loras([(file, 1.0)])[0].startswith("high noise: style_high_noise")
    assert experts.set_loras([]) == []


def one_layer(name: str = "diffusion_model.blocks.0.ffn.0") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        f"{name}.lora_up.weight": torch.randn(512, 2, generator=generator),
        f"{name}.lora_down.weight": torch.randn(2, 256, generator=generator),
    }


def test_strengths_for_each_step_equal_two_experts_of_which_one_has_the_lora(models, tmp_path):
    low = tmp_path / "low_noise_t2v.safetensors"
    low.write_bytes(next((models / "t2v").glob("*.safetensors")).read_bytes())
    parts = find_parts(str(models / "t2v"), "t2v")
    one, two = Pipeline(parts, CPU), Pipeline(replace(parts, low=low), CPU)
    style = write(tmp_path / "style.safetensors", one_layer())
    first = write(tmp_path / "wan2.2_high_noise.safetensors", one_layer())

    one.set_loras([(style, (0.5, 0.5, 0.0, 0.0))])
    two.set_loras([(first, 0.5)])

    frames = one.generate(request()).frames
    assert torch.equal(frames, two.generate(request()).frames)
    one.set_loras([])
    assert not torch.equal(frames, one.generate(request()).frames)


def test_trying_strengths_reads_the_lora_once_and_a_new_file_again(t2v, tmp_path, monkeypatch):
    file, reads = write(tmp_path / "style.safetensors", one_layer()), []

    def counting(path: Path) -> object:
        reads.append(path)
        return read_lora(path)

    monkeypatch.setattr("lightx2v_core.adapters.read_lora", counting)
    for step in range(10):
        t2v.set_loras([(file, step / 10)])
    assert len(reads) == 1
    write(file, one_layer("diffusion_model.blocks.1.ffn.0"))
    t2v.set_loras([(file, 1.0)])
    t2v.set_loras([])
    t2v.set_loras([(file, 1.0)])

    assert len(reads) == 3, "a changed file, and one that was taken off, are read"
    t2v.set_loras([])


def test_the_command_line_takes_a_list_of_strengths_and_merges(models, tmp_path, capsys):
    file = write(tmp_path / "style.safetensors", one_layer())
    videos = [tmp_path / f"{n}.mp4" for n in range(3)]

    for video, more in zip(
        videos,
        (
            ["--lora", f"{file}:0.5"],
            ["--lora", f"{file}:0.5,0.5,0.5,0.5"],
            ["--lora", f"{file}:0.5", "--lora-merge"],
        ),
        strict=True,
    ):
        assert main(generate_arguments(models, video, *more)) == 0

    told = capsys.readouterr().out
    assert "effective strength by step 0.5, 0.5, 0.5, 0.5 x 1" in told
    assert "effective strength 0.5 x 1, merged" in told
    assert "warning: " not in told.replace("warning: size: ", "")
    kept = [read_metadata(video)["lora"] for video in videos]
    assert kept[1] == [f"{file}:0.5,0.5,0.5,0.5"]


def test_weights_become_codes_while_loading_where_that_is_asked(models, tmp_path, capsys):
    asked = ("--quant", "int8", "--matmul", "int8", "--dry-run")

    code = main(generate_arguments(models, tmp_path / "a.mp4", *asked))

    assert code == 0
    assert re.search(r"; quantised to int8: [\d.]+ GB; matmul: int8\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--lora", "{lora}:1,0"], "has 2 strengths and the run has 4 steps"),
        (["--lora", "{lora}:1,0", "--dry-run"], "has 2 strengths and the run has 4 steps"),
        (["--lora", "{lora}:1,0,0,0", "--lora-merge"], "which cannot be merged"),
        (["--lora", "{lora}:1,,0"], "are not numbers with commas between them"),
    ],
)
def test_strengths_that_do_not_fit_end_in_one_sentence(models, tmp_path, capsys, more, words):
    file = write(tmp_path / "style.safetensors", one_layer())

    code = main(
        generate_arguments(models, tmp_path / "a.mp4", *(m.format(lora=file) for m in more))
    )

    assert code == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--lora-merge"], "--lora-merge is given without a LoRA"),
        (["--matmul", "fp8-row"], "multiplies 8-bit weights and this model has none"),
        (["--quant", "fp8", "--matmul", "int8"], "these are float8_e4m3fn; use auto"),
        (["--lora", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["--output", "a.gif"], "must end in .mp4"),
        (["--task", "i2v"], "needs a start image; add --image FILE"),
        (["--image", "p.png"], "use --task i2v"),
        (["--model", "demo", "--tae", "taew2_1.pth"], "the demo model has latents of its own"),
        (["--model", "nowhere"], "model nowhere does not exist"),
        (["--attention", "magic"], "attention 'magic' is unknown"),
        (["--device", "cuda:9"], "PyTorch sees no GPU"),
    ],
)
def test_a_wrong_command_ends_with_one_sentence_and_code_one(models, tmp_path, capsys, more, words):
    if more[0] == "--device" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")

    code = main(generate_arguments(models, tmp_path / "a.mp4", *more))

    assert code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error
    assert len(error.strip().splitlines()) == 1


def test_inspect_prints_the_documented_fields(models, capsys):
    file = next((models / "t2v").glob("*.safetensors"))

    code = main(["inspect", str(file), "--json"])

    fields = json.loads(capsys.readouterr().out)
    assert code == 0
    wanted = {"family", "task", "expert", "size", "layout", "scheme", "release", "preset", "bytes"}
    assert wanted <= fields.keys()
    assert (fields["task"], fields["scheme"], fields["runs"]) == ("t2v", "fp32", True)
    assert fields["release"] == "unknown", "the published file of this name is larger"


def test_inspect_tells_a_vae_from_a_transformer(models, capsys):
    code = main(["inspect", str(models / "wan_2.1_vae.safetensors")])

    told = capsys.readouterr().out
    assert code == 0
    assert "wan_2.1_vae.safetensors: vae, wan2.1, wan_2.1_vae, fp32" in told
    assert "this version: loads it with Load VAE" in told


def test_the_command_line_decodes_with_a_tiny_vae_and_inspect_names_it(models, tmp_path, capsys):
    tiny, output = models / "vae_approx/taew2_1.safetensors", tmp_path / "a.mp4"

    codes = [
        main(generate_arguments(models, output, "--vae", str(tiny))),
        main(["inspect", str(tiny)]),
    ]

    assert codes == [0, 0]
    told = capsys.readouterr().out
    assert "5 frames" in told
    assert "taew2_1.safetensors: vae, wan2.1, taew2_1, fp32" in told
    assert output.is_file()
