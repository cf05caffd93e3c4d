"""LightX2V's command lines and scripts, run with the demo model in its folders."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightx2v_core.cli import main as own_main
from lightx2v_core.infer import main
from lightx2v_core.media import read_metadata
from tests.layouts import arrange, link, wide_picture, write_config
from tests.unit.configuration.test_settings import write_lora

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").rglob("*.sh"))
SMALL_SIZE = ["--target_shape", "32", "32", "--num_frames", "5"]
LAST_LINE = re.compile(
    r"(.+): 5 frames; prompt .* s, .*sampling .* s, decode .* s; .* s/step(, peak .* GB)?"
)
LORAS = {
    "t2v": "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors",
    "i2v": "wan2.1_i2v_lora_rank64_lightx2v_4step.safetensors",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Distilled models as the documentation arranges them, and LoRAs where configurations look."""
    root = tmp_path_factory.mktemp("models")
    for task, name in (("t2v", "Wan2.1-T2V-14B"), ("i2v", "Wan2.1-I2V-14B-480P")):
        home = arrange(root / name, task)
        weights = home / "distill_models/distill_model.safetensors"
        link(weights.resolve(), home / "diffusion_pytorch_model.safetensors")
        write_lora(root / "lightx2v/Wan2.1-Distill-Loras" / LORAS[task])
    wide_picture(root / "start.png")
    return root


def documented(models: Path, task: str, config: str, output: Path) -> list[str]:
    """A command line of docs/EN/source/method_tutorials/step_distill.md and its scripts."""
    home = models / {"t2v": "Wan2.1-T2V-14B", "i2v": "Wan2.1-I2V-14B-480P"}[task]
    image = ["--image_path", str(models / "start.png")] if task == "i2v" else []
    return [
        *("--model_cls", "wan2.1_distill", "--task", task, "--model_path", str(home)),
        *("--config_json", str(ROOT / "configs/distill" / config)),
        *("--prompt", "a red circle moving right", "--negative_prompt", "镜头晃动", *image),
        *("--save_result_path", str(output)),
    ]


@pytest.mark.parametrize("ending", ["", "_lora"])
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_each_documented_command_makes_its_video(models, tmp_path, capsys, task, ending):
    output = tmp_path / "out/video.mp4"
    config = f"wan_{task}_distill_4step_cfg{ending}.json"

    code = main([*documented(models, task, config, output), *SMALL_SIZE])

    said = capsys.readouterr().out
    assert code == 0
    assert "1000.0, 937.5, 833.3, 625.0" in said
    assert LAST_LINE.fullmatch(said.splitlines()[-1])[1] == str(output)
    assert (LORAS[task] in said) == bool(ending)
    facts = read_metadata(output)
    assert (facts["seed"], facts["prompt"]) == (42, "a red circle moving right")


def test_two_commands_of_one_model_give_the_same_frames_in_either_front_door(models, tmp_path):
    config = write_config(tmp_path / "c.json", target_height=32, target_width=32)
    home, prompt = models / "Wan2.1-T2V-14B", ["--prompt", "a red circle"]
    theirs, ours = tmp_path / "theirs.mp4", tmp_path / "ours.mp4"

    main(
        [
            *("--task", "t2v", "--model_path", str(home), "--config_json", str(config)),
            *(*prompt, "--seed", "7", "--save_result_path", str(theirs)),
        ]
    )
    code = own_main(
        [
            *("generate", "--model", str(home), "--config-json", str(config), *prompt),
            *("--seed", "7", "--output", str(ours)),
        ]
    )

    assert code == 0
    assert frames(theirs) == frames(ours)


def frames(path: Path) -> bytes:
    import imageio_ffmpeg

    done = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "rawvideo", "-"],
        capture_output=True,
        check=True,
    )
    assert len(done.stdout) == 5 * 32 * 32 * 3 // 2
    return done.stdout


def test_our_own_options_win_over_the_configuration(tmp_path, capsys):
    config = write_config(tmp_path / "c.json", sample_shift=8, seed=9, fps=24)

    code = own_main(
        [
            *("generate", "--model", "demo", "--config-json", str(config), "--prompt", "x"),
            *("--steps", "2", "--shift", "3", "--output", str(tmp_path / "o.mp4"), "--dry-run"),
        ]
    )

    assert code == 0
    assert "2 steps, euler, CFG off (2 equal steps, shift 3" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sage", "magic"])
