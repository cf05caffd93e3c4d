"""Settings into a pipeline, and what one person asks of it into a request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conditioning import fit_image
from ..device import describe_card
from ..errors import RequestError
from ..ops.attention import BACKENDS
from ..pipeline import Pipeline
from ..request import GenerateRequest
from .settings import Settings

SEED = 42  # LightX2V's, where nobody gives one


@dataclass(frozen=True, slots=True, eq=False)
class Wish:
    """What one request may say. Images are C H W in [-1, 1] of any size; `target_shape` is height
    and width. None leaves it to the settings."""

    prompt: str
    negative_prompt: str = ""
    image: Tensor | None = None
    last_image: Tensor | None = None
    seed: int | None = None
    frames: int | None = None
    target_shape: tuple[int, int] | None = None


def open_pipeline(settings: Settings, device: torch.device) -> tuple[Pipeline, list[str]]:
    """Load the model and put its LoRAs on; lines that say what was loaded and matched."""
    attention, lines = _attention(settings, device)
    vram, quantisation = settings.vram_bytes, settings.quantisation
    pipeline = Pipeline(settings.parts, device, attention, vram, quantisation, settings.matmul)
    lines += [expert.summary for expert in pipeline.experts]
    loras = [(lora.path, lora.strength) for lora in settings.loras]
    experts = [lora.expert for lora in settings.loras]
    lines += pipeline.set_loras(loras, settings.merge_loras, experts)
    return pipeline, lines


def _attention(settings: Settings, device: torch.device) -> tuple[str, list[str]]:
    """A configuration's attention is a wish: what cannot run here is computed exactly, and said."""
    name = settings.attention
    if name == "auto" or not settings.wished:
        return name, []
    reason = BACKENDS[name].blocked_by(describe_card(device))
    if reason is None:
        return name, []
    return "auto", [f"attention {name} cannot run here ({reason}); the exact one is computed"]


def request_for(settings: Settings, pipeline: Pipeline, wish: Wish) -> GenerateRequest:
    """Raises RequestError where images and task do not go together."""
    check_images(settings.task, wish)
    preset, rule = pipeline.preset, settings.sizes
    if wish.image is None:
        size, fit = rule.video(preset, wish.target_shape, wish.frames), fit_image
    else:
        _, height, width = wish.image.shape
        size = rule.from_image((height, width), preset, wish.target_shape, wish.frames)
        cropped = rule.resize_mode is not None or wish.target_shape is not None
        fit = fit_image if cropped else stretch_image
    seed = settings.seed if wish.seed is None else wish.seed
    return GenerateRequest(
        wish.prompt,
        wish.negative_prompt,
        wish.image,
        wish.last_image,
        size,
        SEED if seed is None else seed,
        settings.overrides,
        fit,
    )


def stretch_image(image_CHW: Tensor, width: int, height: int) -> Tensor:
    """Bicubic without antialiasing to exactly that size, as LightX2V and the official Wan code
    bring a start image to a size that follows its aspect ratio."""
    return F.interpolate(image_CHW[None].float(), (height, width), mode="bicubic")[0]


def check_images(task: str, wish: Wish) -> None:
    """Raise RequestError unless there are the images that `task` takes."""
    has = (wish.image is not None, wish.last_image is not None)
    needed = {"t2v": (False, False), "i2v": (True, False), "flf2v": (True, True)}[task]
    if has == needed:
        return
    words = {
        "t2v": "takes no image; leave it out",
        "i2v": "takes one start image and no last one; give that",
        "flf2v": "takes a first and a last image; give both",
    }
    raise RequestError(f"--task {task} {words[task]}")
