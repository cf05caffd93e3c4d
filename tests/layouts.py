"""The demo model in the folders of LightX2V's documentation. Links where the file is as it is.

The shipped files hold 8-bit codes; what is published in 16 bits is a copy of them in float16.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from lightx2v_core.presets import demo_path
from training.files import plain_file

T5 = "models_t5_umt5-xxl-enc-bf16.pth"
VAE = "Wan2.1_VAE.pth"
# What every documented distill configuration says, at a size for tests.
SMALL = {
    "infer_steps": 4,
    "target_video_length": 5,
    "text_len": 512,
    "target_height": 64,
    "target_width": 64,
    "self_attn_1_type": "flash_attn3",
    "cross_attn_1_type": "flash_attn3",
    "cross_attn_2_type": "flash_attn3",
    "sample_guide_scale": 6,
    "sample_shift": 5,
    "enable_cfg": False,
    "cpu_offload": False,
    "denoising_step_list": [1000, 750, 500, 250],
}


@cache
def plain_demo(part: str) -> Path:
    """A file of the demo in float16, made once in a process."""
    return plain_file(demo_path(part), Path(_plain_folder().name))


@cache
def _plain_folder() -> tempfile.TemporaryDirectory:
    """Lives as long as the process."""
    return tempfile.TemporaryDirectory(prefix="lightx2v-plain-")


Files = Callable[[str], Path]  # from t2v, i2v, vae or text


def arrange(
    root: Path,
    task: str = "t2v",
    at: str = "distill_models/distill_model",
    files: Files = plain_demo,
) -> Path:
    """A model folder with the transformer at `at`, and text encoder, tokenizer and VAE beside."""
    add_encoders(root, files)
    link(files(task), root / f"{at}.safetensors")
    return root


def add_encoders(root: Path, files: Files = plain_demo) -> None:
    root.mkdir(parents=True, exist_ok=True)
    tensors = load_file(files("text"))
    pieces = tensors.pop("spiece_model")
    torch.save(tensors, root / T5)
    tokenizer = root / "google/umt5-xxl"
    tokenizer.mkdir(parents=True)
    (tokenizer / "spiece.model").write_bytes(bytes(pieces.tolist()))
    torch.save(load_file(files("vae")), root / VAE)


def link(target: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


def write_config(path: Path, **changes: object) -> Path:
    """SMALL with `changes`; a key that changes to None is left out."""
    values = {k: v for k, v in (SMALL | changes).items() if v is not None}
    path.write_text(json.dumps(values), "utf-8")
    return path


def wide_picture(path: Path) -> Path:
    """60 x 40 pixels: a red disc on a grey ramp."""
    y, x = torch.arange(40.0)[:, None], torch.arange(60.0)[None]
    ramp = (40 + 60 * x / 59).expand(40, 60)
    image = torch.stack((ramp, ramp, ramp), -1)
    image[(x - 20) ** 2 + (y - 18) ** 2 < 81] = torch.tensor([210.0, 30.0, 30.0])
    Image.fromarray(image.round().to(torch.uint8).numpy()).save(path)
    return path
