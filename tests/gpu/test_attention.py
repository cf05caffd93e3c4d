"""On a real card: our attention kernels against exact attention of their codes, any length."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention import forward_error, lines_of, operands
from lightx2v_core.device import describe_card
from lightx2v_core.ops import eight_bit, norm_rotary
from lightx2v_core.ops.attention import (
    BACKENDS,
    ERROR_BUDGET,
    WORSE_THAN_EXACT,
    select_attention,
)
from lightx2v_core.ops.eight_bit import EightBit
from lightx2v_core.ops.layers import RMSNorm
from lightx2v_core.ops.norm_rotary import norm_rotate, norm_rotate_plainly
from lightx2v_core.ops.trial import failure
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.model import WanModel
from lightx2v_core.wan.rope import rotary_table
from tests.conftest import fill, relative_error
from tests.eight_bit import attention_of_codes, normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
# P in float8 (2.6 %), and with the code of the exponent 3.2 %, of values that average to nothing.
OWN_ERROR = {"gluon": 0.05, "triton": 0.04, "triton, wide": 0.008}
LENGTHS = [*range(1, 20), 31, 63, 64, 65, 127, 128, 129, 200, 255, 256, 257, 300, 999, 4097]


def row(name: str) -> EightBit:
    plain = name.split(",")[0]
    if reason := BACKENDS[plain].blocked_by(describe_card("cuda")):
        pytest.skip(f"{plain}: {reason}")
    attend = select_attention(plain, "cuda")
    assert isinstance(attend, EightBit)
    if name.endswith("wide"):
        attend._wide_values = True
    return attend


@pytest.fixture(params=["gluon", "triton", "triton, wide"])
def named(request, monkeypatch) -> tuple[str, EightBit]:
    """A row that takes every length, so that short ones are tested too."""
    monkeypatch.setattr(eight_bit, "LEAST_TOKENS", 1)
    return request.param, row(request.param)


@torch.inference_mode()
def test_every_length_equals_exact_attention_of_the_codes(named):
    name, attend = named
    for tokens in LENGTHS:
        q, k, v = normal(2, tokens, 3, tokens, "cuda")
        k = k + 5

        y = attend(q, k, v)

        expected = attention_of_codes(q, k, v, name.endswith("wide"))
        assert (y.shape, y.dtype) == (q.shape, q.dtype)
        assert relative_error(y, expected) < OWN_ERROR[name], tokens


@torch.inference_mode()
def test_structured_inputs_stay_within_a_percent_of_exact_attention(named):
    _, attend = named
    q, k, v = operands("structured", 4000, 4, torch.device("cuda"))

    y = attend(q, k, v)

    exact = F.scaled_dot_product_attention(*(x.float() for x in (q, k, v)))
    assert relative_error(y, exact) < 0.012


@torch.inference_mode()
@pytest.mark.parametrize("layout", ["BNLD", "BLND", "part of q, k and v together", "float16"])
def test_any_strides_give_the_same(named, layout):
    _, attend = named
    q, k, v = normal(2, 300, 3, 1, "cuda")
    expected = attend(q, k, v)
    if layout == "BNLD":
        q, k, v = (x.contiguous() for x in (q, k, v))
    if layout == "part of q, k and v together":
        together = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)
        q, k, v = (x.transpose(1, 2) for x in together.unbind(2))
    if layout == "float16":
        q, k, v = (x.half() for x in (q, k, v))

    y = attend(q, k, v)

    assert y.dtype == q.dtype
    assert relative_error(y, expected) < (3e-3 if layout == "float16" else 1e-9)


@torch.inference_mode()
def test_what_lies_after_the_last_token_is_not_read(named):
    """Codes of padding come from memory that held something else."""
    _, attend = named
    q, k, v = normal(1, 130, 2, 1, "cuda")
    expected = attend(q, k, v)
    for _ in range(3):
        junk = [torch.full((2**22,), -1, dtype=torch.int8, device="cuda") for _ in range(8)]
        del junk

        assert torch.equal(attend(q, k, v), expected)


@torch.inference_mode()
def test_the_result_is_the_same_bit_for_bit_every_time(named):
    _, attend = named
    q, k, v = normal(1, 5000, 8, 2, "cuda")
    expected = attend(q, k, v)

    assert all(torch.equal(attend(q, k, v), expected) for _ in range(5))


@torch.inference_mode()
@pytest.mark.parametrize("what", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_does_not_become_one(named, what, bad):
    _, attend = named
    operands = [x.contiguous() for x in normal(1, 300, 2, 3, "cuda")]
    operands[what][0, 1, 77, 5] = bad

    y = attend(*operands)

    assert torch.isfinite(y[0, 0]).all()
    hurt = y[0, 1, 77] if what == 0 else y[0, 1, :, 5] if what == 2 else y[0, 1]
    assert not torch.isfinite(hurt).any()


@torch.inference_mode()
def test_values_of_very_different_size_keep_their_precision(named):
    """Blocks of values and lanes of values, a factor of 1,000 apart."""
    _, attend = named
    q, k, v = (x.contiguous() for x in normal(1, 1000, 2, 4, "cuda"))
    v[:, :, :500] *= 1000
    v[:, :, :, ::2] *= 1e-3

    y = attend(q, k, v)

    exact = F.scaled_dot_product_attention(*(x.float() for x in (q, k, v)))
    for lanes in (slice(0, None, 2), slice(1, None, 2)):
        assert relative_error(y[..., lanes], exact[..., lanes]) < 0.07


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@torch.inference_mode()
def test_nothing_waits_for_the_card(named):
    _, attend = named
    q, k, v = normal(1, 3000, 4, 5, "cuda")
    attend(q, k, v)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def plain(x: Tensor, norm: RMSNorm, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    return norm_rotate_plainly(x.float(), norm, rotary)


@torch.inference_mode()
@pytest.mark.parametrize("heads", [1, 2, 12, 40])
@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_and_rotary_in_one_pass_are_nearer_to_float32_than_in_several(heads, turns, dtype):
    generator = torch.Generator("cuda").manual_seed(1)
    norm = RMSNorm(heads * 128, eps=1e-6, device="cuda")
    norm.weight.data = torch.rand(heads * 128, generator=generator, device="cuda") + 0.5
    for grid in ((1, 1, 1), (3, 5, 7), (1, 8, 16)):
        rotary = rotary_table(grid, 128, torch.device("cuda"))
        x = 3 * torch.randn(2, len(rotary[0]), heads * 128, generator=generator, device="cuda")
        x = x.to(dtype)
        several = norm_rotate_plainly(x, norm, rotary if turns else None)
        expected = plain(x, norm, rotary if turns else None)
        assert norm_rotary.fuses(x, norm)

        y = norm_rotate(x, norm, rotary if turns else None)

        assert (y.shape, y.dtype) == (several.shape, dtype)
        assert relative_error(y, expected) < (0.004 if dtype == torch.bfloat16 else 5e-4)
        assert relative_error(y, expected) < 1.05 * relative_error(several, expected) + 1e-7


@torch.inference_mode()
def test_codes_from_linears_equal_codes_of_what_norm_and_rotary_gave(named):
    name, attend = named
    generator = torch.Generator("cuda").manual_seed(2)
    norms = [RMSNorm(512, eps=1e-6, device="cuda") for _ in range(2)]
    rotary = rotary_table((3, 10, 11), 128, torch.device("cuda"))
    q, k, v = torch.randn(3, 2, 330, 512, generator=generator, device="cuda").bfloat16()
    halves = [
        norm_rotate(x, norm, rotary).transpose(1, 2) for x, norm in zip((q, k), norms, strict=True)
    ]
    expected = attend(*halves, v.unflatten(-1, (4, 128)).transpose(1, 2))

    codes = attend.queries(q, norms[0], rotary), attend.keys(k, norms[1], rotary)
    y = attend.attend(*codes, attend.values(v.unflatten(-1, (4, 128))), q)

    # The queries are coded before they are rounded to bfloat16.
    assert y.shape == q.shape
    assert relative_error(y, expected.transpose(1, 2).flatten(2)) < 0.03, name


@torch.inference_mode()
def test_a_model_with_8_bit_attention_stays_near_the_exact_one(named):
    _, attend = named
    config = WanConfig(dim=512, ffn_dim=1024, num_layers=3, text_dim=64)
    model = fill(WanModel(config)).bfloat16().cuda()
    model.compute_dtype = torch.bfloat16
    generator = torch.Generator("cuda").manual_seed(3)
    inputs = (
        torch.randn(1, 16, 5, 36, 34, generator=generator, device="cuda"),
        torch.full((1,), 500.0, device="cuda"),
        torch.randn(1, 512, 64, generator=generator, device="cuda"),
    )
    exact = model(*inputs)

    y = model(*inputs, attend=attend)

    assert 0 < relative_error(y, exact) < 0.02


def test_training_takes_the_plain_way_and_gives_gradients(named):
    _, attend = named
    norm = RMSNorm(256, device="cuda", eps=1e-6)
    x = torch.randn(1, 50, 256, device="cuda").bfloat16().requires_grad_()

    y = norm_rotate(x, norm, None).transpose(1, 2)
    attend(y, y, y).sum().backward()

    assert x.grad is not None and norm.weight.grad is not None


def test_a_trial_tells_a_wrong_kernel_and_one_that_does_not_run():
    expected = torch.ones(4, device="cuda")

    def breaks() -> Tensor:
        raise RuntimeError("no such instruction\nand more")

    assert failure(lambda: 1.001 * expected, expected, 0.01) is None
    assert failure(lambda: 1.1 * expected, expected, 0.01) == (
        "our kernel is wrong here by 10.0% of the result; 1.0% is allowed"
    )
    assert "wrong here by nan%" in (
        failure(lambda: expected / 0 - expected / 0, expected, 0.01) or ""
    )
    told = "our kernel does not run here: RuntimeError no such instruction"
    assert failure(breaks, expected, 0.01) == told


@torch.inference_mode()
def test_auto_is_exact_for_16_bit_files_and_within_the_budget_for_8_bit_ones():
    """The error of a forward of random 14B blocks, which is what `auto` answers for."""
    exact, fast = (select_attention("auto", "cuda", exact=e) for e in (True, False))
    rows = usable()
    measured = forward_error([select_attention(name, "cuda") for name in rows])
    errors = dict(zip(rows, measured, strict=True))
    print(json.dumps({"case": "attention_forward_error", **errors}))

    assert not isinstance(exact, EightBit)
    if isinstance(fast, EightBit):
        assert errors[fast.name] < min(ERROR_BUDGET, WORSE_THAN_EXACT * errors["sdpa"])


def usable() -> list[str]:
    card = describe_card("cuda")
    rows = ("sdpa", "gluon", "triton")
    return [name for name in rows if BACKENDS[name].blocked_by(card) is None]


@torch.inference_mode()
def test_what_attention_costs_is_printed():
    for line in lines_of(torch.device("cuda"), [32760], repeats=3):
        print(json.dumps(line))
        if line.get("relative_error") is not None:
            assert line["relative_error"] < 0.07, line
