"""Norm and rotary: the plain way, which is the only one on a CPU."""

from __future__ import annotations

import pytest
import torch

from lightx2v_core.device import Card
from lightx2v_core.ops import norm_rotary, triton_support
from lightx2v_core.ops.layers import RMSNorm
from lightx2v_core.ops.norm_rotary import fuses, norm_rotate, rotate
from lightx2v_core.wan.rope import rotary_table

CPU = torch.device("cpu")


def states(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 60, 256, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_without_a_card_it_is_the_norm_and_then_the_rotary(dtype):
    x, norm, rotary = states(dtype), RMSNorm(256, eps=1e-6), rotary_table((3, 4, 5), 128, CPU)

    y = norm_rotate(x, norm, rotary)

    assert not fuses(x, norm)
    assert torch.equal(y, rotate(norm(x).unflatten(-1, (2, 128)), rotary))
    assert torch.equal(norm_rotate(x, norm, None), norm(x).unflatten(-1, (2, 128)))


def test_the_table_of_one_grid_is_made_once_and_serves_training_after_inference():
    rotary_table.cache_clear()
    with torch.inference_mode():
        table = rotary_table((2, 3, 4), 128, CPU)
    x = states()[:, :24].requires_grad_()

    rotate(x.unflatten(-1, (2, 128)), rotary_table((2, 3, 4), 128, CPU)).sum().backward()

    assert rotary_table((2, 3, 4), 128, CPU) is table
    assert rotary_table.cache_info().misses == 1
    assert x.grad is not None


@pytest.mark.parametrize(
    ("card", "triton", "reason"),
    [
        (Card("cuda", (8, 0)), (3, 2), None),
        (Card("cuda", (12, 0)), (3, 6), None),
        (Card("cuda", (7, 5)), (3, 6), "it needs compute capability 8.0 and this is 7.5"),
        (Card("cuda", (9, 0)), (3, 1), "it needs Triton 3.2 and this is 3.1"),
        (Card("cuda", (9, 0)), None, "the triton package is not installed"),
        (Card("rocm", (9, 4)), (3, 6), "our kernels have not been tried on AMD cards"),
        (Card("mps"), (3, 6), "it needs an NVIDIA GPU and this is mps"),
    ],
)
def test_where_our_triton_kernels_may_be_tried(card, triton, reason, monkeypatch):
    monkeypatch.setattr(triton_support, "triton_version", lambda: triton)

    assert triton_support.triton_blocked_by(card) == reason


def test_a_missing_triton_is_no_version(monkeypatch):
    monkeypatch.setattr(triton_support, "find_spec", lambda package: None)

    assert triton_support.triton_version() is None


def test_a_kernel_that_may_not_be_tried_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(norm_rotary, "describe_card", lambda device: Card("cuda", (7, 5)))
    norm_rotary.kernel_runs.cache_clear()

    with caplog.at_level("INFO"):
        runs = [norm_rotary.kernel_runs(torch.device("cuda:3")) for _ in range(2)]
    norm_rotary.kernel_runs.cache_clear()

    assert runs == [False, False]
    assert caplog.messages == [
        "norm and rotary take several passes: it needs compute capability 8.0 and this is 7.5"
    ]
