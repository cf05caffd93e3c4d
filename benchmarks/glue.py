"""What lies between the matmuls of a 14B block: our kernels against plain PyTorch, time and error.

usage: python -m benchmarks.glue --device cuda --out glue.jsonl

A line holds case, form (bf16, or the codes it is quantised to), seconds and plain_seconds (medians
in the same run), ratio, gb_per_second (of what has to be read and written once), relative_error to
the plain path, tokens, width, kernels (or why there are none), card, torch, commit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightx2v_core.device import select_device
from lightx2v_core.ops import LayerNorm, glue
from lightx2v_core.ops.fused import describe_kernels, plain_pytorch
from lightx2v_core.ops.rows import Form, Rows

from .linears import TOKENS
from .lines import Line, about, add_out, emit, median_seconds, relative_error

DIM, FFN_DIM = 5120, 13824
EPS = 1e-6
FORMS = {
    "bf16": Form(torch.bfloat16),
    "fp8": Form(torch.bfloat16, torch.float8_e4m3fn, tokens=False),
    "int8": Form(torch.bfloat16, torch.int8, tokens=False),
}


class Case(NamedTuple):
    """One contract of ops/glue.py; bytes_moved counts what is read and what is written."""

    name: str
    form: str
    width: int
    work: Callable[[], object]
    bytes_moved: int


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.glue", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--widths", type=int, nargs=2, default=(DIM, FFN_DIM))
    parser.add_argument("--repeats", type=int, default=5)
    add_out(parser)
    options = parser.parse_args(arguments)
    device = select_device(options.device)
    emit(run(device, options.tokens, *options.widths, options.repeats), options.out)
    return 0


@torch.inference_mode()
def run(device: torch.device, tokens: int, dim: int, ffn_dim: int, repeats: int) -> Iterator[Line]:
    """A line for each case."""
    facts: Line = {"kernels": describe_kernels(device), **about(device)}
    for case in cases(device, tokens, dim, ffn_dim):
        with plain_pytorch():
            expected = _numbers(case.work())
            plain = median_seconds(case.work, device, repeats)
        actual = _numbers(case.work())
        error = relative_error(actual, expected)
        del actual, expected
        seconds = median_seconds(case.work, device, repeats)
        yield {
            "case": f"glue-{case.name}",
            "form": case.form,
            "seconds": seconds,
            "plain_seconds": plain,
            "ratio": seconds / plain,
            "gb_per_second": round(case.bytes_moved / seconds / 1e9, 1),
            "relative_error": error,
            "tokens": tokens,
            "width": case.width,
            **facts,
        }


def cases(device: torch.device, tokens: int, dim: int, ffn_dim: int) -> Iterator[Case]:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x, y = randn(1, tokens, dim), randn(1, tokens, dim, dtype=torch.bfloat16)
    shift, scale, gate = randn(1, 6, dim).chunk(6, dim=1)[:3]
    modulated = glue.ModulatedNorm(shift, scale, EPS)
    affine = LayerNorm(dim, eps=EPS).to(device)
    count, hidden = tokens * dim, tokens * ffn_dim
    # The product of one token costs nothing: GELU itself is timed.
    rise = Passing(randn(1, tokens, ffn_dim, dtype=torch.bfloat16))
    for name, form in FORMS.items():
        size = 2 if form.codes is None else 1
        norm, add_norm = partial(glue.norm, x, form=form), partial(glue.add_norm, x, y, form=form)
        gelu = partial(glue.gelu_of, rise, x, form)
        yield Case("modulated-norm", name, dim, partial(norm, modulated), count * (4 + size))
        yield Case("norm3", name, dim, partial(norm, affine), count * (4 + size))
        fused = partial(add_norm, gate, modulated)
        yield Case("gate-residual-norm", name, dim, fused, count * (4 + 2 + 4 + size))
        yield Case("gelu", name, ffn_dim, gelu, hidden * (2 + size))
        if form.codes is not None:
            yield Case("rows", name, dim, partial(glue.rows_of, y, form.codes), count * 3)
    yield Case("gate-residual", "fp32", dim, partial(glue.add, x, y, gate), count * 10)


class Passing(torch.nn.Module):
    """Stands for a linear whose product is there already."""

    def __init__(self, product: Tensor) -> None:
        super().__init__()
        self.product = product

    def forward(self, _x: Tensor) -> Tensor:
        return self.product


def _numbers(result: object) -> Tensor:
    """What a case computed, as float32: the activation, or the sum where there is none."""
    if isinstance(result, tuple):
        result = result[1]
    if isinstance(result, Rows):
        return result.codes_LK.float() * result.scale_L1
    assert isinstance(result, Tensor)
    return result.float()


if __name__ == "__main__":
    raise SystemExit(main())
