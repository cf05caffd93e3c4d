"""Clips in pieces: what stands still is computed once, and nothing else comes out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightx2v_core.wan import vae as vae_module
from lightx2v_core.wan.vae import VaeConfig, WanVae
from lightx2v_core.wan.vae_layers import Stage, Stream, run_layers
from lightx2v_core.wan.vae_pieces import Piece, cut, find_stills, stills_between, through
from tests.conftest import fill, relative_error

# oneDNN adds up in another order for another number of frames at a time. Measured 5e-7 at most.
REORDERED = 2e-6
SIDE = 8  # pixels: one latent


@pytest.fixture(scope="module")
def vae() -> WanVae:
    return fill(WanVae(VaeConfig(encoder_dim=4, decoder_dim=4)))


def pictures_on_grey(frames: int, *given: int, side: int = SIDE) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    clip = torch.zeros(1, 3, frames, side, side)
    for frame in given:
        clip[:, :, frame] = torch.rand(1, 3, side, side, generator=generator) * 2 - 1
    return clip


def encode_all(vae: WanVae, clip: Tensor, monkeypatch: pytest.MonkeyPatch, **options) -> Tensor:
    """Every frame computed."""
    with monkeypatch.context() as patch:
        patch.setattr(vae_module, "find_stills", lambda clip: [])
        return vae.encode(clip, **options)


@pytest.mark.parametrize("frames", range(1, 82, 4))
def test_a_picture_and_grey_frames_encode_as_if_all_were_computed(vae, frames, monkeypatch):
    clip = pictures_on_grey(frames, 0)

    latent = vae.encode(clip)

    expected = encode_all(vae, clip, monkeypatch)
    assert relative_error(latent, expected) <= REORDERED


@pytest.mark.parametrize("latents_per_chunk", [1, 2, 5])
@pytest.mark.parametrize(
    "given", [(0, 80), (0, 1, 2), (), (40,), (0, 1, 2, 3, 79, 80), (0, 9, 19, 20, 33)]
)
def test_pictures_anywhere_encode_as_if_all_were_computed(
    vae, given, latents_per_chunk, monkeypatch
):
    clip = pictures_on_grey(81, *given)

    latent = vae.encode(clip, latents_per_chunk=latents_per_chunk)

    expected = encode_all(vae, clip, monkeypatch, latents_per_chunk=latents_per_chunk)
    assert relative_error(latent, expected) <= REORDERED


@pytest.mark.parametrize("latents_per_chunk", [1, 2])
@pytest.mark.parametrize(
    ("given", "expected"),
    [((0,), [12, 23, 23, 21]), ((0, 80), [13, 25, 25, 21]), (range(81), [81, 81, 41, 21])],
)
def test_each_stage_computes_until_its_frames_stop_changing(
    vae, given, expected, latents_per_chunk
):
    """Full resolution changes until frame 11 of 80, half until 19 of 80, quarter until 19 of 40.

    Stages that halve the frames compute up to three more, to know that no pair changes either.
    """
    clip, stages = pictures_on_grey(81, *given), vae.encoder.stages()
    computed = dict.fromkeys((stage.layers for stage in stages), 0)

    def run(layers, x_BCTHW, stream):
        computed[layers] += x_BCTHW.shape[2]
        return run_layers(layers, x_BCTHW, stream)

    stills = find_stills(clip)
    frames = cut([(0, 81)], stills)
    pieces = (
        Piece(clip[:, :, part.start : part.start + 1], part.stop - part.start)
        if (part.start, part.stop) in stills
        else Piece(clip[:, :, part])
        for part in frames
    )
    limits = [stage.frames * latents_per_chunk for stage in stages]
    encoded = sum(piece.length for piece in through(stages, pieces, limits, run, Stream()))

    assert encoded == 21
    assert list(computed.values()) == expected


def test_a_clip_whose_pixels_take_gradients_shares_none_of_them(vae):
    clip = pictures_on_grey(17, 0).requires_grad_(True)

    vae.encode(clip).square().sum().backward()

    by_frame = clip.grad.abs().sum(dim=(0, 1, 3, 4))
    assert by_frame.count_nonzero() == 17


def test_stills_are_stretches_of_frames_that_are_equal_bit_for_bit():
    clip = torch.rand(1, 3, 40, 4, 4, generator=torch.Generator().manual_seed(0))
    clip[:, :, 3:20], clip[:, :, 20:40] = clip[:, :, 3:4].clone(), clip[:, :, 20:21].clone()
    nearly = clip.clone()
    nearly[0, 0, 10, 0, 0] += 1e-7

    assert find_stills(clip) == [(3, 20), (20, 40)]
    assert find_stills(nearly) == [(11, 20), (20, 40)]
    assert find_stills(clip[:, :, :8]) == []
    assert find_stills(clip[:, :, :1]) == []


def test_chunks_are_cut_where_a_still_begins_and_ends():
    chunks = [(0, 1), (1, 5), (5, 9), (9, 13), (13, 17)]

    parts = [(s.start, s.stop) for s in cut(chunks, [(1, 10), (14, 16)])]

    assert parts == [(0, 1), (1, 10), (10, 13), (13, 14), (14, 16), (16, 17)]
    assert [(s.start, s.stop) for s in cut(chunks, [])] == chunks
    assert [(s.start, s.stop) for s in cut(chunks, [(0, 17)])] == [(0, 17)]


@pytest.mark.parametrize("sizes", [[1] * 9, [2, 2, 2, 3], [4, 1, 4], [3, 6], [9]])
def test_frames_encode_the_same_however_they_come(vae, sizes):
    clip = pictures_on_grey(9, *range(9))

    stages, stream = vae.encoder.stages(), Stream()
    pieces = [Piece(part) for part in clip.split(sizes, dim=2)]
    parts = list(through(stages, pieces, [3, 2, 5, 1], run_layers, stream))

    whole = vae.encoder(clip, Stream())
    assert relative_error(torch.cat([p.frames for p in parts], dim=2), whole) <= REORDERED


def test_pieces_are_gathered_up_to_the_limit_and_split_above_it():
    seen = []

    def run(layers, x_BCTHW, stream):
        seen.append(x_BCTHW.shape[2])
        return x_BCTHW

    pieces = (Piece(torch.zeros(1, 1, n, 1, 1)) for n in (1, 2, 2, 9, 1))
    lengths = [p.length for p in through([Stage((), 0, 1)], pieces, [4], run, Stream())]

    assert seen == lengths == [3, 2, 4, 4, 1, 1]


@pytest.mark.parametrize("taken", [{0}, {0, 80}, {0, 1, 2, 40, 79, 80}, set(range(81)), {0, 9, 18}])
def test_stills_between_given_frames_are_those_that_would_be_found(taken):
    generator = torch.Generator().manual_seed(0)
    clip = torch.zeros(1, 3, 81, 8, 8)
    for frame in taken:
        clip[:, :, frame] = torch.rand(3, 8, 8, generator=generator)

    assert stills_between(taken, 81) == find_stills(clip)
