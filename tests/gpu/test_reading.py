"""Weights of a mapped file on a card, read by several threads."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightx2v_core.assemble import load_vae
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.memory.lending import Lent
from lightx2v_core.memory.reading import PIECE_BYTES, to_device
from lightx2v_core.wan.vae import VaeConfig, WanVae
from tests.conftest import fill

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no card")]


def test_every_bit_of_a_mapped_file_reaches_the_card_while_it_computes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sizes = (3 * PIECE_BYTES + 17, 5, 2**20, 10 * PIECE_BYTES)
    stored = {
        str(n): torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
        for n, size in enumerate(sizes)
    }
    save_file(stored, tmp_path / "weights.safetensors")
    mapped = open_checkpoint(tmp_path / "weights.safetensors").tensors({n: n for n in stored})
    for _ in range(3):  # memory that kernels still write to is handed out again
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            busy = torch.tanh(busy @ busy)
        del busy
        copies = to_device([mapped[n] for n in stored], torch.device("cuda"))

        for copy, expected in zip(copies, stored.values(), strict=True):
            assert copy.device.type == "cuda" and torch.equal(copy.cpu(), expected)


def test_a_module_is_lent_as_it_lies_in_its_file_and_nothing_is_copied_back(tmp_path):
    path = tmp_path / "vae.safetensors"
    save_file(fill(WanVae(VaeConfig(32, 32))).bfloat16().state_dict(), path)
    vae = load_vae(path, torch.bfloat16)
    places = {name: tensor.data_ptr() for name, tensor in vae.state_dict().items()}
    stored = load_file(path)

    given, found = Lent(vae), []
    for _ in range(2):  # the second time from the page-locked copy
        with torch.inference_mode(), given.borrowed(torch.device("cuda")):
            found.append({name: tensor.cpu() for name, tensor in vae.state_dict().items()})
    lent, again = found

    assert given.pinned_bytes >= given.nbytes
    assert all(torch.equal(again[name], lent[name]) for name in stored)
    assert all(torch.equal(lent[name].view_as(stored[name]), stored[name]) for name in stored)
    assert places == {name: tensor.data_ptr() for name, tensor in vae.state_dict().items()}
