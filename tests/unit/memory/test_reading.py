"""Weights read from their file by several threads, on the recorded card of test_transport."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.errors import CheckpointError
from lightx2v_core.memory import reading
from lightx2v_core.memory.files import Mapped, gather
from lightx2v_core.memory.readahead import (
    PIECE_BYTES,
    ReadAhead,
    files_of,
    pieces,
    read_ahead,
    read_ahead_named,
)
from lightx2v_core.memory.reading import read_to
from tests.unit.memory.test_transport import Card

CPU = torch.device("cpu")


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(700, 1000, generator=generator).bfloat16(),
        "odd": torch.randint(0, 256, (1_300_001,), generator=generator, dtype=torch.uint8),
        "small": torch.randn(3, generator=generator),
        "b": torch.randn(513, 1024, generator=generator),
    }


@pytest.fixture
def mapped(tmp_path):
    """(path, tensors that are views of that file)"""
    path = tmp_path / "a name with  spaces.safetensors"
    save_file(weights(), path)
    checkpoint = open_checkpoint(path)
    return path, checkpoint.tensors({name: name for name in checkpoint.headers})


def test_a_mapped_tensor_is_found_in_its_file_at_its_byte(mapped):
    path, tensors = mapped

    for tensor in tensors.values():
        found, start = Mapped().locate(tensor)
        raw = path.read_bytes()[start : start + tensor.nbytes]
        assert found == path
        assert raw == tensor.contiguous().view(torch.uint8).numpy().tobytes()
    assert Mapped().locate(torch.ones(4)) is None


def test_a_file_that_was_replaced_is_not_read_in_place_of_the_mapped_one(mapped):
    path, tensors = mapped
    path.rename(path.with_name("old.safetensors"))
    save_file({"other": torch.zeros(3_000_000)}, path)

    found = Mapped().locate(tensors["a"])

    assert found is None or found[0].name == "old.safetensors"


@pytest.mark.parametrize("refuses", [False, True])
def test_every_bit_arrives_however_threads_and_copies_are_ordered(mapped, monkeypatch, refuses):
    monkeypatch.setattr(reading, "PIECE_BYTES", 100_003)
    _, tensors = mapped
    card, loose = Card(seed=3, refuses=refuses), torch.randn(600, 600)

    copies = read_to([*tensors.values(), loose, tensors["a"].t()], CPU, card)

    card.finish()
    expected = [*tensors.values(), loose, tensors["a"].t()]
    assert all(torch.equal(a, b) for a, b in zip(copies, expected, strict=True))
    assert copies[0].data_ptr() != next(iter(tensors.values())).data_ptr()
    assert sum(len(stream.queue) for stream in card.streams) == 0
    assert len(card.streams) == 1 + reading.READERS


def test_a_file_that_ends_too_early_is_an_error_and_no_thread_hangs(mapped, monkeypatch):
    path, tensors = mapped
    monkeypatch.setattr(Mapped, "locate", lambda self, tensor: (path, path.stat().st_size - 2**20))

    with pytest.raises(CheckpointError, match="ends at byte .* download it again"):
        read_to([tensors["a"]], CPU, Card())


def test_reading_ahead_reads_each_weight_file_once_in_order_and_no_further_than_there_is_room(
    tmp_path,
):
    for name, nbytes in (("b.safetensors", 3000), ("a.gguf", 500), ("note.txt", 77)):
        (tmp_path / name).write_bytes(bytes(nbytes))
    named = [tmp_path / "b.safetensors", tmp_path, tmp_path / "absent.pth"]

    everything, some = read_ahead(named, 10_000), read_ahead(named, 3100)
    everything.wait()
    some.wait()

    assert files_of(named) == [tmp_path / "b.safetensors", tmp_path / "a.gguf"]
    assert everything.bytes_read == 3500
    assert some.bytes_read == 3100
    assert read_ahead(named, -5).bytes_read == 0


def test_reading_ahead_stops_when_told_and_survives_a_file_that_goes(tmp_path):
    gone = ReadAhead(list(pieces(tmp_path / "gone.safetensors", 0, 3 * PIECE_BYTES)))
    gone.stop()

    assert gone.bytes_read == 0


def test_the_files_of_a_command_are_read_ahead_and_of_one_that_only_looks_none(tmp_path):
    for name in ("wan", "umt5", "vae"):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(100))
    wan, umt5, vae = (str(tmp_path / f"{name}.safetensors") for name in ("wan", "umt5", "vae"))
    generate = ["generate", "--model", wan, "--text-encoder", umt5, f"--vae={vae}", "--prompt", "x"]

    ahead = read_ahead_named(generate)

    assert ahead is not None
    ahead.wait()
    assert ahead.bytes_read == 300
    assert read_ahead_named(["inspect", wan]) is None
    assert read_ahead_named([*generate, "--dry-run"]) is None
    assert read_ahead_named([]) is None


def test_pieces_of_a_file_and_loose_bytes_are_gathered_into_one_memory(mapped, monkeypatch):
    monkeypatch.setattr("lightx2v_core.memory.files.pieces", lambda *at: pieces(*at, 70_001))
    _, tensors = mapped
    sources = [tensors["odd"], torch.arange(9, dtype=torch.uint8), tensors["b"].view(torch.uint8)]
    memory = [torch.empty_like(source.flatten()) for source in sources]

    gather(zip(memory, [source.flatten() for source in sources], strict=True))

    assert all(torch.equal(a, b.flatten()) for a, b in zip(memory, sources, strict=True))
