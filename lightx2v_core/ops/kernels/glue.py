"""Passes over activations that PyTorch would make one by one, each as one Triton kernel.

Imported by ops/fused.py alone, where Triton is at hand. A program holds one row in registers, so
that every number is read once and written once; all arithmetic is in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows import LEAST, LIMITS, Form, Rows

LEAST_SCALE = tl.constexpr(LEAST)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to whole numbers, half to even


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(y):
    """Of a part of a row, not a number where one of them is none."""
    return tl.reduce(tl.abs(y), 0, _larger)


@triton.jit
def _store(y, inverse, start, column, width, tokens_ptr, codes_ptr, TOKENS, LIMIT, WHOLE):
    """A part of a row as tokens, codes or both."""
    inside = column < width
    if TOKENS:
        tl.store(tokens_ptr + start + column, y, mask=inside)
    if LIMIT > 0:
        codes = y * inverse
        if WHOLE:
            # The whole number is in the low bits: without a conversion, which is slow.
            codes = (codes + ROUNDER).to(tl.int32, bitcast=True)
        tl.store(codes_ptr + start + column, codes.to(codes_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_row(
    a,
    b,
    row,
    width,
    tokens_ptr,
    codes_ptr,
    scale_ptr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    TOKENS: tl.constexpr,
    LIMIT: tl.constexpr,  # 0: no codes
    WHOLE: tl.constexpr,
):
    """A whole row, whose columns up to HEAD are `a` and the others `b`."""
    start, head, tail = row * width, tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    inverse = 0.0
    if LIMIT > 0:
        largest = _larger(_larger(_largest(a), _largest(b)), LEAST_SCALE)
        inverse = LIMIT / largest
        tl.store(scale_ptr + row, largest / LIMIT)
    _store(a, inverse, start, head, width, tokens_ptr, codes_ptr, TOKENS, LIMIT, WHOLE)
    _store(b, inverse, start, tail, width, tokens_ptr, codes_ptr, TOKENS, LIMIT, WHOLE)


@triton.jit
def _summed(x_ptr, y_ptr, gate_ptr, sum_ptr, start, column, width, ADD, GATE):
    """x + y * gate of a part of a row, stored too; zero where the row has ended."""
    inside = column < width
    x = tl.load(x_ptr + start + column, mask=inside, other=0.0)
    if ADD:
        y = tl.load(y_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        if GATE:
            y *= tl.load(gate_ptr + column, mask=inside, other=0.0)
        x += y
        tl.store(sum_ptr + start + column, x, mask=inside)
    return x


@triton.jit
def _scaled(centred, rstd, weight_ptr, bias_ptr, one, column, width):
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return centred * rstd * (one + weight) + bias


@triton.jit(do_not_specialize=["length", "one", "eps"])
def _add_norm(
    x_ptr,
    y_ptr,
    gate_ptr,
    sum_ptr,
    weight_ptr,
    bias_ptr,
    tokens_ptr,
    codes_ptr,
    scale_ptr,
    length,
    width,
    gate_stride,
    weight_stride,
    bias_stride,
    one,
    eps,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    LIMIT: tl.constexpr,
    WHOLE: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """sum = x + y * gate; then LayerNorm(sum) * (one + weight) + bias as tokens, codes or both."""
    row = tl.program_id(0).to(tl.int64)
    start, clip = row * width, row // length
    head, tail = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    if GATE:
        gate_ptr += clip * gate_stride
    a = _summed(x_ptr, y_ptr, gate_ptr, sum_ptr, start, head, width, ADD, GATE)
    b = _summed(x_ptr, y_ptr, gate_ptr, sum_ptr, start, tail, width, ADD, GATE)
    if NORM:
        mean = (tl.sum(a, axis=0) + tl.sum(b, axis=0)) / width
        a -= mean
        b = tl.where(tail < width, b - mean, 0.0)
        variance = (tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) / width
        rstd = tl.rsqrt(variance + eps)
        weight_ptr += clip * weight_stride
        bias_ptr += clip * bias_stride
        a = _scaled(a, rstd, weight_ptr, bias_ptr, one, head, width)
        b = _scaled(b, rstd, weight_ptr, bias_ptr, one, tail, width)
        _store_row(
            *(a, b, row, width, tokens_ptr, codes_ptr, scale_ptr),
            *(HEAD, TAIL, TOKENS, LIMIT, WHOLE),
        )


@triton.jit
def _activated(x_ptr, y_ptr, start, column, width, ADD, GELU):
    x = tl.load(x_ptr + start + column, mask=column < width, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(y_ptr + start + column, mask=column < width, other=0.0).to(tl.float32)
    if GELU:
        # 0.5 * (1 + tanh(u)) is sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
        x *= tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    return x


@triton.jit
def _rows(
    x_ptr,
    y_ptr,
    tokens_ptr,
    codes_ptr,
    scale_ptr,
    width,
    stride,
    ADD: tl.constexpr,
    GELU: tl.constexpr,
    TOKENS: tl.constexpr,
    LIMIT: tl.constexpr,
    WHOLE: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """x, x + y, or GELU of that in the tanh form, as tokens, codes or both."""
    row = tl.program_id(0).to(tl.int64)
    a = _activated(x_ptr, y_ptr, row * stride, tl.arange(0, HEAD), width, ADD, GELU)
    b = _activated(x_ptr, y_ptr, row * stride, HEAD + tl.arange(0, TAIL), width, ADD, GELU)
    _store_row(
        *(a, b, row, width, tokens_ptr, codes_ptr, scale_ptr), *(HEAD, TAIL, TOKENS, LIMIT, WHOLE)
    )


@triton.jit
def _scale_sums(
    sums_ptr,
    row_scale_ptr,
    column_scale_ptr,
    bias_ptr,
    y_ptr,
    width,
    BY_COLUMN: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = sums * row_scale * column_scale + bias, some columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    sums = tl.load(sums_ptr + row * width + column, mask=inside, other=0).to(tl.float32)
    y = sums * tl.load(row_scale_ptr + row)
    if BY_COLUMN:
        y *= tl.load(column_scale_ptr + column, mask=inside, other=0.0)
    else:
        y *= tl.load(column_scale_ptr)
    if BIAS:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + column, y, mask=inside)


def _launch(kernel: Any, rows: int, width: int, *arguments: object, **flags: object) -> None:
    """A program for each row. Blocks are powers of two, of which two fit most widths closely."""
    head = triton.next_power_of_2(width) // 2
    parts = {"HEAD": head, "TAIL": triton.next_power_of_2(width - head)}
    with torch.cuda.device_of(arguments[0]):
        kernel[(rows,)](*arguments, **flags, **parts, num_warps=_warps(width, flags["LIMIT"] != 0))


def _warps(width: int, has_codes: bool) -> int:
    """As measured on an H200 at 5120 and 13824: a row's largest value is waited for by fewer."""
    return min(max(triton.next_power_of_2(width) // (2048 if has_codes else 1024), 1), 16)


class _Targets:
    """Where a kernel writes an activation of some form, and the activation itself."""

    def __init__(self, like: Tensor, form: Form) -> None:
        width = like.shape[-1]
        rows = like.numel() // width
        makes_tokens = form.codes is None or form.tokens
        self.tokens = (
            torch.empty(like.shape, dtype=form.dtype, device=like.device) if makes_tokens else None
        )
        self.codes = self.scale = None
        if form.codes is not None:
            self.codes = torch.empty(rows, width, dtype=form.codes, device=like.device)
            self.scale = torch.empty(rows, 1, dtype=torch.float32, device=like.device)
        self.flags: dict[str, object] = {
            "TOKENS": makes_tokens,
            "LIMIT": 0.0 if form.codes is None else LIMITS[form.codes],
            "WHOLE": form.codes is not None and not form.codes.is_floating_point,
        }
        self.form, self.shape = form, like.shape

    @property
    def activation(self) -> Tensor | Rows:
        if self.codes is None or self.scale is None:
            assert self.tokens is not None
            return self.tokens
        return Rows(self.codes, self.scale, self.shape, self.form.dtype, self.tokens)


def add_norm(
    x_BLE: Tensor,
    y_BLE: Tensor | None,
    gate_B1E: Tensor | None,
    norm: tuple[Tensor, Tensor, float, float],
    form: Form,
    in_place: bool,
) -> tuple[Tensor, Tensor | Rows]:
    """(x + y * gate, its LayerNorm * (one + weight) + bias in `form`); `norm` is (weight, bias,
    one, eps), weight and bias E or B1E. Without `y` the first is `x` itself."""
    x_BLE = x_BLE.contiguous()
    total = x_BLE if y_BLE is None or in_place else torch.empty_like(x_BLE)
    y = None if y_BLE is None else y_BLE.contiguous()
    targets = _Targets(x_BLE, form)
    flags = {"ADD": y is not None, "GATE": gate_B1E is not None, "NORM": True}
    _launch_add_norm(x_BLE, y, gate_B1E, total, norm, targets, flags)
    return total, targets.activation


def add(x_BLE: Tensor, y_BLE: Tensor, gate_B1E: Tensor | None, in_place: bool) -> Tensor:
    """x + y * gate in float32."""
    x_BLE = x_BLE.contiguous()
    total = x_BLE if in_place else torch.empty_like(x_BLE)
    flags = {"ADD": True, "GATE": gate_B1E is not None, "NORM": False}
    flags |= {"TOKENS": False, "LIMIT": 0.0, "WHOLE": False}
    _launch_add_norm(x_BLE, y_BLE.contiguous(), gate_B1E, total, None, None, flags)
    return total


def _launch_add_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    total: Tensor,
    norm: tuple[Tensor, Tensor, float, float] | None,
    targets: _Targets | None,
    flags: Mapping[str, object],
) -> None:
    length, width = x.shape[-2:]
    weight, bias, *numbers = norm or (None, None, 0.0, 0.0)
    pointers = (x, y, gate, total, weight, bias)
    outputs = (
        (None, None, None) if targets is None else (targets.tokens, targets.codes, targets.scale)
    )
    strides = tuple(_batch_stride(table, width) for table in (gate, weight, bias))
    flags = {**flags, **(targets.flags if targets else {})}
    rows = x.numel() // width
    _launch(_add_norm, rows, width, *pointers, *outputs, length, width, *strides, *numbers, **flags)


def _batch_stride(table: Tensor | None, width: int) -> int:
    """Between the clips of B1E; 0 where one row serves all."""
    if table is None or table.ndim == 1 or table.shape[0] == 1:
        return 0
    assert table.shape[-1] == width and table.stride(-1) == 1
    return table.stride(0)


def rows(x: Tensor, form: Form, gelu: bool = False, more: Tensor | None = None) -> Tensor | Rows:
    """x, x + more, or GELU of that in the tanh form, in `form`. Tokens that are not changed are `x`
    itself."""
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    flat = flat if flat.stride(-1) == 1 and more is None else flat.contiguous()
    other = None if more is None else more.reshape(-1, width).contiguous()
    changes = gelu or more is not None
    targets = _Targets(x, form if changes else form._replace(tokens=False))
    outputs = (targets.tokens, targets.codes, targets.scale)
    _launch(
        _rows,
        flat.shape[0],
        width,
        flat,
        other,
        *outputs,
        width,
        flat.stride(0),
        ADD=more is not None,
        GELU=gelu,
        **targets.flags,
    )
    if not changes and form.tokens:
        targets.tokens = x
    return targets.activation


def scale_sums(
    sums_LM: Tensor, row_scale_L1: Tensor, column_scale: Tensor, bias: Tensor | None, y_LM: Tensor
) -> None:
    """y = sums * row_scale * column_scale + bias, computed in float32, into `y_LM`."""
    rows, width = sums_LM.shape
    block = min(triton.next_power_of_2(width), 2048)
    kernel: Any = _scale_sums
    flags = {"BY_COLUMN": column_scale.numel() > 1, "BIAS": bias is not None, "BLOCK": block}
    with torch.cuda.device_of(sums_LM):
        kernel[(rows, triton.cdiv(width, block))](
            sums_LM, row_scale_L1, column_scale, bias, y_LM, width, **flags, num_warps=4
        )
