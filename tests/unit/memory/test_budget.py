"""RAM while two experts run that do not fit into it, sampled all the way."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.memory import rss_anon
from lightx2v_core.assemble import Parts
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.memory import ram
from lightx2v_core.memory.plan import WORKSPACE_BYTES
from lightx2v_core.pipeline import GenerateRequest, Pipeline
from lightx2v_core.wan.model import WanModel
from tests.conftest import VARIANTS, fill

SECONDS = 0.05
RAM_GB, EXPERT_GB = 16, 14.5  # the machine and one A14B expert in fp8


class Sampler:
    """RssAnon every 50 ms, as growth since it began."""

    def __enter__(self) -> Sampler:
        gc.collect()
        ram.trim()
        self.start, self.seen, self.stopped = rss_anon(), [], threading.Event()
        self.thread = threading.Thread(target=self._follow)
        self.thread.start()
        return self

    def _follow(self) -> None:
        while not self.stopped.wait(SECONDS):
            self.seen.append(rss_anon() - self.start)

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()


@pytest.fixture(scope="module")
def pair(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Experts in the number format that a CPU computes in, so that they stay mapped."""
    root = tmp_path_factory.mktemp("experts")
    weights = fill(WanModel(replace(VARIANTS["t2v"], dim=512, ffn_dim=1536, num_layers=6)))
    for noise in ("high", "low"):
        save_file(weights.state_dict(), root / f"wan2.2_{noise}_noise.safetensors")
    return replace(
        parts,
        transformer=root / "wan2.2_high_noise.safetensors",
        low=root / "wan2.2_low_noise.safetensors",
    )


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_two_experts_stream_from_their_files_within_the_ram_of_half_of_them(parts, pair):
    """In the proportions of two fp8 experts of 14.5 GB and 16 GB of RAM; no block is resident.

    The libraries' own RAM is not counted: a smaller model has run before.
    """
    request = GenerateRequest("a red circle", size=VideoSize(64, 64, 9), seed=3)
    Pipeline(parts, torch.device("cpu")).generate(request)
    with Sampler() as used:
        made = Pipeline(pair, torch.device("cpu"))
        engine = made.experts[0].residency
        activations = made.turns.activations(made.experts[0], request.size)
        made.vram_bytes = WORKSPACE_BYTES + activations + engine.card_bytes(0)
        result = made.generate(request)
    size = sum(sum(expert.residency.block_bytes) for expert in made.experts)
    budget = size * RAM_GB / (2 * EXPERT_GB)

    free = Pipeline(pair, torch.device("cpu")).generate(request)

    assert [line.partition(",")[0] for line in result.memory] == [
        "high-noise transformer: resident 0/6 blocks",
        "low-noise transformer: resident 0/6 blocks",
    ]
    assert len(used.seen) >= 8
    assert max(used.seen) <= budget < 0.6 * size, f"{max(used.seen) / 1e6:.0f} MB"
    assert torch.equal(result.frames, free.frames)
    print(f"RssAnon grew by {max(used.seen) / 1e6:.0f} of {budget / 1e6:.0f} MB at most")
