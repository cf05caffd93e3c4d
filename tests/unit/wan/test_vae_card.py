"""The way the VAE runs on a card, here in float32 on the CPU: the plain layers' numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightx2v_core.device import Card
from lightx2v_core.ops import channels, triton_support
from lightx2v_core.ops.channels import Between
from lightx2v_core.wan import vae as vae_module
from lightx2v_core.wan import vae_card
from lightx2v_core.wan.vae import VaeConfig, WanVae
from lightx2v_core.wan.vae_card import CardLayers
from lightx2v_core.wan.vae_layers import RMSNorm, Stream
from tests.conftest import fill, relative_error

# The same sums in another order, and 3x3 kernels added up before they multiply.
REORDERED = 1e-5
HOPPER = Card("cuda", (9, 0), (2, 11))


@pytest.fixture(scope="module", params=[(4, 4), (8, 16), (24, 24)], ids=str)
def vae(request: pytest.FixtureRequest) -> WanVae:
    return fill(WanVae(VaeConfig(*request.param)))


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(vae_card, "blocked_by", lambda card, dtype: None)
    monkeypatch.setattr(vae_module, "select_pass", lambda device: channels.plain)
    return monkeypatch


@pytest.fixture
def faked_triton(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Puts `row` in the kernel's place, with as much of a triton package as the trial asks for."""

    def put(row: Callable) -> None:
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(TritonError=RuntimeError))
        kernel = SimpleNamespace(fused=row)
        monkeypatch.setitem(sys.modules, "lightx2v_core.ops.kernels.channels", kernel)

    return put


def no_compiler(*_given: object) -> None:
    raise subprocess.CalledProcessError(1, ["gcc"])


def select_anew() -> channels.Pass:
    channels.select_pass.cache_clear()
    try:
        return channels.select_pass(torch.device("cpu"))
    finally:
        channels.select_pass.cache_clear()


def clip(frames: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, 16, 24, generator=generator) * 2 - 1


def latent(frames: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, 16, frames, 2, 3, generator=generator)


@torch.inference_mode()
@pytest.mark.parametrize(("batch", "latents_per_chunk"), [(1, 1), (2, 1), (1, 3)])
def test_the_layers_for_cards_give_what_the_plain_ones_give(
    vae, batch, latents_per_chunk, monkeypatch, request
):
    given = {"latents_per_chunk": latents_per_chunk}
    encoded, decoded = vae.encode(clip(17, batch)), vae.decode(latent(5, batch))
    request.getfixturevalue("as_on_a_card")

    assert relative_error(vae.encode(clip(17, batch), **given), encoded) <= REORDERED
    assert relative_error(vae.decode(latent(5, batch), **given), decoded) <= REORDERED


@torch.inference_mode()
def test_channels_filled_up_with_zeros_change_nothing(as_on_a_card):
    vae = fill(WanVae(VaeConfig(24, 24)))  # it has stages of 96
    filled = vae.encode(clip(9)), vae.decode(latent(3))
    as_on_a_card.setattr(vae_card, "FILLED", {vae_card.PICTURE: 8})

    plainly = vae.encode(clip(9)), vae.decode(latent(3))

    for one, other in zip(filled, plainly, strict=True):
        assert relative_error(one, other) <= REORDERED


@torch.inference_mode()
def test_they_too_compute_equal_frames_once(vae, request):
    padded = clip(33)
    padded[:, :, 1:] = 0.0
    encoded = vae.encode(padded)
    request.getfixturevalue("as_on_a_card")

    assert relative_error(vae.encode(padded), encoded) <= REORDERED


@torch.inference_mode()
def test_they_run_a_layer_that_ends_a_chunk_by_itself(vae):
    block, run = vae.encoder.downsamples[0], CardLayers(channels.plain)
    x = torch.randn(1, block.residual[0].gamma.shape[0], 3, 4, 6)

    alone = run((block,), x, Stream())

    assert relative_error(alone, block(x, Stream())) <= REORDERED


