"""The VAE by itself: chunks, tiles, sizes, cancelling and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightx2v_core.errors import CheckpointError, RequestError
from lightx2v_core.wan import vae_layers
from lightx2v_core.wan.vae import VaeConfig, WanVae, denormalise, normalise
from lightx2v_core.wan.vae_layers import RMSNorm, Stream
from tests.unit.wan.small_vaes import clip, latent, small_vae

# Chunks and tiles change the shapes that convolutions run on, so sums run in another order; where
# only four channels are normalised, a pixel near zero amplifies that. Measured 7e-6 at most.
REORDERED = 5e-5


class CancelledError(Exception):
    pass


@pytest.fixture(scope="module")
def vae() -> WanVae:
    return small_vae()


@pytest.fixture(scope="module")
def local_vae() -> WanVae:
    """Without what attention adds: far from a tile's edge nothing depends on what is beyond."""
    vae = small_vae()
    for half in (vae.encoder, vae.decoder):
        half.middle[1].proj.weight.zero_()
    return vae


def close(actual: Tensor, expected: Tensor) -> bool:
    scale = float(expected.abs().max())
    return float((actual - expected).abs().max()) <= REORDERED * scale


def test_81_frames_are_21_latent_frames_and_back(vae: WanVae) -> None:
    encoded = vae.encode(clip(81))
    decoded = vae.decode(encoded)

    assert encoded.shape == (1, 16, 21, 2, 3)
    assert decoded.shape == (1, 3, 81, 16, 24)
    assert encoded.dtype == decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1.0


@pytest.mark.parametrize("latents_per_chunk", [2, 3, 7, 100])
def test_chunks_of_any_size_encode_the_same(vae: WanVae, latents_per_chunk: int) -> None:
    one_by_one = vae.encode(clip(25, batch=2))

    in_chunks = vae.encode(clip(25, batch=2), latents_per_chunk=latents_per_chunk)

    assert close(in_chunks, one_by_one)


@pytest.mark.parametrize("latents_per_chunk", [2, 3, 7, 100])
def test_chunks_of_any_size_decode_the_same(vae: WanVae, latents_per_chunk: int) -> None:
    one_by_one = vae.decode(latent(7, batch=2))

    in_chunks = vae.decode(latent(7, batch=2), latents_per_chunk=latents_per_chunk)

    assert close(in_chunks, one_by_one)


def test_later_frames_do_not_change_earlier_ones(vae: WanVae) -> None:
    whole = vae.decode(latent(5))

    start = vae.decode(latent(5)[:, :, :3])

    assert torch.equal(start, whole[:, :, :9])


def test_a_batch_is_its_clips_one_by_one(vae: WanVae) -> None:
    clips, latents = clip(5, batch=3), latent(2, batch=3)

    encoded, decoded = vae.encode(clips), vae.decode(latents)

    assert close(encoded, torch.cat([vae.encode(one) for one in clips.split(1)]))
    assert close(decoded, torch.cat([vae.decode(one) for one in latents.split(1)]))


def test_two_calls_can_interleave(vae: WanVae) -> None:
    inner: list[Tensor] = []

    outer = vae.decode(latent(3), lambda done, _: inner.append(vae.decode(latent(2))))

    assert torch.equal(outer, vae.decode(latent(3)))
    assert torch.equal(inner[1], vae.decode(latent(2)))


def test_the_result_is_collected_where_asked(vae: WanVae) -> None:
    decoded = vae.decode(latent(2), output_device="meta")
    encoded = vae.encode(clip(5), output_device="meta")

    assert decoded.device.type == encoded.device.type == "meta"


def test_half_precision_weights_compute_in_half_and_return_float32() -> None:
    half = small_vae().to(torch.bfloat16)

    decoded = half.decode(latent(2))

    expected = small_vae().decode(latent(2))
    assert decoded.dtype == torch.float32
    # bfloat16 keeps 8 bits; some forty layers deep a few per cent remain.
    assert (decoded - expected).norm() <= 0.05 * expected.norm()


