from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.memory import rss_anon
from lightx2v_core.checkpoint.mapping import MappedFile
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.errors import CheckpointError


@pytest.mark.skipif(sys.platform != "linux", reason="reservations are Linux's")
def test_a_file_larger_than_ram_is_mapped(tmp_path: Path) -> None:
    """A sparse one here. A mapping with a reservation of that size is refused."""
    path = tmp_path / "large"
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with path.open("wb") as file:
        file.truncate(size)

    tail = MappedFile(path).tensor(size - 8, torch.float32, (2,))

    assert tail.tolist() == [0.0, 0.0]


def test_tensors_need_no_alignment_and_outlive_their_file_object(tmp_path: Path) -> None:
    path = tmp_path / "small"
    numbers = torch.tensor([[1.5, -2.0], [3.0, 4.0]])
    path.write_bytes(b"\x07" + numbers.numpy().tobytes())

    tensor = MappedFile(path).tensor(1, torch.float32, (2, 2))

    assert torch.equal(tensor, numbers)


def test_writing_to_a_tensor_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(bytes(8))

    MappedFile(path).tensor(0, torch.uint8, (8,)).fill_(9)

    assert path.read_bytes() == bytes(8)


def test_a_tensor_without_values_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(bytes(4))

    assert MappedFile(path).tensor(4, torch.float32, (0, 3)).shape == (0, 3)


def test_what_cannot_be_mapped_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()

    for name in ("empty", "absent"):
        with pytest.raises(CheckpointError, match=f"{name} cannot be mapped into memory"):
            MappedFile(tmp_path / name)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_a_pickle_is_mapped_and_one_that_cannot_be_is_told_to_come_as_safetensors(tmp_path):
    """PyTorch maps it with a reservation: a file larger than RAM and swap is refused by Linux with
    the same error as one beyond the limit of address space."""
    import resource

    path = tmp_path / "model.pt"
    torch.save({"a.weight": torch.zeros(2**25)}, path)
    open_checkpoint(path)
    before, unlimited = rss_anon(), resource.getrlimit(resource.RLIMIT_AS)
    opened = open_checkpoint(path)
    held = rss_anon() - before
    sizes = Path("/proc/self/status").read_text().partition("VmSize:")[2].split()
    resource.setrlimit(resource.RLIMIT_AS, (int(sizes[0]) * 1024 + 2**25, unlimited[1]))
    try:
        with pytest.raises(CheckpointError, match=r"model.pt is larger .* the safetensors form"):
            open_checkpoint(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)

    assert opened.headers["a.weight"].shape == (2**25,)
    assert held < 2**22, "128 MB of weights stay in their file"