def test_an_attention_asked_for_by_name_is_refused_and_never_replaced(tmp_path, capsys, name):
    config = write_config(tmp_path / "c.json")

    code = own_main(
        [
            *("generate", "--model", "demo", "--config-json", str(config), "--prompt", "x"),
            *("--device", "cpu", "--attention", name, "--output", str(tmp_path / "o.mp4")),
        ]
    )

    assert code == 1
    assert f"error: attention '{name}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--src_video", "a.mp4"], "--src_video is for VACE models: not run here; leave it out"),
        (["--frobnicate"], "--frobnicate is not an argument of this command; there are --config_"),
        (["stray"], "stray is not an argument of this command"),
        (["--image_path", "a.png,b.png"], "names several images, and Wan takes one"),
        (["--prompt", ""], "--prompt is empty"),
        (["--save_result_path", "folder"], "must be a file that ends in .mp4"),
        (["--lora_strength", "0.5"], "1 --lora_strength and 0 --lora_path are given"),
        (["--config_json", "none.json"], "configuration none.json cannot be read"),
        (["--model_path", "nowhere"], "--model_path nowhere does not exist"),
        (["--target_shape", "30", "32", "--num_frames", "5"], "32x30 is not divisible by 16"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(models, tmp_path, capsys, extra, words):
    config = "wan_t2v_distill_4step_cfg.json"

    code = main([*documented(models, "t2v", config, tmp_path / "o.mp4"), *extra])

    printed = capsys.readouterr().err.strip().splitlines()
    assert code == 1
    assert printed[-1].startswith("error: ")
    assert words in printed[-1]


def test_torchrun_with_several_processes_is_refused(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")

    code = main(documented(models, "t2v", "wan_t2v_distill_4step_cfg.json", tmp_path / "o.mp4"))

    assert code == 1
    assert "8 processes are asked for" in capsys.readouterr().err


def test_a_model_with_a_clip_branch_names_the_clip_it_lacks(tmp_path, capsys):
    from safetensors.torch import save_file

    from lightx2v_core.wan.model import WanModel
    from tests.conftest import VARIANTS, fill

    home = arrange(tmp_path / "m", at="other/file")
    weights = fill(WanModel(VARIANTS["i2v"])).state_dict()
    save_file({k: v.contiguous() for k, v in weights.items()}, home / "i2v.safetensors")
    picture = wide_picture(tmp_path / "p.png")
    arguments = [
        *("--task", "i2v", "--model_path", str(home), "--image_path", str(picture)),
        *("--config_json", str(write_config(tmp_path / "c.json"))),
    ]

    assert main(arguments) == 1
    assert "no CLIP image encoder, which this model needs" in capsys.readouterr().err


def run_script(
    path: Path, *arguments: str, **variables: object
) -> subprocess.CompletedProcess[str]:
    names = ("lightx2v_path", "model_path", "config_json", "prompt", "image_path", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    environment |= {k: str(v) for k, v in variables.items()}
    return subprocess.run(
        ["bash", str(path), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_is_bash(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("wan/run_wan_t2v_distill_4step_cfg", "wan_t2v_distill_4step_cfg"),
        ("wan/run_wan_i2v_distill_4step_cfg", "wan_i2v_distill_4step_cfg"),
        ("wan/run_wan_t2v_distill_4step_cfg_lora", "wan_t2v_distill_4step_cfg_lora"),
        ("wan/run_wan_i2v_distill_4step_cfg_lora", "wan_i2v_distill_4step_cfg_lora"),
        ("server/start_server", "wan_t2v_distill_4step_cfg"),
    ],
)
def test_a_script_starts_the_documented_command(name, config):
    path = ROOT / "scripts" / f"{name}.sh"

    done = run_script(path, lightx2v_path=ROOT, model_path="/m", PYTHON="echo", image_path="p.png")

    module = "api_server" if "server" in name else "infer"
    task = "i2v" if "i2v" in name else "t2v"
    begins = f"-m lightx2v_core.{module} --model_cls wan2.1_distill --task {task} --model_path /m"
    assert done.stdout.startswith(begins), done.stderr
    assert f"--config_json {ROOT}/configs/distill/{config}.json" in done.stdout
    assert (done.stdout.count("\n"), done.stderr) == (1, ""), "one command, whole"
    if "server" in name:
        assert done.stdout.strip().endswith("--port 8000 --nproc_per_node 1")
    else:
        assert f"--save_result_path {ROOT}/save_results/" in done.stdout


@pytest.mark.parametrize("missing", ["lightx2v_path", "model_path"])
@pytest.mark.parametrize("path", [p for p in SCRIPTS if p.name != "base.sh"], ids=lambda p: p.stem)
def test_a_script_without_its_paths_says_so(path, missing):
    paths = {"lightx2v_path": ROOT, "model_path": "/m", "image_path": "p.png"} | {missing: ""}

    done = run_script(path, **paths, PYTHON="echo")

    assert done.returncode == 1
    assert done.stdout == ""
    assert f"Error: {missing} is not set" in done.stderr


def test_a_script_makes_a_video(models, tmp_path):
    output = tmp_path / "fox.mp4"

    done = run_script(
        ROOT / "scripts/wan/run_wan_t2v_distill_4step_cfg.sh",
        *SMALL_SIZE,
        lightx2v_path=ROOT,
        model_path=models / "Wan2.1-T2V-14B",
        PYTHON=sys.executable,
        prompt="a blue square moving up",
        save_result_path=output,
        OMP_NUM_THREADS=torch.get_num_threads(),
    )

    assert done.returncode == 0, done.stderr
    assert read_metadata(output)["prompt"] == "a blue square moving up"