def test_weights_that_learn_keep_to_the_plain_layers(as_on_a_card):
    vae = fill(WanVae(VaeConfig(4, 4))).requires_grad_(True)

    vae.decode(latent(2)).square().mean().backward()

    assert vae.decoder.conv1.weight.grad.abs().sum() > 0


def test_a_latent_that_learns_keeps_to_the_plain_layers(as_on_a_card):
    vae, given = fill(WanVae(VaeConfig(4, 4))), latent(2).requires_grad_(True)

    vae.decode(given).square().mean().backward()

    assert given.grad.abs().sum() > 0


def test_the_pass_is_bias_residual_norm_and_silu():
    torch.manual_seed(0)
    norm, sums, residual = RMSNorm(6), torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    norm.gamma.data.uniform_(0.5, 2.0)
    bias, total, activated = torch.randn(6), torch.empty_like(sums), torch.empty_like(sums)

    channels.plain(sums, Between(bias, residual, total, norm.gamma.flatten(), activated))

    y = sums + bias + residual
    normed = norm(y.movedim(-1, 1).unsqueeze(2)).squeeze(2).movedim(1, -1)
    torch.testing.assert_close(total, y)
    torch.testing.assert_close(activated, nn.functional.silu(normed))


@pytest.mark.parametrize(
    ("card", "dtype", "reason"),
    [
        (HOPPER, torch.bfloat16, None),
        (HOPPER, torch.float16, None),
        (HOPPER, torch.float32, "16-bit numbers and these are float32"),
        (Card("cuda", (7, 5), (2, 11)), torch.float16, None),
        (Card("cuda", (6, 1), (2, 11)), torch.float16, "no tensor cores"),
        (Card("rocm", (9, 4), (2, 11)), torch.bfloat16, "this is rocm"),
        (Card("mps"), torch.float16, "this is mps"),
        (Card("cpu"), torch.bfloat16, "this is cpu"),
    ],
)
def test_the_way_of_cards_is_taken_on_tensor_cores_in_16_bits(card, dtype, reason):
    found = vae_card.blocked_by(card, dtype)

    assert (found is None) if reason is None else (reason in found)


@pytest.mark.parametrize(
    ("card", "version", "reason"),
    [
        (HOPPER, None, "the triton package is not installed"),
        (HOPPER, (3, 1), "it needs Triton 3.2 and this is 3.1"),
        (Card("cuda", (7, 5)), (3, 6), "it needs compute capability 8.0 and this is 7.5"),
        (Card("rocm", (9, 4)), (3, 6), "our kernels have not been tried on AMD cards"),
        (Card("cpu"), (3, 6), "it needs an NVIDIA GPU and this is cpu"),
    ],
)
def test_the_plain_pass_runs_where_the_kernel_cannot_and_the_log_says_why(
    card, version, reason, monkeypatch, caplog
):
    monkeypatch.setattr(channels, "describe_card", lambda device: card)
    monkeypatch.setattr(triton_support, "triton_version", lambda: version)

    with caplog.at_level("INFO"):
        chosen = select_anew()

    assert chosen is channels.plain
    assert f"passes between convolutions: PyTorch ({reason})" in caplog.text


def test_a_triton_that_cannot_be_imported_leaves_the_plain_pass(monkeypatch, caplog):
    def broken():
        raise ImportError("libcuda.so.1 is missing")

    monkeypatch.setattr(channels, "describe_card", lambda device: HOPPER)
    monkeypatch.setattr(triton_support, "triton_version", broken)

    with caplog.at_level("INFO"):
        chosen = select_anew()

    assert chosen is channels.plain
    assert "PyTorch (triton cannot be imported: libcuda.so.1 is missing)" in caplog.text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (channels.plain, None),
        (lambda sums, between: between.total.zero_(), r"our kernel is wrong here by .*0\.5% is"),
        (no_compiler, "our kernel does not run here: CalledProcessError"),
    ],
    ids=["right", "wrong", "without a compiler"],
)
def test_the_trial_takes_a_right_kernel_alone(row, reason, monkeypatch, faked_triton):
    faked_triton(row)

    found = channels._trial(torch.device("cpu"))

    assert found is None if reason is None else re.match(reason, found)
