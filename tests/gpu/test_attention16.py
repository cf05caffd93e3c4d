"""On a real card: our 16-bit attention kernel against exact attention, any length and strides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention import TORCH_BACKENDS, error_of, operands
from lightx2v_core.device import describe_card
from lightx2v_core.ops import sixteen_bit
from lightx2v_core.ops.attention import BACKENDS, select_attention
from lightx2v_core.ops.sixteen_bit import SixteenBit
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.model import WanModel
from tests.conftest import fill, relative_error
from tests.eight_bit import normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
LENGTHS = [*range(1, 20), 31, 63, 64, 65, 127, 128, 129, 200, 255, 256, 257, 300, 999, 4097]


@pytest.fixture
def attend(monkeypatch) -> SixteenBit:
    """The row, for every length, and PyTorch's out of reach."""
    monkeypatch.setattr(sixteen_bit, "LEAST_QUERIES", 1)
    monkeypatch.setattr(sixteen_bit, "LEAST_KEYS", 1)
    if reason := BACKENDS["gluon16"].blocked_by(describe_card("cuda")):
        pytest.skip(f"gluon16: {reason}")
    row = select_attention("gluon16", "cuda")
    assert isinstance(row, SixteenBit)

    def refuse(*_operands: Tensor) -> Tensor:
        raise AssertionError("it was left to PyTorch")

    monkeypatch.setattr(row, "_exact", refuse)
    return row


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))


@torch.inference_mode()
def test_every_length_is_as_near_to_exact_attention_as_two_roundings(attend):
    for tokens in LENGTHS:
        q, k, v = normal(2, tokens, 3, tokens, "cuda")

        y = attend(q, k, v)

        assert (y.shape, y.dtype) == (q.shape, q.dtype)
        assert relative_error(y, exact(q, k, v)) < 0.004, tokens


@torch.inference_mode()
@pytest.mark.parametrize(("queries", "keys"), [(1, 77), (300, 1), (129, 512), (1000, 257)])
def test_other_numbers_of_keys_than_of_queries(attend, queries, keys):
    q = normal(2, queries, 3, 1, "cuda")[0]
    _, k, v = normal(2, keys, 3, 2, "cuda")

    y = attend(q, k, v)

    assert relative_error(y, exact(q, k, v)) < 0.004


@torch.inference_mode()
def test_scores_far_apart_neither_overflow_nor_vanish(attend):
    q, k, v = normal(1, 500, 2, 3, "cuda")

    y = attend(30 * q, 30 * k, v)

    assert relative_error(y, exact(30 * q, 30 * k, v)) < 0.004


@torch.inference_mode()
@pytest.mark.parametrize(
    "layout", ["BNLD", "part of q, k and v together", "float16", "odd address", "one for all heads"]
)
def test_any_strides_give_the_same(attend, layout):
    q, k, v = normal(2, 300, 3, 1, "cuda")
    if layout == "one for all heads":
        k = k[:, :1].expand(-1, 3, -1, -1)
    expected = attend(q, k, v)
    if layout == "BNLD":
        q, k, v = (x.contiguous() for x in (q, k, v))
    if layout == "part of q, k and v together":
        together = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)
        q, k, v = (x.transpose(1, 2) for x in together.unbind(2))
    if layout == "float16":
        q, k, v = (x.half() for x in (q, k, v))
    if layout == "odd address":
        q, k, v = (torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v))

    y = attend(q, k, v)

    assert y.dtype == q.dtype
    assert relative_error(y, expected) < (3e-3 if layout == "float16" else 1e-9)


@torch.inference_mode()
def test_what_is_no_number_stays_in_its_head_and_clip(attend):
    for what, bad in ((0, float("nan")), (1, float("nan")), (2, float("inf"))):
        operands_BNLD = [x.contiguous() for x in normal(2, 300, 2, 3, "cuda")]
        operands_BNLD[what][1, 1, 77, 5] = bad

        y = attend(*operands_BNLD)

        assert torch.isfinite(y[0]).all() and torch.isfinite(y[1, 0]).all()
        hurt = y[1, 1, 77] if what == 0 else y[1, 1, :, 5] if what == 2 else y[1, 1]
        assert not torch.isfinite(hurt).any()


@torch.inference_mode()
def test_the_result_is_the_same_bit_for_bit_every_time(attend):
    q, k, v = normal(1, 5000, 8, 2, "cuda")
    expected = attend(q, k, v)

    assert all(torch.equal(attend(q, k, v), expected) for _ in range(5))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@torch.inference_mode()
def test_nothing_waits_for_the_card(attend):
    q, k, v = normal(1, 3000, 4, 5, "cuda")
    attend(q, k, v)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["normal", "structured"])
def test_its_error_is_not_above_that_of_pytorch_by_cudnn(attend, kind):
    device = torch.device("cuda")
    inputs = operands(kind, 16000, 8, device)

    def cudnn(*operands_BNLD: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(TORCH_BACKENDS["sdpa-cudnn"]):
            return F.scaled_dot_product_attention(*operands_BNLD)

    assert error_of(attend, *inputs) < 1.02 * error_of(cudnn, *inputs)


@torch.inference_mode()
def test_a_model_gives_with_it_what_it_gives_without(attend):
    config = WanConfig(dim=512, ffn_dim=1024, num_layers=3, text_dim=64)
    model = fill(WanModel(config)).bfloat16().cuda()
    generator = torch.Generator("cuda").manual_seed(3)
    inputs = (
        torch.randn(1, 16, 5, 36, 34, generator=generator, device="cuda"),
        torch.full((1,), 500.0, device="cuda"),
        torch.randn(1, 512, 64, generator=generator, device="cuda"),
    )
    expected = model(*inputs)  # float32
    model.compute_dtype = torch.bfloat16
    without = model(*inputs)

    y = model(*inputs, attend=attend)

    assert relative_error(y, without) < 0.01
    assert relative_error(y, expected) < 1.05 * relative_error(without, expected)
