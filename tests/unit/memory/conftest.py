"""Small files of one generation, shared by the tests that run all of it."""

from __future__ import annotations

import mmap
import sys
from dataclasses import replace

import pytest
from safetensors.torch import save_file

from lightx2v_core.assemble import Parts
from lightx2v_core.checkpoint.mapping import POPULATE_READ
from lightx2v_core.wan.model import WanModel
from lightx2v_core.wan.vae import VaeConfig, WanVae
from tests.conftest import VARIANTS, fill
from tests.unit.text.samples import official_tensors, spiece_tensor


def _populates() -> bool:
    """Whether this system reads mapped pages on request and reports the ones it cannot read."""
    if sys.platform != "linux":
        return False
    try:
        mmap.mmap(-1, mmap.PAGESIZE).madvise(POPULATE_READ)
    except OSError:
        return False
    return True


needs_populate = pytest.mark.skipif(
    not _populates(), reason="needs Linux 5.14, which reports pages that cannot be read"
)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Transformers in bf16, which a CPU casts to float32: their blocks lie in RAM."""
    root = tmp_path_factory.mktemp("parts")
    config = replace(VARIANTS["t2v"], dim=128, ffn_dim=192, num_layers=4)
    for seed, name in enumerate(("high_noise", "low_noise")):
        weights = fill(WanModel(config)).state_dict()
        halves = {k: (v * (1 - 0.1 * seed)).bfloat16() for k, v in weights.items()}
        save_file(halves, root / f"wan2.2_{name}.safetensors")
    save_file(fill(WanVae(VaeConfig(8, 8))).state_dict(), root / "vae.safetensors")
    save_file(
        official_tensors(dim=64) | {"spiece_model": spiece_tensor()}, root / "umt5.safetensors"
    )
    return Parts(
        root / "wan2.2_high_noise.safetensors", root / "vae.safetensors", root / "umt5.safetensors"
    )
