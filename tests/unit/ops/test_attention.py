from __future__ import annotations

import pytest
import torch

from lightx2v_core.errors import CapabilityError
from lightx2v_core.ops import attention
from lightx2v_core.ops.attention import BACKENDS, Backend, select_attention


def test_auto_takes_the_exact_row():
    assert select_attention("auto") is attention.sdpa


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(CapabilityError, match="'magic' is unknown; use auto, sdpa, flash, sage"):
        select_attention("magic")


@pytest.mark.parametrize("name", ["sage", "flash"])
def test_a_named_choice_is_refused_and_not_replaced_where_its_package_is_missing(name, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda package: None)

    with pytest.raises(CapabilityError, match=f"{name!r} cannot run here: .* not installed"):
        select_attention(name)


@pytest.mark.parametrize("name", ["sage", "flash"])
def test_a_cuda_row_is_refused_on_the_cpu_even_where_its_package_is_there(name, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda package: object())

    with pytest.raises(CapabilityError, match=r"needs .* GPU and this is cpu"):
        select_attention(name, "cpu")


def test_auto_skips_a_blocked_row(monkeypatch):
    def chosen(q, k, v):
        return q

    rows = {
        "first": Backend(lambda: attention.sdpa, lambda device: "it is blocked"),
        "second": Backend(lambda: chosen, lambda device: None),
    }
    monkeypatch.setattr(attention, "BACKENDS", rows)

    assert select_attention("auto") is chosen


def test_the_plain_row_is_softmax_of_scaled_products():
    q, k, v = torch.randn(3, 2, 4, 7, 128, generator=torch.Generator().manual_seed(1)).double()

    expected = torch.softmax(q @ k.transpose(-1, -2) / 128**0.5, dim=-1) @ v

    torch.testing.assert_close(BACKENDS["sdpa"].load()(q, k, v), expected)
