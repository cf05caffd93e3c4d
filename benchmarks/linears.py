"""Linears of a 14B block: every matmul row against bfloat16, in time and in error.

usage: python -m benchmarks.linears --device cuda --out linears.jsonl

A line holds case, seconds (median, activations quantised within), quantise_seconds (of that, the
activations), ratio to bf16 in the same run, relative_error to the float32 product of the weights
before they were quantised, tflops, shapes, card, torch, commit; or blocked_by, the reason why a row
did not run. Data is random: the time of a matmul on a card at its power limit depends on it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightx2v_core.device import describe_card, select_device
from lightx2v_core.ops.glue import rows_of
from lightx2v_core.ops.matmul import DEQUANTISE, FP8, INT8, ROWS, Weight
from lightx2v_core.quant.linear import QuantisedLinear
from lightx2v_core.quant.quantise import WRITTEN

from .lines import Line, about, add_out, emit, median_seconds, relative_error

TOKENS = 32760  # 480x832, 81 frames
SHAPES = ((5120, 5120), (5120, 13824), (13824, 5120))  # in, out: attention, ffn.0, ffn.2
CHECKED = 512  # tokens of which the error is taken
# (row, how the weight is quantised, name of its codes)
CASES = (
    ("fp8-row", "fp8", FP8),
    ("fp8-tensor", "fp8", FP8),
    ("fp8-tensor", "fp8-tensor", FP8),
    ("int8", "int8", INT8),
    ("kitchen-int8", "int8", INT8),
    (DEQUANTISE, "fp8", FP8),
    (DEQUANTISE, "int8", INT8),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linears", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=5)
    add_out(parser)
    options = parser.parse_args(arguments)
    device = select_device(options.device)
    emit(run(device, SHAPES, options.tokens, options.repeats), options.out)
    return 0


def run(
    device: torch.device, shapes: Sequence[tuple[int, int]], tokens: int, repeats: int
) -> Iterator[Line]:
    """The lines of every case, bf16 first for each shape (in_features, out_features)."""
    here = about(device)
    for in_features, out_features in shapes:
        generator = torch.Generator(device).manual_seed(0)
        weight = torch.randn(out_features, in_features, generator=generator, device=device)
        weight *= in_features**-0.5
        bias = torch.randn(out_features, generator=generator, device=device)
        x = torch.randn(tokens, in_features, generator=generator, device=device).bfloat16()
        exact = F.linear(x[:CHECKED].float(), weight, bias)
        flop = 2 * tokens * in_features * out_features
        shape = {"tokens": tokens, "in_features": in_features, "out_features": out_features}
        half, half_bias = weight.bfloat16(), bias.bfloat16()
        bf16 = median_seconds(lambda: F.linear(x, half, half_bias), device, repeats)  # noqa: B023
        error = relative_error(F.linear(x[:CHECKED], half, half_bias), exact)
        yield _line("bf16", "bf16", bf16, bf16, flop, error) | shape | here
        for row, scheme, codes in CASES:
            reason = ROWS[row].blocked_by(
                describe_card(device), Weight(codes, in_features, out_features)
            )
            if reason:
                line: Line = {"case": f"linear-{row}", "scheme": scheme, "blocked_by": reason}
                yield line | shape | here
                continue
            linear = quantised_linear(weight, bias, row, scheme)
            seconds = median_seconds(lambda: linear(x), device, repeats)  # noqa: B023
            error = relative_error(linear(x[:CHECKED]), exact)
            line = _line(row, scheme, seconds, bf16, flop, error)
            if row != DEQUANTISE and not row.startswith("kitchen"):
                dtype = WRITTEN[scheme].dtype
                quantise = lambda: rows_of(x, dtype)  # noqa: B023, E731
                line["quantise_seconds"] = median_seconds(quantise, device, repeats)
            yield line | shape | here


def quantised_linear(weight: Tensor, bias: Tensor, row: str, scheme: str) -> QuantisedLinear:
    """A linear of the codes that `quantize --scheme` would write, with the matmul called `row`."""
    written = WRITTEN[scheme]
    codes, scale = written.quantise(weight)
    linear = QuantisedLinear(weight.shape[1], weight.shape[0], written.dtype, tuple(scale.shape))
    linear.weight, linear.weight_scale = codes, scale
    linear.bias = torch.nn.Parameter(bias, requires_grad=False)
    linear.use(ROWS[row])
    return linear


def _line(row: str, scheme: str, seconds: float, bf16: float, flop: int, error: float) -> Line:
    return {
        "case": f"linear-{row}",
        "scheme": scheme,
        "seconds": seconds,
        "ratio": seconds / bf16,
        "tflops": round(flop / seconds / 1e12, 1),
        "relative_error": error,
    }


if __name__ == "__main__":
    raise SystemExit(main())
