"""What the VAE and the tiny one promise alike."""

from __future__ import annotations

import pytest
import torch

from lightx2v_core.wan.tae import TinyVae
from lightx2v_core.wan.vae import WanVae
from tests.unit.wan.small_vaes import clip, latent, small_tiny_vae, small_vae

Vae = WanVae | TinyVae


class CancelledError(Exception):
    pass


@pytest.fixture(scope="module", params=[small_vae, small_tiny_vae], ids=["vae", "tiny"])
def vae(request: pytest.FixtureRequest) -> Vae:
    return request.param()


def test_progress_counts_the_chunks(vae: Vae) -> None:
    seen: list[tuple[int, int]] = []

    vae.encode(clip(9), lambda *news: seen.append(news))
    vae.decode(latent(3), lambda *news: seen.append(news), latents_per_chunk=2)

    assert seen == [(1, 3), (2, 3), (3, 3), (1, 2), (2, 2)]


@pytest.mark.parametrize("work", ["encode", "decode"])
def test_a_cancelled_call_stops_at_once_and_leaves_nothing_behind(vae: Vae, work: str) -> None:
    run, given = getattr(vae, work), clip(13) if work == "encode" else latent(4)
    before, seen = run(given), []

    def cancel(done: int, _total: int) -> None:
        seen.append(done)
        if done == 2:
            raise CancelledError

    with pytest.raises(CancelledError):
        run(given, cancel)

    assert seen == [1, 2]
    assert torch.equal(run(given), before)
