from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lightx2v_core.errors import RequestError
from lightx2v_core.ops.norm_rotary import rotate
from lightx2v_core.wan.model import sinusoid, unpatchify
from lightx2v_core.wan.rope import rotary_table
from tests.conftest import VARIANTS, relative_error, tiny_inputs, tiny_model


def test_float_timesteps_reach_the_model_and_are_not_cut_to_integers():
    model, inputs = tiny_model(), tiny_inputs(VARIANTS["t2v"])

    exact = model(**inputs)
    truncated = model(**{**inputs, "timestep_B": inputs["timestep_B"].long().float()})

    assert not torch.equal(exact, truncated)


def test_half_precision_blocks_keep_a_float32_residual_and_result():
    model, inputs = tiny_model(), tiny_inputs(VARIANTS["t2v"])
    expected, seen = model(**inputs), []
    model.compute_dtype = torch.bfloat16

    def watch(index, block, x, shared):
        seen.append((x.dtype, shared.text_BSE.dtype, shared.modulation_B6E.dtype))
        return block(x, shared)

    actual = model(**inputs, run_block=watch)

    assert set(seen) == {(torch.float32, torch.bfloat16, torch.float32)}
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) < 0.01, "two blocks in bfloat16"


def test_the_attention_of_one_call_stands_in_for_the_models_own():
    model, inputs, calls = tiny_model("i2v"), tiny_inputs(VARIANTS["i2v"]), []

    def counting(q, k, v):
        calls.append((q.shape[2], k.shape[2]))
        return model.attend(q, k, v)

    assert torch.equal(model(**inputs, attend=counting), model(**inputs))
    assert calls == [(36, 36), (36, 512), (36, 257)] * 2  # self, text, image in each of two blocks


def test_without_clip_features_the_image_branch_is_skipped():
    model, inputs, calls = tiny_model("i2v"), tiny_inputs(VARIANTS["i2v"]), []

    def counting(q, k, v):
        calls.append(k.shape[2])
        return model.attend(q, k, v)

    model(**{**inputs, "clip_BSE": None}, attend=counting)

    assert 257 not in calls


@pytest.mark.parametrize(
    ("variant", "change", "words"),
    [
        ("t2v", {"x_BCTHW": torch.zeros(1, 36, 3, 6, 8)}, "it is a text-to-video model"),
        ("i2v", {"x_BCTHW": torch.zeros(1, 16, 3, 6, 8)}, "it is an image-to-video model"),
        ("t2v", {"x_BCTHW": torch.zeros(1, 16, 3, 5, 8)}, "latent 5x8 has an odd side"),
        ("t2v", {"text_BSE": torch.zeros(1, 77, 768)}, "768 wide and this model needs 64"),
        ("a14b_i2v", {"clip_BSE": torch.zeros(1, 257, 1280)}, "257 CLIP tokens .* takes 0"),
        ("flf2v", {"clip_BSE": torch.zeros(1, 257, 1280)}, "257 CLIP tokens .* takes 514"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_in_words(variant, change, words):
    model, inputs = tiny_model(variant), tiny_inputs(VARIANTS[variant], batch=1)

    with pytest.raises(RequestError, match=words):
        model(**{**inputs, **change})


def test_tokens_of_a_patch_grid_return_to_their_places():
    video = torch.arange(16 * 2 * 4 * 6, dtype=torch.float32).view(1, 16, 2, 4, 6)
    # C T (h 2) (w 2) -> (T h w) (2 2 C), written out by hand
    tokens = torch.stack(
        [
            video[0, :, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].permute(1, 2, 0).flatten()
            for t in range(2)
            for h in range(2)
            for w in range(3)
        ]
    )[None]

    assert torch.equal(unpatchify(tokens, (2, 2, 3)), video)


def test_the_time_embedding_puts_cosines_first():
    embedded = sinusoid(torch.tensor([937.5]), 256)

    assert embedded[0, 0] == pytest.approx(torch.cos(torch.tensor(937.5).double()))
    assert embedded[0, 128] == pytest.approx(torch.sin(torch.tensor(937.5).double()))
    assert embedded.dtype == torch.float64


def test_rotary_splits_the_head_in_22_21_21_pairs_by_time_row_column():
    cos, _ = rotary_table((3, 4, 5), 128, torch.device("cpu"))
    grid = cos.view(3, 4, 5, 64)

    assert grid[:, 0, 0, 22:].eq(1).all()
    assert grid[0, :, 0, :22].eq(1).all() and grid[0, :, 0, 43:].eq(1).all()
    assert grid[0, 0, :, :43].eq(1).all()
    assert grid[2, 0, 0, 0] == pytest.approx(torch.cos(torch.tensor(2.0)))


def test_rotary_turns_interleaved_pairs():
    x = torch.randn(1, 60, 2, 128, generator=torch.Generator().manual_seed(1))
    cos, sin = rotary_table((3, 4, 5), 128, torch.device("cpu"))

    turned = rotate(x, (cos, sin))

    as_complex = torch.view_as_complex(x.unflatten(-1, (64, 2)).contiguous())
    expected = torch.view_as_real(as_complex * torch.complex(cos, sin)[None, :, None]).flatten(-2)
    torch.testing.assert_close(turned, expected)


def test_a_model_built_empty_does_not_wait_for_pytorchs_compiler():
    script = """
import sys, torch
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.model import WanModel
before = set(sys.modules)
with torch.device("meta"):
    WanModel(WanConfig(256, 512, 1, clip_tokens=257))
print(len(set(sys.modules) - before))
"""

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert int(done.stdout) < 20, done.stderr
