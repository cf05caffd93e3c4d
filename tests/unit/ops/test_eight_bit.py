"""8-bit attention without a card: what goes to exact attention, and what the codes are worth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.attention import operands
from lightx2v_core.ops import eight_bit
from lightx2v_core.ops.attention import sdpa
from lightx2v_core.ops.eight_bit import LEAST_TOKENS, EightBit, unfit
from tests.conftest import VARIANTS, relative_error, tiny_inputs, tiny_model
from tests.eight_bit import attention_of_codes, key_values, normal

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ((BF16, 128, LEAST_TOKENS, LEAST_TOKENS), None),
        ((torch.float16, 128, 32760, 32760), None),
        ((BF16, 128, 32760, 512), "cross-attention"),
        ((BF16, 128, 512, 512), f"fewer than {LEAST_TOKENS} tokens, which are as fast there"),
        ((BF16, 64, 32760, 32760), "heads of 64 lanes, not 128"),
        ((torch.float32, 128, 32760, 32760), "numbers of float32"),
    ],
)
@torch.no_grad()
def test_what_goes_to_exact_attention_is_told_by_shapes_and_dtypes(call, reason):
    assert unfit(*call) == reason


def test_calls_that_need_a_gradient_go_to_exact_attention():
    assert unfit(BF16, 128, 32760, 32760) == "calls that need a gradient or are compiled"


@torch.no_grad()
def test_a_call_that_does_not_suit_the_kernel_is_exact_and_said_once(caplog):
    attend = EightBit("gluon", lambda *a: pytest.fail("not for so few keys"), False, sdpa)
    q, k, v = normal(1, 40, 2, 1, "cpu")

    with caplog.at_level("INFO"):
        results = [attend(q, k, v) for _ in range(3)]

    assert all(torch.equal(result, sdpa(q, k, v)) for result in results)
    assert caplog.messages == [
        "attention gluon leaves to PyTorch what it does not do: "
        f"fewer than {LEAST_TOKENS} tokens, which are as fast there"
    ]


@torch.no_grad()
def test_a_call_on_a_cpu_is_exact(monkeypatch):
    monkeypatch.setattr(eight_bit, "LEAST_TOKENS", 1)
    attend = EightBit("triton", lambda *a: pytest.fail("no kernel on a CPU"), False, sdpa)
    q, k, v = normal(1, 40, 2, 1, "cpu")

    assert torch.equal(attend(q, k, v), sdpa(q, k, v))


@torch.no_grad()
def test_a_model_given_8_bit_attention_on_a_cpu_stays_bit_for_bit_plain():
    model, inputs = tiny_model("i2v"), tiny_inputs(VARIANTS["i2v"])
    attend = EightBit("triton", lambda *a: pytest.fail("no kernel on a CPU"), False, sdpa)

    assert torch.equal(model(**inputs, attend=attend), model(**inputs))


def test_exact_attention_of_the_codes_is_near_attention():
    """The bounds that tests/gpu holds the kernels to are those of the codes, and of P."""
    normal_q, normal_k, normal_v = normal(1, 2000, 2, 1, "cpu")
    structured = operands("structured", 2000, 2, torch.device("cpu"))
    errors = [
        relative_error(attention_of_codes(q, k, v), F.scaled_dot_product_attention(q, k, v))
        for q, k, v in ((normal_q.float(), normal_k.float(), normal_v.float()), structured)
    ]

    assert 0.02 < errors[0] < 0.035, "normal numbers average to nothing"
    assert errors[1] < 0.008


def test_taking_the_mean_off_the_keys_makes_their_codes_finer():
    _, k, _ = normal(1, 512, 2, 1, "cpu")
    offset = torch.randn(1, 2, 1, 128, generator=torch.Generator().manual_seed(2)).sign() * 8
    centred = k.double() - k.double().mean(2, True)

    error = relative_error(key_values(k + offset), centred)

    assert error < 0.012
    assert relative_error(key_values(k), centred) == pytest.approx(error, rel=0.1)


def test_a_gradient_never_meets_the_kernel(monkeypatch):
    monkeypatch.setattr(eight_bit, "LEAST_TOKENS", 1)
    attend = EightBit("gluon", lambda *a: pytest.fail("has no gradient"), False, sdpa)
    q, k, v = (x.clone().requires_grad_() for x in normal(1, 9, 1, 1, "cpu"))

    attend(q, k, v).sum().backward()

    assert v.grad is not None
