"""The way the VAE runs on a card, here in float32 on the CPU: the plain layers' numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightx2v_core.device import Card
from lightx2v_core.ops import channels
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
    ("card", "package", "reason"),
    [
        (HOPPER, object(), None),
        (HOPPER, None, "triton package is not installed"),
        (Card("cuda", (7, 5)), object(), "compute capability 8.0 and this is 7.5"),
        (Card("rocm", (9, 4)), object(), "this is rocm"),
        (Card("cpu"), object(), "this is cpu"),
    ],
)
def test_the_kernel_runs_where_triton_does(card, package, reason, monkeypatch):
    monkeypatch.setattr(channels, "find_spec", lambda name: package)

    found = channels.blocked_by(card)

    assert (found is None) if reason is None else (reason in found)


def test_a_triton_that_cannot_be_imported_leaves_the_plain_pass(monkeypatch, caplog):
    monkeypatch.setattr(channels, "blocked_by", lambda card: None)
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    channels.select_pass.cache_clear()

    with caplog.at_level("INFO"):
        chosen = channels.select_pass(torch.device("cpu"))

    channels.select_pass.cache_clear()
    assert chosen is channels.plain
    assert "PyTorch (triton cannot be imported" in caplog.text
