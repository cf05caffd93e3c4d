"""`bench`: the denoiser timed where the user is, with the reasons for what was chosen."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from lightx2v_core.bench import BenchRequest, bench, forward_flops
from lightx2v_core.cli import main
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.errors import RequestError
from lightx2v_core.memory.plan import video_tokens
from lightx2v_core.wan.config import CLIP_TOKENS, WanConfig
from tests.conftest import tiny_model

SIZE = VideoSize(64, 32, 5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "wan2.1_t2v_tiny.safetensors"
    weights = tiny_model().state_dict()
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in weights.items()}, path)
    return path


def test_a_file_is_timed_and_the_report_says_what_was_chosen(model):
    done = []

    report = bench(
        BenchRequest(model, SIZE, forwards=3, quantisation="fp8"),
        torch.device("cpu"),
        lambda *step: done.append(step),
    )

    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert report.size == (64, 32, 5) and report.tokens == 2 * 2 * 4
    assert report.seconds_per_step > 0 and report.first_seconds > 0
    assert report.attention == "sdpa"
    assert report.matmul.startswith("dequantise (8 bits are multiplied on CUDA cards")
    assert report.peak_bytes is None and report.card == "cpu"
    text = "\n".join(report.lines())
    assert "s/step" in text and "quantised to fp8" in text and "attention: sdpa" in text


def test_the_log_is_left_as_it_was_and_nothing_is_shown_that_was_not(model, capsys):
    logger = logging.getLogger("lightx2v_core")
    before = (logger.level, logger.propagate, list(logger.handlers))

    bench(BenchRequest(model, SIZE, forwards=1), torch.device("cpu"))

    assert (logger.level, logger.propagate, list(logger.handlers)) == before
    assert capsys.readouterr() == ("", "")


def test_the_command_prints_json_with_every_fact(model, capsys):
    sides = ["--width", "64", "--height", "32", "--frames", "5"]

    code = main(["bench", str(model), *sides, "--forwards", "1", "--device", "cpu", "--json"])

    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert found["size"] == [64, 32, 5] and found["torch"] == torch.__version__
    assert found["seconds_per_step"] > 0 and found["steps"] == 4
    assert found["matmul"] == "" and found["peak_bytes"] is None


def test_what_cannot_be_timed_is_said_in_words(model, capsys):
    with pytest.raises(RequestError, match="0 forwards cannot be timed"):
        bench(BenchRequest(model, SIZE, forwards=0), torch.device("cpu"))
    with pytest.raises(RequestError, match="use 64x32"):
        bench(BenchRequest(model, VideoSize(60, 30, 5)), torch.device("cpu"))

    assert main(["bench", str(model), "--width", "64"]) == 1
    assert "--width, --height and --frames together" in capsys.readouterr().err


def test_the_operations_of_a_14b_forward_are_those_that_were_counted_by_hand():
    config = WanConfig(5120, 13824, 40, in_dim=36, clip_tokens=CLIP_TOKENS)

    flops = forward_flops(config, video_tokens(VideoSize(832, 480, 81)))

    # 0.78 of linears, 0.88 of self-attention, 0.02 of cross-attention.
    assert flops == pytest.approx(1.68e15, rel=0.01)
    assert forward_flops(config, 1000, batch=2) == 2 * forward_flops(config, 1000)
