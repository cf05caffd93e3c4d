"""What our 16-bit attention leaves to PyTorch, and how it is tried. No card here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightx2v_core.errors import CapabilityError
from lightx2v_core.ops import sixteen_bit
from lightx2v_core.ops.attention import sdpa
from lightx2v_core.ops.sixteen_bit import SixteenBit, fits, load_gluon16


def operands(tokens: int = 9, dim: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 2, 4, tokens, dim, generator=generator).bfloat16()


def test_a_cpu_computes_as_pytorch_does():
    q, k, v = operands()

    with torch.no_grad():
        y = SixteenBit(sdpa)(q, k, v)

    assert torch.equal(y, sdpa(q, k, v))


@pytest.mark.parametrize(
    ("change", "may"),
    [
        (lambda q, k, v: (q, k, v), True),
        (lambda q, k, v: (q.float(), k.float(), v.float()), False),
        (lambda q, k, v: (q, k, v.half()), False),
        (lambda q, k, v: (q[..., :64], k[..., :64], v[..., :64]), False),
        (lambda q, k, v: (q[:, :, :1], k, v), False),
        (lambda q, k, v: (q, k[:, :, :1], v[:, :, :1]), False),
        (lambda q, k, v: (q, k[:, :1], v[:, :1]), False),
    ],
    ids=["fit", "float32", "mixed", "heads of 64", "one query", "one key", "shared heads"],
)
def test_the_kernel_takes_calls_by_shape_and_dtype_alone(change, may, monkeypatch):
    monkeypatch.setattr(sixteen_bit, "LEAST_QUERIES", 9)
    monkeypatch.setattr(sixteen_bit, "LEAST_KEYS", 9)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    q, k, v = change(*operands())

    with torch.no_grad():
        answer = fits(q, k, v)

    assert answer == may
    assert not fits(q, k, v), "with gradients PyTorch computes"


def test_a_row_whose_trial_fails_is_refused_with_the_reason(monkeypatch):
    def breaks(*operands: Tensor) -> Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(sixteen_bit, "_by_kernel", breaks)

    with pytest.raises(CapabilityError, match="'gluon16' cannot run here: .*no such instruction"):
        load_gluon16(torch.device("cpu"), sdpa)


def test_a_trial_that_gives_wrong_numbers_is_told(monkeypatch):
    monkeypatch.setattr(sixteen_bit, "_by_kernel", lambda q, k, v: 1.1 * sdpa(q, k, v))

    with pytest.raises(CapabilityError, match="'gluon16' cannot run here: our kernel is wrong"):
        load_gluon16(torch.device("cpu"), sdpa)
