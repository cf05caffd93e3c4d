"""Latents of LightX2V's own code beside ours, in its folders: random weights, the demo's sizes.

`lightx2v_latents.safetensors` was made by record_lightx2v.py from ModelTC/LightX2V at f8aee98b: its
wan2.1_distill runner with its text encoder, transformer, scheduler and VAE in float32 on a CPU
(attention torch_sdpa, norms and rotary of torch); configuration tests/layouts.SMALL. The file also
holds the SentencePiece model that both read.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lightx2v_core.configuration.read import read_configuration
from lightx2v_core.configuration.running import Wish, open_pipeline, request_for
from lightx2v_core.configuration.settings import settings_for
from lightx2v_core.media import read_image
from tests.layouts import arrange, wide_picture, write_config
from tests.parity.record_lightx2v import PROMPTS, SEED, THEIRS
from tests.random_demo import random_files
from tests.tolerances import LIGHTX2V_LATENTS


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_latents_are_those_of_lightx2v(task, tmp_path):
    theirs = load_file(THEIRS)
    files = random_files(tmp_path / "files", bytes(theirs["spiece_model"].tolist()))
    home = arrange(tmp_path / "model", task, files=files)
    config = read_configuration(write_config(tmp_path / "config.json"))
    settings = settings_for("wan2.1_distill", task, home, config)
    pipeline, _ = open_pipeline(settings, torch.device("cpu"))
    # 60 x 40 becomes 64 x 48: its aspect ratio at 64 x 64 pixels of area, rounded down to 16.
    image = read_image(wide_picture(tmp_path / "p.png")) if task == "i2v" else None
    request = request_for(settings, pipeline, Wish(PROMPTS[task], image=image, seed=SEED))
    seen, decode = [], pipeline.decoder.decode
    pipeline.decoder.decode = lambda x, *a, **k: seen.append(x) or decode(x, *a, **k)

    pipeline.generate(request)

    assert seen[0][0].shape == theirs[task].shape
    error = (seen[0][0] - theirs[task]).norm() / theirs[task].norm()
    assert error < LIGHTX2V_LATENTS, f"relative error {error:.1e}"
