"""The tiny VAE by itself: frames, chunks, scales, cancelling and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightx2v_core.conditioning import check_encodes
from lightx2v_core.errors import RequestError
from lightx2v_core.wan.tae import TinyConfig, TinyVae
from lightx2v_core.wan.vae import VaeConfig, WanVae, denormalise, normalise
from tests.conftest import relative_error
from tests.tolerances import FLOAT32_PARITY
from tests.unit.wan.small_vaes import clip, latent, small_tiny_vae


@pytest.fixture(scope="module")
def vae() -> TinyVae:
    return small_tiny_vae()


def test_81_frames_are_21_latent_frames_and_back(vae: TinyVae) -> None:
    encoded = vae.encode(clip(81))
    decoded = vae.decode(encoded)

    assert encoded.shape == (1, 16, 21, 2, 3)
    assert decoded.shape == (1, 3, 81, 16, 24)
    assert encoded.dtype == decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1.0
    assert decoded.abs().lt(1.0).float().mean() > 0.9


@pytest.mark.parametrize("latents_per_chunk", [2, 3, 7, 100])
def test_chunks_of_any_size_give_the_same(vae: TinyVae, latents_per_chunk: int) -> None:
    decoded, encoded = vae.decode(latent(7, batch=2)), vae.encode(clip(25, batch=2))

    at_once = vae.decode(latent(7, batch=2), latents_per_chunk=latents_per_chunk)
    encoded_at_once = vae.encode(clip(25, batch=2), latents_per_chunk=latents_per_chunk)

    assert relative_error(at_once, decoded) <= FLOAT32_PARITY
    assert relative_error(encoded_at_once, encoded) <= FLOAT32_PARITY


def test_later_latent_frames_do_not_change_earlier_pictures(vae: TinyVae) -> None:
    whole = vae.decode(latent(5))

    start = vae.decode(latent(5)[:, :, :3])

    assert torch.equal(start, whole[:, :, :9])


def test_every_latent_frame_reaches_the_picture(vae: TinyVae) -> None:
    given = latent(3)
    whole = vae.decode(given)

    for frame in range(3):
        changed = given.clone()
        changed[:, :, frame] += 1.0
        first = max(4 * frame - 3, 0)

        decoded = vae.decode(changed)

        assert torch.equal(decoded[:, :, :first], whole[:, :, :first])
        assert not torch.equal(decoded[:, :, first], whole[:, :, first])


def test_a_batch_is_its_clips_one_by_one(vae: TinyVae) -> None:
    latents, clips = latent(2, batch=3), clip(5, batch=3)

    decoded, encoded = vae.decode(latents), vae.encode(clips)

    one_by_one = torch.cat([vae.decode(one) for one in latents.split(1)])
    assert relative_error(decoded, one_by_one) <= FLOAT32_PARITY
    one_by_one = torch.cat([vae.encode(one) for one in clips.split(1)])
    assert relative_error(encoded, one_by_one) <= FLOAT32_PARITY


def test_lighttae_reads_and_writes_latents_as_they_come_from_the_encoder() -> None:
    # The same weights as taew2_1: only what lies between them and the core's latents differs.
    plain, light = small_tiny_vae("taew2_1"), small_tiny_vae("lighttaew2_1")

    torch.testing.assert_close(light.decode(latent(3)), plain.decode(denormalise(latent(3))))
    torch.testing.assert_close(light.encode(clip(9)), normalise(plain.encode(clip(9))))
    assert relative_error(light.decode(latent(3)), plain.decode(latent(3))) > 0.05


def test_half_precision_weights_compute_in_half_and_return_float32() -> None:
    half = small_tiny_vae().to(torch.bfloat16)

    decoded = half.decode(latent(2))

    # bfloat16 keeps 8 bits; thirty convolutions deep a few per cent remain.
    assert decoded.dtype == torch.float32
    assert 0.0 < relative_error(decoded, small_tiny_vae().decode(latent(2))) <= 0.05


def test_the_result_is_collected_where_asked(vae: TinyVae) -> None:
    decoded = vae.decode(latent(2), output_device="meta")
    encoded = vae.encode(clip(5), output_device="meta")

    assert decoded.device.type == encoded.device.type == "meta"


def test_a_decoder_alone_says_what_to_encode_with() -> None:
    alone = small_tiny_vae(encoder_width=0)

    assert torch.equal(alone.decode(latent(2)), small_tiny_vae().decode(latent(2)))
    with pytest.raises(RequestError, match=r"cannot encode; use wan_2\.1_vae for that"):
        alone.encode(clip(5))


@pytest.mark.parametrize("release", ["taew2_1", "lighttaew2_1"])
def test_tensors_of_another_kind_are_refused(release: str) -> None:
    with pytest.raises(RequestError, match="48 channels belong to the 5B model"):
        small_tiny_vae(release).decode(torch.zeros(1, 48, 1, 2, 2))
    with pytest.raises(RequestError, match=r"80 frames is not 4\*n \+ 1; use 81"):
        small_tiny_vae(release).encode(torch.zeros(1, 3, 80, 16, 16))
    with pytest.raises(RequestError, match="0 latent frames per chunk"):
        small_tiny_vae(release).decode(latent(1), latents_per_chunk=0)


def test_a_start_image_is_mixed_with_the_frames_behind_it_and_so_refused(vae: TinyVae) -> None:
    one, other = clip(5), clip(5)
    other[:, :, 1:4] = 0.0

    first, second = vae.encode(one)[:, :, 0], vae.encode(other)[:, :, 0]

    assert relative_error(first, second) > 0.01  # what the refusal says
    with pytest.raises(RequestError, match=r"Encode with wan_2\.1_vae; the tiny one can still"):
        check_encodes(vae)
    check_encodes(WanVae(VaeConfig(4, 4)))


def multiplications(vae: WanVae | TinyVae, latent_frames: int) -> int:
    """Of the convolutions that decode a clip of 128x128 pixels."""
    counts: list[int] = []

    def count(conv: nn.Conv2d | nn.Conv3d, _given: tuple, made: Tensor) -> None:
        counts.append(made.numel() * conv.weight[0].numel())

    convolutions = [m for m in vae.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    handles = [conv.register_forward_hook(count) for conv in convolutions]
    vae.decode(torch.zeros(1, 16, latent_frames, 16, 16, device="meta"))
    for handle in handles:
        handle.remove()
    return sum(counts)


def test_decoding_takes_a_25th_and_lightvae_a_16th_of_the_real_vaes_arithmetic() -> None:
    with torch.device("meta"):
        real, light = WanVae(VaeConfig()), WanVae(VaeConfig(24, 24))
        tiny = TinyVae(TinyConfig("taew2_1"))

    # What one more latent frame costs; the first one is cheaper.
    whole, a_16th, a_25th = (
        multiplications(vae, 3) - multiplications(vae, 2) for vae in (real, light, tiny)
    )

    assert whole == pytest.approx(2.8e11, rel=0.02)
    assert whole / a_16th == pytest.approx(16, rel=0.02)
    assert whole / a_25th == pytest.approx(25, rel=0.02)