def test_the_direct_onednn_call_gives_what_pytorch_chooses(
    vae: WanVae, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, decoded = vae.encode(clip(9)), vae.decode(latent(3))

    monkeypatch.setattr(vae_layers, "has_onednn", lambda: False)

    assert close(vae.encode(clip(9)), encoded)
    assert close(vae.decode(latent(3)), decoded)


def test_a_pixel_of_all_zeros_has_finite_gradients() -> None:
    x = torch.zeros(1, 4, 1, 2, 2, requires_grad=True)

    RMSNorm(4)(x).sum().backward()

    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_gradients_reach_every_weight_through_the_whole_clip_path() -> None:
    vae = small_vae().requires_grad_(True)

    moments = vae.conv1(vae.encoder(clip(5), Stream()))
    vae.decoder(vae.conv2(moments[:, :16]), Stream()).square().mean().backward()

    silent = [name for name, weight in vae.named_parameters() if not weight.grad.abs().sum() > 0]
    assert not silent


def test_streaming_and_whole_clip_give_the_same_gradients() -> None:
    gradients = []
    for latents_per_chunk in (1, 3):
        vae = small_vae().requires_grad_(True)
        encoded = vae.encode(clip(9), latents_per_chunk=latents_per_chunk)
        vae.decode(encoded, latents_per_chunk=latents_per_chunk).square().mean().backward()
        gradients.append(vae.encoder.conv1.weight.grad)

    assert close(gradients[0], gradients[1])


def test_one_tile_is_the_whole_result_exactly(vae: WanVae) -> None:
    pixels, small = clip(5, 32, 64), latent(2, 4, 8)

    assert torch.equal(vae.encode_tiled(pixels), vae.encode(pixels))
    assert torch.equal(vae.decode_tiled(small), vae.decode(small))


def test_tiled_decode_equals_the_whole_away_from_seams(local_vae: WanVae) -> None:
    # One 640 pixel row becomes tiles 0..352 and 288..640. A decoded pixel sees 140 pixels far
    # (eleven 3x3 convolutions on latents, then six and one on each finer level), so up to 212
    # and from 428 both ways see the same; what remains is the order of sums.
    whole = local_vae.decode(latent(2, 2, 80))

    tiled = local_vae.decode_tiled(latent(2, 2, 80), tile=384, overlap=64)

    assert close(tiled[..., :212], whole[..., :212])
    assert close(tiled[..., 428:], whole[..., 428:])
    assert not torch.equal(tiled[..., 288:352], whole[..., 288:352])
    assert (tiled - whole).norm() <= 0.05 * whole.norm()


def test_tiled_encode_equals_the_whole_away_from_seams(local_vae: WanVae) -> None:
    # As above, on a grid of tiles in both directions; a latent sees 140 pixels or 18 cells far.
    pixels = clip(1, 448, 640)
    whole = local_vae.encode(pixels)

    tiled = local_vae.encode_tiled(pixels, tile=384, overlap=64)

    assert tiled.shape == whole.shape == (1, 16, 1, 56, 80)
    assert close(tiled[..., :14, :26], whole[..., :14, :26])
    assert close(tiled[..., -14:, -26:], whole[..., -14:, -26:])
    assert (tiled - whole).norm() <= 0.05 * whole.norm()


def test_tiles_report_progress_over_all_of_them_and_can_be_cancelled(vae: WanVae) -> None:
    seen: list[tuple[int, int]] = []

    def cancel(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 3:
            raise CancelledError

    with pytest.raises(CancelledError):
        vae.decode_tiled(latent(2, 4, 12), cancel, tile=64, overlap=16)

    assert seen == [(1, 4), (2, 4), (3, 4)]


def test_joining_tiles_keeps_what_they_agree_on(vae: WanVae) -> None:
    # Three tiles meet in places here, as the overlap is half a tile.
    vae = small_vae()
    vae.decoder.head[2].weight.zero_()
    vae.decoder.head[2].bias.copy_(torch.tensor([2.0, 0.25, -0.5]))

    tiled = vae.decode_tiled(latent(1, 5, 11), tile=32, overlap=16)

    expected = torch.tensor([1.0, 0.25, -0.5]).view(3, 1, 1, 1).expand(1, 3, 1, 40, 88)
    torch.testing.assert_close(tiled, expected)
    assert tiled.max() <= 1.0


def test_normalise_undoes_denormalise() -> None:
    given = latent(3)

    assert normalise(denormalise(given)).sub(given).abs().max() <= 1e-6
    assert normalise(denormalise(given.half())).dtype == torch.float32


@pytest.mark.parametrize(("frames", "nearest"), [(80, 81), (4, 5), (2, 1), (83, 85), (0, 1)])
def test_frames_that_do_not_fit_are_refused_with_the_nearest(
    vae: WanVae, frames: int, nearest: int
) -> None:
    with pytest.raises(RequestError, match=rf"{frames} frames is not 4\*n \+ 1; use {nearest}$"):
        vae.encode(torch.zeros(1, 3, frames, 16, 16))


def test_sides_that_do_not_fit_are_refused_with_the_nearest(vae: WanVae) -> None:
    with pytest.raises(RequestError, match="21x16 is not divisible by 8; use 24x16"):
        vae.encode(torch.zeros(1, 3, 1, 16, 21))


def test_tensors_of_another_kind_are_refused(vae: WanVae) -> None:
    with pytest.raises(RequestError, match=r"needs \(batch, 3, frames, height, width\)"):
        vae.encode_tiled(torch.zeros(3, 1, 16, 16))
    with pytest.raises(RequestError, match="48 channels belong to the 5B model"):
        vae.decode(torch.zeros(1, 48, 1, 2, 2))
    with pytest.raises(RequestError, match=r"this latent is \(16, 2, 2\)"):
        vae.decode_tiled(torch.zeros(16, 2, 2))


@pytest.mark.parametrize(("tile", "overlap"), [(250, 64), (64, 64), (256, 60), (0, 0)])
def test_tiles_that_do_not_fit_are_refused(vae: WanVae, tile: int, overlap: int) -> None:
    with pytest.raises(RequestError, match=f"tile {tile} with overlap {overlap} does not fit"):
        vae.decode_tiled(latent(1), tile=tile, overlap=overlap)


def test_an_empty_chunk_is_refused(vae: WanVae) -> None:
    with pytest.raises(RequestError, match="0 latent frames per chunk; use 1 or more"):
        vae.decode(latent(1), latents_per_chunk=0)


@pytest.mark.parametrize("config", [VaeConfig(), VaeConfig(24, 24), VaeConfig(16, 16)])
def test_widths_are_read_from_shapes(config: VaeConfig) -> None:
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in WanVae(config).state_dict().items()}

    assert VaeConfig.from_shapes(shapes) == config


def test_lightvae_has_a_quarter_of_every_width() -> None:
    with torch.device("meta"):
        vae = WanVae(VaeConfig(24, 24))

    encoder = [vae.encoder.downsamples[i].residual[2].in_channels for i in (0, 3, 6, 9)]
    decoder = [vae.decoder.upsamples[i].residual[2].out_channels for i in (0, 4, 8, 12)]
    assert [vae.encoder.conv1.out_channels, *encoder] == [24, 24, 24, 48, 96]
    assert [vae.decoder.conv1.out_channels, *decoder] == [96, 96, 96, 48, 24]


def test_weights_are_assigned_to_a_vae_built_without_memory() -> None:
    source = small_vae()
    with torch.device("meta"):
        empty = WanVae(VaeConfig(4, 4))

    empty.load_state_dict(source.state_dict(), strict=True, assign=True)

    assert torch.equal(empty.decode(latent(2)), source.decode(latent(2)))


def test_files_that_are_not_this_vae_are_refused_by_name() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in WanVae(VaeConfig(4, 4)).state_dict().items()}
    of_5b = shapes | {"decoder.upsamples.0.upsamples.0.residual.2.weight": (1024, 1024, 3, 3, 3)}

    with pytest.raises(CheckpointError, match=r"new.pt .* only for the 5B model; Wan 2.2 14B"):
        VaeConfig.from_shapes(of_5b, "new.pt")
    with pytest.raises(CheckpointError, match=r"wan2.2_vae \(48 latent channels\)"):
        VaeConfig.from_shapes(shapes | {"conv2.weight": (48, 48, 1, 1, 1)})
    with pytest.raises(CheckpointError, match="has 8 latent channels"):
        VaeConfig.from_shapes(shapes | {"conv2.weight": (8, 8, 1, 1, 1)})
    with pytest.raises(CheckpointError, match=r"lacks .* holds decoder.1.weight"):
        VaeConfig.from_shapes({"decoder.1.weight": (64, 16, 3, 3)}, "taew2_1.pth")
