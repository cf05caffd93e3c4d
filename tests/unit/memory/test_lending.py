"""Encoders and VAE lent to a card: what travels, what stays there, and what comes back."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.memory import lending
from lightx2v_core.memory.lending import Lent
from lightx2v_core.memory.transport import CudaTransport
from tests.unit.memory.test_faults import fail_once
from tests.unit.memory.test_transport import Card

CPU, META = torch.device("cpu"), torch.device("meta")


def make_module() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Conv2d(3, 5, 3).bfloat16())
    return module.requires_grad_(False)


def places(module: nn.Module) -> dict[str, int]:
    return {n: id(t) for n, t in (*module.named_parameters(), *module.named_buffers())}


def lent_to(card: Card, module: nn.Module, room: int = 10**9) -> Lent:
    """By way of a recorded card; `_bring` and `leave` are what `borrowed` does around its body,
    which a CPU has no need of."""

    def transport(_device: torch.device) -> CudaTransport:
        return CudaTransport(card, slots=1, room=lambda: room)

    return Lent(module, transport, lambda: room)


def brought(lent: Lent, module: nn.Module, card: Card) -> dict[str, Tensor]:
    """What a computation finds in the module's tensors when the card gets to it."""
    seen: dict[str, Tensor] = {}
    lent._bring(CPU, None)
    state = dict(module.state_dict())

    def compute() -> None:
        seen.update((name, tensor.clone()) for name, tensor in state.items())

    card.compute.queue.append((lambda: True, compute))
    card.finish()
    return seen


@pytest.mark.parametrize("seed", range(4))
def test_every_bit_arrives_before_it_is_computed_with_and_only_once_from_ram(seed):
    module, card = make_module(), Card(seed)
    expected = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    homes, lent = places(module), lent_to(card, module)

    first = brought(lent, module, card)
    inside = places(module)
    lent.leave()
    host = lent._host
    assert host is not None and host.pinned is not None
    host.tensors = ()  # whoever reads them again ends in an error
    second = brought(lent, module, card)
    lent.leave()

    for seen in (first, second):
        assert seen.keys() == expected.keys()
        assert all(torch.equal(seen[name], expected[name]) for name in expected)
    assert not set(inside.values()) & set(homes.values()) and places(module) == homes
    assert len(card.registered) == 1 and lent.pinned_bytes >= lent.nbytes


@pytest.mark.parametrize(("room", "refuses"), [(0, False), (10**9, True)])
def test_without_page_locked_ram_it_is_copied_as_it_lies(tmp_path, room, refuses):
    path = tmp_path / "vae.safetensors"
    save_file(make_module().state_dict(), path)
    module = make_module()
    names = dict.fromkeys(module.state_dict())
    stored = open_checkpoint(path).tensors({name: name for name in names})
    module.load_state_dict(stored)
    card = Card(refuses=refuses, eager=True)
    lent = lent_to(card, module, room)

    for _ in range(2):
        seen = brought(lent, module, card)
        lent.leave()

        assert all(torch.equal(seen[name], stored[name]) for name in names)
    assert lent.pinned_bytes == 0 and not card.registered


def test_it_stays_only_where_no_page_locked_copy_brings_it_back(monkeypatch):
    module = make_module()
    homes, lent = places(module), Lent(module)

    with lent.borrowed(META, stays=True):
        lent.leave()
        in_use = lent.loaded_bytes
    left = lent.loaded_bytes
    with lent.borrowed(META, stays=True):
        moved = places(module)
    stayed, again = places(module), []
    with lent.borrowed(META):
        again.append(places(module))
    after = places(module)
    monkeypatch.setattr(Lent, "pinned_bytes", 1)
    with lent.borrowed(META, stays=True):
        pass

    assert (in_use, left) == (lent.nbytes, 0), "asked to leave in use, it leaves afterwards"
    assert stayed == moved == again[0] != homes
    assert after == homes == places(module)


def test_a_borrowed_encoder_gets_its_own_tensors_back_whatever_happened(monkeypatch):
    module = make_module()
    homes = places(module)
    with pytest.raises(ValueError, match="inside"), Lent(module).borrowed(META):
        moved = {tensor.device for tensor in module.state_dict().values()}
        raise ValueError("inside")
    after = places(module)
    monkeypatch.setattr(lending, "to_device", fail_once(lending.to_device, at=1))
    with pytest.raises(torch.cuda.OutOfMemoryError), Lent(module).borrowed(META):
        pytest.fail("nothing was lent")

    assert moved == {META}
    assert after == places(module) == homes


def test_an_encoder_that_does_not_fit_beside_others_is_lent_when_they_have_left(
    monkeypatch, caplog
):
    module, freed = nn.Linear(4, 4), []
    monkeypatch.setattr(lending, "to_device", fail_once(lending.to_device, at=1))

    with Lent(module).borrowed(META, lambda: freed.append(1)):
        moved = module.weight.device

    assert moved == META and freed == [1]
    assert "everything else leaves" in caplog.text
