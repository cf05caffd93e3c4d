"""Other programs beside ours: which settings there are, and that they compute the same.

LightX2V's own code runs where LIGHTX2V_PATH names a checkout and loguru and triton are installed.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import forward, peer_lightx2v, peers, vae
from benchmarks.lines import read_lines, relative_error
from benchmarks.random_files import TINY
from benchmarks.random_models import as_checkpoint, random_inputs, random_weights
from lightx2v_core.assemble import load_transformer
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.errors import CapabilityError, RequestError

CPU = torch.device("cpu")
ONE_BLOCK = replace(TINY, num_layers=1)
SIZE = VideoSize(64, 32, 5)
CHECKOUT = os.environ.get("LIGHTX2V_PATH", "")
# As the forward of fa3-fwd: B L N D.
ATTENTION = """
import torch.nn.functional as F

calls = []


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, **more):
    calls.append(q.shape)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()
"""


@pytest.fixture
def forward_kernels(tmp_path, monkeypatch):
    """A package fa3-fwd that computes on a CPU; no other FlashAttention 3."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/fa3_fwd_interface.py").write_text(ATTENTION)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield
    sys.modules.pop("fa3_fwd_interface", None)


def skeleton(folder: Path) -> Path:
    """A checkout of LightX2V that holds nothing but what tells that it is one."""
    (folder / peer_lightx2v.MODEL).parent.mkdir(parents=True)
    (folder / peer_lightx2v.MODEL).touch()
    (folder / "lightx2v/__init__.py").write_text('__version__ = "0.9.7"\n')
    (folder / "COMMIT").write_text("f8aee98b5462cca8\n")
    return folder


def test_settings_of_lightx2v_are_those_whose_packages_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(peer_lightx2v, "find_spec", lambda name: name == "sgl_kernel" or None)

    found = peers.contenders(f"lightx2v={skeleton(tmp_path)}")

    by_scheme = {contender.scheme: contender for contender in found}
    assert set(by_scheme) == {
        *("bf16", "fp8-torchao", "fp8-triton", "fp8-sgl", "int8-triton", "int8-sgl"),
    }
    assert {contender.setting for contender in found} == {
        f"{scheme}-sdpa{end}" for scheme in by_scheme for end in ("", "-compile")
    }
    assert {scheme: contender.tier for scheme, contender in by_scheme.items()} == {
        scheme: "16bit" if scheme == "bf16" else "8bit" for scheme in by_scheme
    }
    assert all(contender.version.startswith("0.9.7, f8aee98b54") for contender in found)


def test_borrowed_attention_is_told_from_a_programs_own(tmp_path, forward_kernels):
    lightx2v = peers.contenders(f"lightx2v={skeleton(tmp_path)}")
    diffusers = peers.contenders("diffusers")

    for found in (lightx2v, diffusers):
        stock = {contender.setting: contender.stock for contender in found}
        assert stock["bf16-fa3"] is False and stock["bf16-sdpa"] is True


def test_a_folder_without_lightx2v_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"holds no LightX2V with lightx2v/models/"):
        peers.contenders(f"lightx2v={tmp_path}")


def test_what_stands_in_can_be_imported_and_not_used_and_is_gone_afterwards():
    with peer_lightx2v._standing_in(("no_such_codec", "no_such_codec.inner", "torch")):
        import no_such_codec.inner as inner
        from no_such_codec import read

        with pytest.raises(CapabilityError, match="the package no_such_codec is not installed"):
            read("clip.mp4")
        assert inner.__name__ == "no_such_codec.inner"

    assert find_spec("no_such_codec") is None
    assert torch is sys.modules["torch"]


def test_a_setting_is_wanted_by_name_or_for_one_program():
    found = {contender.setting: contender for contender in peers.contenders("diffusers")}
    plain, compiled = found["bf16-sdpa"], found["bf16-sdpa-compile"]

    wanted = {
        settings: [contender for contender in (plain, compiled) if forward.is_wanted(contender, s)]
        for settings, s in {
            "default": None,
            "none": [],
            "name": ["bf16-sdpa-compile"],
            "theirs": ["diffusers:bf16-sdpa"],
            "others": ["comfyui:bf16-sdpa"],
        }.items()
    }

    assert wanted == {
        **{"default": [plain], "none": [], "name": [compiled], "theirs": [plain], "others": []},
    }


