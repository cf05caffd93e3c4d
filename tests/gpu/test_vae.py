"""The VAE on a real card: 16 bits near float32, the kernel near PyTorch, the way home exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightx2v_core.ops import channels
from lightx2v_core.ops.channels import Between
from lightx2v_core.wan.vae import VaeConfig, WanVae
from tests.conftest import fill, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
HALVES = [torch.bfloat16, torch.float16]
# Relative errors after some forty layers with random weights: bfloat16 keeps 8 bits, float16 11.
ERRORS = {torch.bfloat16: 0.05, torch.float16: 0.01}
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
WIDTHS = [(96, 96), (24, 24), (8, 16)]


def on_card(widths: tuple[int, int], dtype: torch.dtype) -> WanVae:
    return fill(WanVae(VaeConfig(*widths))).to("cuda", dtype)


def clip(frames: int, *given: int) -> Tensor:
    """On the CPU; all frames, or those `given` on grey."""
    generator = torch.Generator().manual_seed(frames)
    pixels = torch.rand(1, 3, frames, 64, 80, generator=generator) * 2 - 1
    for frame in range(frames) if given else ():
        if frame not in given:
            pixels[:, :, frame] = 0.0
    return pixels


def latent(frames: int) -> Tensor:
    return torch.randn(1, 16, frames, 8, 10, generator=torch.Generator().manual_seed(frames))


@torch.inference_mode()
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bits_on_the_card_stay_near_float32_on_the_cpu(widths, dtype):
    exact, half = fill(WanVae(VaeConfig(*widths))), on_card(widths, dtype)

    encoded, decoded = half.encode(clip(17).cuda()), half.decode(latent(3).cuda())

    assert relative_error(encoded.cpu(), exact.encode(clip(17))) <= ERRORS[dtype]
    assert relative_error(decoded.cpu(), exact.decode(latent(3))) <= ERRORS[dtype]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_fast_layers_are_as_near_to_float32_as_the_plain_ones(dtype):
    exact, half = fill(WanVae(VaeConfig())).cuda(), on_card((96, 96), dtype)
    pixels, cells = clip(17).cuda(), latent(3).cuda()
    reference = exact.encode(pixels), exact.decode(cells)

    fast = half.encode(pixels), half.decode(cells)
    half.plain_layers = True
    plain = half.encode(pixels), half.decode(cells)

    for expected, of_fast, of_plain in zip(reference, fast, plain, strict=True):
        assert not torch.equal(of_fast, of_plain)
        assert relative_error(of_fast, expected) <= 1.1 * relative_error(of_plain, expected)


@torch.inference_mode()
@pytest.mark.parametrize("given", [(0,), (0, 32), (0, 1, 2)])
def test_a_clip_that_stands_still_encodes_as_near_as_one_computed_whole(given):
    exact, half = fill(WanVae(VaeConfig())).cuda(), on_card((96, 96), torch.bfloat16)
    half_of_noise = relative_error(half.encode(clip(33).cuda()), exact.encode(clip(33).cuda()))

    encoded = half.encode(clip(33, *given).cuda())

    assert relative_error(encoded, exact.encode(clip(33, *given).cuda())) <= 2 * half_of_noise


@torch.inference_mode()
@pytest.mark.parametrize("latents_per_chunk", [2, 5])
def test_more_latent_frames_at_once_stay_within_the_rounding(latents_per_chunk):
    half = on_card((96, 96), torch.bfloat16)
    options = {"latents_per_chunk": latents_per_chunk}
    encoded, decoded = half.encode(clip(17).cuda()), half.decode(latent(5).cuda())

    error = ERRORS[torch.bfloat16]
    assert relative_error(half.encode(clip(17).cuda(), **options), encoded) <= error
    assert relative_error(half.decode(latent(5).cuda(), **options), decoded) <= error


@torch.inference_mode()
def test_frames_that_leave_while_the_next_are_decoded_arrive_bit_for_bit():
    half = on_card((24, 24), torch.float16)

    arrived = half.decode(latent(9).cuda(), output_device="cpu")

    assert arrived.device.type == "cpu"
    assert torch.equal(arrived, half.decode(latent(9).cuda()).cpu())


@torch.inference_mode()
@pytest.mark.parametrize("channels_", [8, 24, 96, 192, 384])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("phases", [False, True])
def test_the_kernel_gives_what_pytorch_gives(channels_, dtype, phases):
    fused = channels.select_pass(torch.device("cuda"))
    assert fused is not channels.plain
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    sums = random(3, 5, 7, 4 * channels_) if phases else random(3, 8, 12, channels_)
    bias, gain, residual = random(channels_), random(channels_), random(3, 8, 12, channels_)
    results = []
    for row in (channels.plain, fused):
        total, activated = torch.empty_like(residual), torch.empty_like(residual)
        row(sums, Between(bias, residual, total, gain, activated), phases)
        results.append((total, activated))

    for expected, given in zip(*results, strict=True):
        assert relative_error(given.float(), expected.float()) <= 2 * ROUNDING[dtype]
