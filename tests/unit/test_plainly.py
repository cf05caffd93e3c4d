from __future__ import annotations

import torch

from lightx2v_core.ops.attention import sdpa
from lightx2v_core.plainly import describe_rows, rescue_of, use_plain_rows
from lightx2v_core.quant.linear import QuantisedLinear
from tests.conftest import tiny_model


def fp8_row(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: object
) -> torch.Tensor:
    return x.new_full((x.shape[0], codes.shape[0]), float("nan"))


def sage(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return sdpa(q, k, v)


def quantised() -> QuantisedLinear:
    linear = QuantisedLinear(256, 256, torch.int8, (256, 1))
    linear.weight.fill_(2)
    linear.weight_scale.fill_(0.5)
    linear.bias.data.zero_()
    return linear


def test_plain_rows_take_the_place_of_fast_ones_once():
    model, other = tiny_model(), tiny_model()
    model.blocks[0].self_attn.q = linear = quantised()
    model.attend, linear.multiply = sage, fp8_row
    rescue = rescue_of([other, model])

    told = describe_rows(model)
    broken = linear(torch.ones(1, 256))
    changed = [rescue.switch(), rescue.switch()]

    assert told == "attention sage, matmul fp8_row"
    assert broken.isnan().all()
    assert changed == [True, False]
    assert describe_rows(model) == "attention sdpa"
    torch.testing.assert_close(linear(torch.ones(1, 256)), torch.full((1, 256), 256.0))
    assert not use_plain_rows(other)
