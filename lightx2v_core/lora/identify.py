"""What a LoRA was made for, where its file says so for certain; silence everywhere else.

Read from names, shapes and metadata: expert (high or low noise), task (t2v or i2v), width. A name
like high_quality.safetensors says nothing about experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..checkpoint.detect import SIZES
from .read import LoraFile

# Layers that only models with a CLIP branch have, in official and diffusers names.
IMAGE_LAYERS = re.compile(
    r"img_emb|k_img|v_img|image_embedder|add_[kv]_proj|norm_added_k|add[._][kv][._]proj"
)
TASKS = {"t2v": "a text-to-video", "i2v": "an image-to-video"}

_NOISE = re.compile(r"(high|low)[ _-]?noise")
# Only in names that are about a model of two experts, and only where the word stands alone.
_TWO_EXPERTS = re.compile(r"wan[ _-]?2[._]?2|a14b|lightning")
_LONE = re.compile(
    r"(?<![a-z])(high|low)(?=$|[._ -](?:lightx2v|lora|model|fp\d|bf16|rank|v?\d|safetensors))"
)
_WORD = re.compile(r"(?<![a-z])(high|low)(?![a-z])")
_TASK = re.compile(r"(?<![a-z])(t2v|i2v)(?![a-z])")
# Metadata entries that hold the name a file was saved under.
_TITLES = ("ss_output_name", "modelspec.title")


@dataclass(frozen=True, slots=True)
class Origin:
    """What a LoRA was made for; None where that is not certain."""

    expert: str | None = None
    task: str | None = None
    width: int | None = None

    @property
    def size(self) -> str:
        """14B, 1.3B, 5B, or the width in words."""
        return model_size(self.width)


def model_size(width: int | None) -> str:
    return SIZES.get(width or 0, f"{width} wide")


def identify(lora: LoraFile) -> Origin:
    """Look at names, shapes and metadata; weights are not read."""
    labels = [f"{lora.path.parent.name}/{lora.name}".lower()]
    labels += [lora.metadata[key].lower() for key in _TITLES if key in lora.metadata]
    return Origin(
        expert=lora.metadata.get("lightx2v.expert") or _agreed(map(_expert, labels)),
        task=_task_of_layers(lora) or _agreed(map(_task, labels)),
        width=_width(lora),
    )


def _agreed(found: Iterable[str | None]) -> str | None:
    """The one answer that all who have one give."""
    answers = {answer for answer in found if answer is not None}
    return answers.pop() if len(answers) == 1 else None


def _expert(label: str) -> str | None:
    words = set(_NOISE.findall(label))
    if len(set(_WORD.findall(label))) > 1:
        return None
    if not words and _TWO_EXPERTS.search(label):
        words = set(_LONE.findall(label))
    return words.pop() if len(words) == 1 else None


def _task(label: str) -> str | None:
    words = set(_TASK.findall(label))
    return words.pop() if len(words) == 1 else None


def _task_of_layers(lora: LoraFile) -> str | None:
    """By the input channels of the patch embedding, else by layers that only I2V models have."""
    for (stem, leaf), difference in lora.differences.items():
        if stem.endswith("patch_embedding") and leaf == "weight" and difference.ndim == 5:
            return _task_of_channels(difference.shape[1])
    if (pair := lora.pairs.get("patch_embedding")) and pair.shape:
        return _task_of_channels(pair.shape[1])
    return "i2v" if any(IMAGE_LAYERS.search(stem) for stem in lora.stems) else None


def _task_of_channels(channels: int) -> str | None:
    return {16: "t2v", 36: "i2v"}.get(channels)


def _width(lora: LoraFile) -> int | None:
    """The side that self-attention matrices share."""
    wanted = re.compile(r"blocks[._]\d+[._](self_attn|attn1)[._](to_)?[qkv]$")
    sides = {
        side
        for stem, pair in lora.pairs.items()
        if wanted.search(stem)
        for side in (pair.up_MR.shape[0], pair.down_RK.shape[1])
    }
    return sides.pop() if len(sides) == 1 else None


def task_of(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The task of a model with tensors of `shapes`."""
    patches = shapes.get("patch_embedding.weight", ())
    return _task_of_channels(patches[1]) if len(patches) == 5 else None
