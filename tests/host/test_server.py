"""Whole workflows in a running ComfyUI: videos, progress, previews, interrupt, caching, errors."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
from pathlib import Path

import imageio_ffmpeg
import pytest

pytestmark = pytest.mark.host

EXPERT = "wan2.2_i2v_A14b_{}_noise_lightx2v_4step.safetensors"
CHOICES = {"quantisation": "keep", "attention": "auto", "memory": "auto"}
SIZE = {"width": 64, "height": 64, "frames": 9}
PAINTED = {
    "background": ("EmptyImage", {"width": 64, "height": 64, "batch_size": 1, "color": 0x202020}),
    "square": ("EmptyImage", {"width": 24, "height": 24, "batch_size": 1, "color": 0xFF2020}),
}


def loader(file: str) -> dict:
    return {"class_type": "LightX2VLoadModel", "inputs": {"file": file, **CHOICES}}


def text_to_video(seed: int = 1, prefix: str = "t2v", **sampler: object) -> dict:
    """API form: our loaders, native CLIPTextEncode, our sampler and decoder, native video nodes."""
    schedule = {"schedule": "auto", "split": "auto", "solver": "euler", "cfg": 1.0}
    return {
        "model": loader("t2v.safetensors"),
        "clip": {"class_type": "LightX2VLoadTextEncoder", "inputs": {"file": "umt5.safetensors"}},
        "vae": {"class_type": "LightX2VLoadVae", "inputs": {"file": "vae.safetensors"}},
        "positive": {
            "class_type": "CLIPTextEncode",
            "inputs": {"clip": ["clip", 0], "text": "a red circle moving right"},
        },
        "latent": {"class_type": "LightX2VEmptyVideoLatent", "inputs": dict(SIZE)},
        "sampler": {
            "class_type": "LightX2VDistillSampler",
            "inputs": {
                "model": ["model", 0],
                "positive": ["positive", 0],
                "latent": ["latent", 0],
                "seed": seed,
                **schedule,
                **sampler,
            },
        },
        "decode": {
            "class_type": "LightX2VDecodeVideo",
            "inputs": {"latent": ["sampler", 0], "vae": ["vae", 0]},
        },
        "video": {"class_type": "CreateVideo", "inputs": {"images": ["decode", 0], "fps": 16}},
        "save": {
            "class_type": "SaveVideo",
            "inputs": {
                "video": ["video", 0],
                "filename_prefix": prefix,
                "format": "auto",
                "codec": "auto",
            },
        },
    }


def image_to_video(prefix: str = "i2v") -> dict:
    """Both experts, and a start picture painted by native nodes."""
    prompt = text_to_video(prefix=prefix)
    prompt |= {name: {"class_type": kind, "inputs": i} for name, (kind, i) in PAINTED.items()}
    prompt["picture"] = {
        "class_type": "ImageCompositeMasked",
        "inputs": {
            **{"destination": ["background", 0], "source": ["square", 0]},
            **{"x": 8, "y": 20, "resize_source": False},
        },
    }
    prompt["model"] = loader(EXPERT.format("high"))
    prompt["low"] = loader(EXPERT.format("low"))
    prompt["latent"] = {
        "class_type": "LightX2VImageToVideo",
        "inputs": {
            **{"positive": ["positive", 0], "vae": ["vae", 0], "start_image": ["picture", 0]},
            **SIZE,
        },
    }
    prompt["sampler"]["inputs"] |= {
        "model_low_noise": ["low", 0],
        "positive": ["latent", 0],
        "negative": ["latent", 1],
        "latent": ["latent", 2],
    }
    return prompt


def video_of(server, run) -> str:
    saved = run.outputs["save"]["images"][0]
    path = Path(server.folder) / "output" / saved["subfolder"] / saved["filename"]
    assert path.suffix == ".mp4"
    return str(path)


def frames_of(server, run) -> int:
    return imageio_ffmpeg.count_frames_and_secs(video_of(server, run))[0]


def pixels_of(server, run) -> bytes:
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    command = [ffmpeg, "-v", "error", "-i", video_of(server, run), "-f", "rawvideo", "-"]
    return subprocess.run(command, capture_output=True, check=True).stdout


def test_the_log_shows_a_clean_import(server):
    ours = [line for line in server.text().splitlines() if "lightx2v" in line.lower()]

    assert any("seconds: " in line for line in ours)
    assert not [line for line in ours if "IMPORT FAILED" in line or "left out" in line]
    assert not [line for line in ours if "Error while calling comfy_entrypoint" in line]


def test_every_node_is_offered_with_its_help_page(server):
    info = json.loads(server.get("/object_info"))
    ours = {name: about for name, about in info.items() if name.startswith("LightX2V")}

    pages = Path(__file__).parents[2] / "web/docs"
    assert ours.keys() == {page.stem for page in pages.glob("*.md")}
    for name, about in ours.items():
        assert about["python_module"] == "custom_nodes.lightx2v-distill"
        page = server.get(f"/extensions/lightx2v-distill/docs/{name}.md").decode()
        assert len(page) > 200, name


def test_the_chinese_texts_and_help_pages_are_handed_out(server):
    chinese = json.loads(server.get("/i18n"))["zh"]

    load = chinese["nodeDefs"]["LightX2VLoadModel"]
    assert load["display_name"] == "加载 Wan 模型 (LightX2V)"
    assert load["inputs"]["quantisation"]["name"] == "量化"
    assert chinese["nodeCategories"]["tools"] == "工具"
    page = server.get("/extensions/lightx2v-distill/docs/LightX2VLoadModel/zh.md").decode()
    assert page.startswith("# 加载 Wan 模型 (LightX2V)")


def test_every_workflow_is_offered_as_a_template(server):
    offered = json.loads(server.get("/workflow_templates"))
    shipped = {path.stem for path in (Path(server.pack) / "workflows").glob("*.json")}

    assert set(offered["lightx2v-distill"]) == shipped
    for name in shipped:
        served = server.get(f"/api/workflow_templates/lightx2v-distill/{name}.json")
        assert json.loads(served)["version"] == 0.4


def test_text_becomes_a_video_with_progress_previews_and_a_plan(server):
    run = server.run(text_to_video())

    assert run.end == "execution_success"
    assert frames_of(server, run) == SIZE["frames"]
    progress = run.progress("sampler")
    assert progress[-1] == (4, 4)
    assert [value for value, _ in progress] == sorted(value for value, _ in progress)
    assert run.previews >= 1
    assert any("4 steps, euler, CFG off" in text for text in run.texts), run.texts


def test_a_picture_and_two_experts_become_a_video_with_one_bar(server):
    run = server.run(image_to_video())

    assert run.end == "execution_success", run.events[-1]
    assert frames_of(server, run) == SIZE["frames"]
    assert {total for _, total in run.progress("sampler")} == {4}
    plan = next(text for text in run.texts if "high noise" in text)
    assert "low noise" in plan


def test_another_seed_loads_nothing_again(server):
    server.run(text_to_video(seed=11))
    before = server.text().count("t2v.safetensors: ")

    run = server.run(text_to_video(seed=12))

    cached = {node for data in run.data("execution_cached") for node in data["nodes"]}
    assert {"model", "clip", "vae", "positive", "latent"} <= cached
    assert server.text().count("t2v.safetensors: ") == before > 0


def test_the_same_workflow_twice_runs_nothing_the_second_time(server):
    server.run(text_to_video(seed=21))

    run = server.run(text_to_video(seed=21))

    assert run.end == "execution_success"
    assert not run.progress("sampler")


def test_an_interrupt_ends_quietly_and_the_next_run_works(server):
    long = {"schedule": "steps", "schedule.steps": 100, "schedule.shift": 5.0}
    started = time.monotonic()

    stopped = server.run(text_to_video(seed=31, **long), interrupt_at=2)

    assert stopped.end == "execution_interrupted"
    assert not stopped.data("execution_error")
    assert max(value for value, _ in stopped.progress("sampler")) < 60
    assert time.monotonic() - started < 60
    assert server.run(text_to_video(seed=32)).end == "execution_success"


def test_after_free_the_same_seed_gives_the_same_video(server):
    first = pixels_of(server, server.run(text_to_video(seed=41)))

    status, _ = server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1)
    run = server.run(text_to_video(seed=41, prefix="again"))

    assert status == 200
    assert run.progress("sampler")[-1] == (4, 4)
    assert pixels_of(server, run) == first


def test_a_start_image_on_a_text_model_ends_in_a_sentence(server):
    prompt = image_to_video("refused")
    prompt["model"] = loader("t2v.safetensors")
    del prompt["sampler"]["inputs"]["model_low_noise"]

    run = server.run(prompt)

    assert run.end == "execution_error"
    assert run.error == (
        "this is a text-to-video model and a start image is connected; "
        "load an image-to-video model or disconnect the image"
    )


def test_a_wrong_file_ends_in_a_sentence(server):
    (server.folder / "models/vae/short.safetensors").write_bytes(b"version https://git-lfs\n")
    server.get("/object_info/LightX2VLoadVae")
    prompt = text_to_video()
    prompt["vae"]["inputs"]["file"] = "short.safetensors"

    run = server.run(prompt)

    assert run.end == "execution_error"
    assert "Git-LFS" in run.error or "LFS" in run.error, run.error


def test_values_outside_the_schema_are_refused_before_running(server):
    prompt = text_to_video(schedule="steps")
    prompt["sampler"]["inputs"] |= {"schedule.steps": 1000, "schedule.shift": 5.0}

    status, answer = server.post("/prompt", {"prompt": prompt, "client_id": server.client})

    assert status == 400
    assert answer["node_errors"]["sampler"]["errors"][0]["type"] == "value_bigger_than_max"


def test_a_help_page_that_does_not_exist_is_a_404(server):
    with pytest.raises(urllib.error.HTTPError, match="404") as missing:
        server.get("/extensions/lightx2v-distill/docs/LightX2VNothing.md")

    missing.value.close()
