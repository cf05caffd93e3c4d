"""What a run shows while it goes on and leaves behind: bar, previews, last line, metadata.

Registered by inprocess_codecs.
"""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from inside import WORK, check, host_nodes, pack

import av
import comfy.utils
import latent_preview
import torch
from comfy.cli_args import args, LatentPreviewMethod
from comfy_extras.nodes_video import CreateVideo, SaveVideo
from graph_runs import Queue, node, text_to_video
from PIL import Image
from small_models import distill, image_cond, ours

for video_node in (CreateVideo, SaveVideo):
    host_nodes.NODE_CLASS_MAPPINGS[video_node.__name__] = video_node
WORKFLOW = {"nodes": [{"id": 7, "type": "LightX2VDistillSampler"}], "version": 0.4}


@contextmanager
def bar() -> Iterator[list[tuple]]:
    """(value, total, preview) of every progress call, as the server gets them."""
    seen: list[tuple] = []
    hook = comfy.utils.PROGRESS_BAR_HOOK

    def listen(value: int, total: int, preview: object, **_more: object) -> None:
        seen.append((value, total, preview))

    comfy.utils.set_progress_bar_global_hook(listen)
    try:
        yield seen
    finally:
        comfy.utils.set_progress_bar_global_hook(hook)


@contextmanager
def previews(method: LatentPreviewMethod) -> Iterator[None]:
    before, args.preview_method = args.preview_method, method
    try:
        yield
    finally:
        args.preview_method = before


def two_experts() -> tuple:
    return distill(
        ours("high_noise_wan2.2"), image_cond(), model_low_noise=ours("low_noise_wan2.2")
    )


@check
def steps_of_two_experts_are_counted_in_one_bar_each_with_a_preview() -> str:
    with previews(LatentPreviewMethod.Latent2RGB), bar() as seen:
        two_experts()
    steps = [(value, total) for value, total, _ in seen]
    assert [s for s in steps if s[1] == 4][-4:] == [(1, 4), (2, 4), (3, 4), (4, 4)], steps
    images = [preview[1] for _, _, preview in seen if preview]
    assert len(images) == 4 and images[0].size == (8, 8), images
    return str(steps)


@check
def a_previewer_that_another_pack_puts_in_gets_every_latent_frame() -> None:
    """As VideoHelperSuite does for its animated previews: latent_preview.get_previewer replaced."""
    shapes = []

    class Animated(latent_preview.LatentPreviewer):
        def decode_latent_to_preview_image(self, preview_format: str, x0: torch.Tensor) -> None:
            shapes.append(tuple(x0.shape))

    real = latent_preview.get_previewer
    latent_preview.get_previewer = lambda _device, _format: Animated()
    try:
        two_experts()
    finally:
        latent_preview.get_previewer = real
    assert shapes == [(1, 16, 3, 8, 8)] * 4, shapes


@check
def a_tiny_decoder_that_is_there_makes_the_previews_where_the_host_is_set_to_it() -> None:
    assert (WORK / "models/vae_approx/lighttaew2_1.safetensors").is_file()
    with previews(LatentPreviewMethod.TAESD), bar() as seen:
        distill(ours())
    images = [preview[1] for value, total, preview in seen if preview]
    assert [image.size for image in images] == [(64, 64)] * 4, images


def saved(save: Callable[[], dict], extra: dict) -> Path:
    """The file that a graph ends in, and the metadata the browser would send with it."""
    graph = text_to_video(seed=uuid4().int % 2**32)
    del graph["keep"]
    graph |= save()
    queue = Queue()
    with torch.inference_mode(False):
        queue.executor.execute(graph, uuid4().hex, {"client_id": "t", **extra}, ["save"])
    errors = [d["exception_message"] for e, d in queue.sent if e == "execution_error"]
    assert not errors, errors
    (output,) = [d["output"]["images"][0] for e, d in queue.sent if e == "executed"]
    return WORK / "output" / output["subfolder"] / output["filename"]


def as_video() -> dict:
    choices = {"filename_prefix": "noted", "format": "auto", "codec": "auto"}
    return {
        "video": node("CreateVideo", images=["decode", 0], fps=16.0),
        "save": node("SaveVideo", video=["video", 0], **choices),
    }


def as_pictures() -> dict:
    return {"save": node("SaveImage", images=["decode", 0], filename_prefix="noted")}


def check_notes(found: dict) -> str:
    assert json.loads(found["workflow"]) == WORKFLOW, found
    assert json.loads(found["prompt"])["sampler"]["class_type"] == "LightX2VDistillSampler"
    notes = json.loads(found["lightx2v"])
    lines = notes["plan"].splitlines()
    assert lines[0].startswith("4 steps, euler, CFG off"), lines
    assert lines[-1].startswith("done: ") and "s/step" in lines[-1], lines
    assert "5 frames of 32x32" in notes["decoded"] and "whole" in notes["decoded"], notes
    return f"{lines[-1]}; {notes['decoded']}"


@check
def a_video_and_a_picture_hold_the_workflow_and_what_the_run_took() -> str:
    extra = {"extra_pnginfo": {"workflow": WORKFLOW}}
    with av.open(str(saved(as_video, extra))) as container:
        told = check_notes(dict(container.metadata))
    extra = {"extra_pnginfo": {"workflow": WORKFLOW}}
    with Image.open(saved(as_pictures, extra)) as picture:
        check_notes(picture.text)
    return told


@check
def a_graph_posted_without_a_workflow_is_saved_too() -> None:
    with av.open(str(saved(as_video, {}))) as container:
        assert "prompt" in container.metadata and "lightx2v" not in container.metadata


@check
def the_peak_is_told_of_the_card_and_a_full_one_on_windows_with_what_to_do() -> str:
    tell = pack("nodes.finish").describe_peak
    assert tell(12 * 10**9, 24 * 10**9, True) == "; peak 12.00 of 24.00 GB (50%)"
    assert "RAM" not in tell(int(23.9e9), 24 * 10**9, False)
    full = tell(int(23.9e9), 24 * 10**9, True)
    assert "use fewer frames" in full
    return full