def test_diffusers_keeps_in_float32_what_it_keeps_for_its_users(monkeypatch):
    theirs = next(c for c in peers.contenders("diffusers") if c.setting == "bf16-sdpa")
    chosen = []
    monkeypatch.setattr(
        peers._DiffusersLoad, "_choose_attention", lambda _self, model: chosen.append(model)
    )

    theirs.load(ONE_BLOCK, random_weights(ONE_BLOCK, CPU))

    kept = {name for name, p in chosen[0].named_parameters() if p.dtype == torch.float32}
    assert "blocks.0.scale_shift_table" in kept
    assert "condition_embedder.time_embedder.linear_1.weight" in kept
    assert "blocks.0.attn1.to_q.weight" not in kept


def test_diffusers_takes_forward_kernels_as_its_flash_attention_3(forward_kernels, monkeypatch):
    from diffusers.models import attention_dispatch

    monkeypatch.setattr(attention_dispatch, "flash_attn_3_func", None)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN_3", False)
    found = {contender.setting: contender for contender in peers.contenders("diffusers")}

    try:
        found["bf16-fa3"].load(ONE_BLOCK, random_weights(ONE_BLOCK, CPU))

        active, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
        assert active.value == "_flash_3"
        assert attention_dispatch.flash_attn_3_func.__module__ == "fa3_fwd_interface"
    finally:
        found["bf16-sdpa"].load(ONE_BLOCK, random_weights(ONE_BLOCK, CPU))


def vae_lines(out: Path, monkeypatch: pytest.MonkeyPatch, *given: str) -> list[dict]:
    """Of a VAE of width 8 and clips of 5 frames of 16x16, in float32."""
    monkeypatch.setattr(vae, "CHECKED", VideoSize(16, 16, 5))
    small = ["--width", "8", "--sizes", "16x16", "--frames", "5", "--repeats", "1"]

    vae.main(["--device", "cpu", "--dtype", "float32", *small, *given, "--out", str(out)])

    return list(read_lines(out))


def test_the_vae_of_diffusers_stands_beside_ours_and_computes_the_same(tmp_path, monkeypatch):
    found = vae_lines(tmp_path / "lines.jsonl", monkeypatch, "--peer", "diffusers")

    assert [(line["case"], line.get("peer")) for line in found] == [
        (case, peer) for case in vae.CASES for peer in (None, "diffusers")
    ]
    for ours, theirs in zip(found[::2], found[1::2], strict=True):
        assert ours["size"] == theirs["size"] == [16, 16, 5] and ours["relative_error"] < 1e-5
        assert theirs["ratio_to_peer"] == ours["seconds"] / theirs["peer_seconds"]
        assert theirs["peer_relative_error"] < 1e-5


def test_a_vae_of_nobody_we_know_is_refused(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="peer 'sora' is unknown"):
        vae_lines(tmp_path / "lines.jsonl", monkeypatch, "--peer", "sora")


@pytest.mark.skipif(not CHECKOUT, reason="LIGHTX2V_PATH names no checkout of LightX2V")
def test_the_vae_of_lightx2v_computes_the_same(tmp_path, monkeypatch):
    for package in ("loguru", "triton", "einops"):
        pytest.importorskip(package)

    found = vae_lines(tmp_path / "lines.jsonl", monkeypatch, "--peer", f"lightx2v={CHECKOUT}")

    names = {"lightx2v", "lightx2v channels-last"}
    errors = [line["peer_relative_error"] for line in found if line.get("peer") in names]
    assert len(errors) == 2 * len(vae.CASES) and max(errors) < 1e-5


@pytest.mark.skipif(not CHECKOUT, reason="LIGHTX2V_PATH names no checkout of LightX2V")
def test_lightx2v_computes_what_we_compute(forward_kernels):
    for package in ("loguru", "triton"):
        pytest.importorskip(package)
    found = {c.setting: c for c in peers.contenders(f"lightx2v={CHECKOUT}")}
    settings = ("bf16-sdpa", "bf16-fa3", "fp8-torchao-sdpa")

    # Wan 2.1 and 2.2 from a picture, with and without CLIP, and from words.
    two = replace(ONE_BLOCK, clip_tokens=0)
    for config in (ONE_BLOCK, two, replace(two, in_dim=16)):
        weights, inputs = random_weights(config, CPU), random_inputs(config, SIZE, CPU)
        with torch.inference_mode():
            exact = load_transformer(as_checkpoint(weights), torch.float32).model(*inputs)
            errors = {
                setting: relative_error(found[setting].load(config, dict(weights))(*inputs), exact)
                for setting in settings
            }

        assert 1e-4 < errors["bf16-sdpa"] < 0.01 < errors["fp8-torchao-sdpa"] < 0.05
        assert errors["bf16-fa3"] == pytest.approx(errors["bf16-sdpa"], rel=0.01)

    attended = sys.modules["fa3_fwd_interface"].calls
    assert len(attended) == 3 + 2 + 2, "self-attention, words, and CLIP where there is one"
