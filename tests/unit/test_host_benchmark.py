"""The benchmark inside ComfyUI: what it posts, and what its lines are made of. The server that it
starts is that of tests/host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import host
from benchmarks.host_files import TINY_FAMILY, clip_shapes, umt5_tensors, write_models
from benchmarks.host_graphs import Asked, Files, native, ours
from lightx2v_core.checkpoint.detect import detect
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.errors import RequestError
from tests.host.live_server import Run
from tests.unit.text import samples as text_samples
from tests.unit.vision import samples as vision_samples

FILES = Files("wan.safetensors", "umt5.safetensors", "vae.safetensors", "clip.safetensors")
ASKED = Asked(VideoSize(832, 480, 81), seed=3, text="a fox runs")
BOTH = pytest.mark.parametrize("graph", [ours, native])


def values(graph, name):
    return [n["inputs"][name] for n in graph.values() if name in n["inputs"]]


@BOTH
@pytest.mark.parametrize("lora", [None, "style.safetensors"])
@pytest.mark.parametrize("clip", [None, "clip.safetensors"])
def test_every_link_leads_to_a_node_of_the_graph(graph, lora, clip):
    files = Files("wan.safetensors", "umt5.safetensors", "vae.safetensors", clip)
    made = graph(files, Asked(ASKED.size, 3, "a fox runs", lora=lora))

    links = [v for n in made.values() for v in n["inputs"].values() if isinstance(v, list)]

    assert all(target in made and output >= 0 for target, output in links)
    assert ("vision" in made) == (clip is not None)
    assert any(n["class_type"] == "LoraLoaderModelOnly" for n in made.values()) == bool(lora)


@BOTH
def test_both_graphs_make_the_same_video_from_the_same_files(graph):
    made = graph(FILES, ASKED)

    assert values(made, "width") == [832] and values(made, "height") == [480]
    assert values(made, "length" if graph is native else "frames") == [81]
    assert values(made, "noise_seed" if graph is native else "seed") == [3]
    assert values(made, "text") == ["a fox runs"]
    assert values(made, "unet_name" if graph is native else "file")[0] == "wan.safetensors"


def test_the_native_graph_holds_no_node_of_ours_and_the_trained_sigmas():
    made = native(FILES, ASKED)

    assert not [n for n in made.values() if n["class_type"].startswith("LightX2V")]
    sigmas = [float(part) for part in values(made, "sigmas")[0].split(",")]
    assert sigmas == pytest.approx([1, 0.9375, 0.8333333, 0.625, 0])


def test_another_run_changes_seed_and_prompt_and_nothing_else():
    first, second = ours(FILES, ASKED), ours(FILES, ASKED.another(2))

    changed = {name for name in first if first[name] != second[name]}

    assert changed == {"positive", "sampler"}


def test_small_files_are_what_their_names_say_and_are_written_once(tmp_path):
    files = write_models(tmp_path, TINY_FAMILY, "fp8-tensor", torch.device("cpu"))
    path = tmp_path / "diffusion_models" / files.transformer
    written = path.stat().st_mtime_ns

    write_models(tmp_path, TINY_FAMILY, "fp8-tensor", torch.device("cpu"))

    assert detect(open_checkpoint(path)).scheme == "fp8-tensor"
    assert path.stat().st_mtime_ns == written


def test_the_encoders_names_and_shapes_are_those_of_hugging_face():
    text, tower = TINY_FAMILY.text, {"dim": 160, "layers": 3, "patch": 7, "tokens": 17, "head": 24}

    made = umt5_tensors(text, torch.device("cpu"))
    del made["spiece_model"]

    assert shapes(made) == shapes(text_samples.hugging_face_tensors(**text))
    positions = {"vision_model.embeddings.position_ids": (1, 17)}  # counted, not learned
    assert clip_shapes(**tower) | positions == shapes(vision_samples.hugging_face_tensors())


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_seconds_of_a_node_end_where_the_next_begins():
    run = Run()
    for at, name in ((0.0, "vae"), (1.5, "image"), (4.0, "sampler"), (9.0, None)):
        run.events.append(("executing", {"node": name}))
        run.clock.append(at)

    spent = host.node_seconds(run, ours(FILES, ASKED))

    assert spent == {
        "LightX2VLoadVae": 1.5,
        "LightX2VImageToVideo": 2.5,
        "LightX2VDistillSampler": 5.0,
    }


def told(seconds, **changes):
    line = {
        "seconds": seconds,
        "frames_seconds": seconds - 1,
        "nodes": {},
        "texts": [],
        "peak_gb": seconds,
        "latent": "a",
    }
    return line | {"is_finite": True, "video_bytes": 1} | changes


def test_the_first_run_is_not_in_the_median_and_one_nan_is_seen():
    line = host.summarise([told(50.0), told(9.0), told(11.0, is_finite=False), told(10.0)])

    assert line["first_seconds"] == 50.0
    assert line["seconds"] == 10.0
    assert line["peak_gb"] == 50.0
    assert line["is_finite"] is False


def test_the_ratio_is_ours_to_theirs():
    mine, theirs = host.summarise([told(20.0), told(6.0)]), host.summarise([told(40.0), told(10.0)])
    latent = torch.ones(1, 16, 2, 2, 2)

    line = host.compare(mine, theirs, latent * 1.5, latent)

    assert line == {
        **{"ratio": 0.6, "ratio_of_frames": 5 / 9},
        **{"ratio_of_first": 0.5, "relative_difference": 0.5},
    }


def test_the_last_latent_is_the_one_that_was_saved_last(tmp_path):
    (tmp_path / "output").mkdir()
    for number in (2, 1):
        path = tmp_path / "output" / f"ours_{number}.latent"
        save_file({"latent_tensor": torch.full((2,), float(number))}, path)
        os.utime(path, (10 - number, 10 - number))

    assert host.last_latent(tmp_path).tolist() == [1.0, 1.0]


def test_a_folder_without_comfyui_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"holds no ComfyUI: comfyui_version.py"):
        host.comfyui_version(Path(tmp_path))
