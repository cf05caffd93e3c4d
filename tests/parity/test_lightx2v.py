"""Latents of LightX2V's own code on the demo files, in its folders, beside ours.

`lightx2v_latents.safetensors` was made by ModelTC/LightX2V at f8aee98b: its wan2.1_distill runner
with its text encoder, transformer, scheduler and VAE in float32 on a CPU (attention torch_sdpa,
norms and rotary of torch), the demo's sizes in place of its constants and the demo's tokenizer;
configuration tests/layouts.SMALL, seed 42.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightx2v_core.configuration.read import read_configuration
from lightx2v_core.configuration.running import Wish, open_pipeline, request_for
from lightx2v_core.configuration.settings import settings_for
from lightx2v_core.media import read_image
from tests.layouts import arrange, wide_picture, write_config
from tests.tolerances import LIGHTX2V_LATENTS

THEIRS = Path(__file__).parent / "lightx2v_latents.safetensors"
PROMPTS = {
    "t2v": "a large blue circle moving right on a dark background",
    "i2v": "a red circle moving right on a dark background",
}


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_latents_are_those_of_lightx2v(task, tmp_path):
    config = read_configuration(write_config(tmp_path / "config.json"))
    settings = settings_for("wan2.1_distill", task, arrange(tmp_path / "model", task), config)
    pipeline, _ = open_pipeline(settings, torch.device("cpu"))
    # 60 x 40 becomes 64 x 48: its aspect ratio at 64 x 64 pixels of area, rounded down to 16.
    image = read_image(wide_picture(tmp_path / "p.png")) if task == "i2v" else None
    request = request_for(settings, pipeline, Wish(PROMPTS[task], image=image, seed=42))
    seen, decode = [], pipeline.decoder.decode
    pipeline.decoder.decode = lambda x, *a, **k: seen.append(x) or decode(x, *a, **k)

    pipeline.generate(request)

    theirs = load_file(THEIRS)[task]
    assert seen[0][0].shape == theirs.shape
    error = (seen[0][0] - theirs).norm() / theirs.norm()
    assert error < LIGHTX2V_LATENTS, f"relative error {error:.1e}"
