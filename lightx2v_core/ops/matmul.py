"""Linears of 8-bit weights: one contract, several rows, each with what keeps it from running.

y LM = x LK @ (codes MK * scale)^T + bias, the activations quantised on the fly with one scale for
each token. Knows tensors and cards; knows nothing of files.
Scaling: https://docs.nvidia.com/cuda/cublas/#d-block-scaling-modes-for-fp8-and-fp4-data-types
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ..device import Card
from ..errors import CapabilityError
from .fused import kernels_for
from .glue import rows_of, scale_sums
from .rows import CHUNK, Rows, tokens_of

# (x LK, codes MK, scale M1 or 11 float32, bias M or None) -> y LM in the dtype of x.
Multiply = Callable[[Tensor | Rows, Tensor, Tensor, Tensor | None], Tensor]

FP8, FP8_WIDE, INT8 = "float8_e4m3fn", "float8_e5m2", "int8"
DEQUANTISE = "dequantise"


class Weight(NamedTuple):
    """What a row must know of a linear; `codes` is the name of a dtype or of a packed format."""

    codes: str
    in_features: int
    out_features: int


class Row(NamedTuple):
    multiply: Multiply | None  # None: the linear dequantises its weight and multiplies plainly
    codes: tuple[str, ...]  # that it multiplies; empty: any
    card_blocked_by: Callable[[Card, Weight], str | None]
    rows_dtype: torch.dtype | None = None  # of the activations' codes; None: it takes tokens

    def blocked_by(self, card: Card, weight: Weight) -> str | None:
        """None when usable, else the reason in words."""
        if self.codes and weight.codes not in self.codes:
            return f"it multiplies {' or '.join(self.codes)} codes and these are {weight.codes}"
        return self.card_blocked_by(card, weight)


def fp8_row(x: Tensor | Rows, codes_MK: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """torch._scaled_mm with a scale for each token and each output row."""
    rows = rows_of(x, torch.float8_e4m3fn)
    # Row-wise kernels give bfloat16 on every card that has them; a CPU gives what is asked.
    dtype = rows.dtype if rows.device.type == "cpu" else torch.bfloat16
    y = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        rows.codes_LK,
        codes_MK.t(),
        rows.scale_L1,
        scale.reshape(1, -1).expand(1, codes_MK.shape[0]).contiguous(),
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return y.to(rows.dtype)


def fp8_tensor(x: Tensor | Rows, codes_MK: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """torch._scaled_mm with one scale for the weight; those of tokens and rows multiply after it.

    For cards and systems without row-wise scaling.
    """
    rows = rows_of(x, torch.float8_e4m3fn)
    one, by_row = torch.ones((), device=rows.device), scale.numel() > 1
    wide = torch.float32 if rows.device.type == "cpu" else torch.bfloat16
    sums = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        rows.codes_LK,
        codes_MK.t(),
        one,
        one if by_row else scale.reshape(()),
        out_dtype=wide,
        use_fast_accum=True,
    )
    if kernels_for(sums) is not None:
        y = sums if sums.dtype == rows.dtype else torch.empty_like(sums, dtype=rows.dtype)
        scale_sums(sums, rows.scale_L1, scale if by_row else one, bias, y)
        return y
    y = sums.mul_(rows.scale_L1)
    return _add(y.mul_(scale.reshape(1, -1)) if by_row else y, bias).to(rows.dtype)


def int8(x: Tensor | Rows, codes_MK: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """torch._int_mm: the sum is exact in int32, both scales and the bias follow in float32."""
    rows = rows_of(x, torch.int8)
    y = torch.empty(rows.codes_LK.shape[0], codes_MK.shape[0], dtype=rows.dtype, device=rows.device)
    step = max(CHUNK // max(codes_MK.shape) // 128, 1) * 128
    parts = zip(y.split(step), rows.codes_LK.split(step), rows.scale_L1.split(step), strict=True)
    for part, x_codes, x_scale in parts:
        padded = _at_least(x_codes, 32)
        sums = torch._int_mm(padded, codes_MK.t())  # pyright: ignore[reportPrivateImportUsage]
        scale_sums(sums[: len(part)], x_scale, scale, bias, part)
    return y


def _at_least(codes_LK: Tensor, rows: int) -> Tensor:
    """Padded with zeros: on CUDA the int8 product takes more than 16 rows."""
    missing = rows - codes_LK.shape[0]
    return codes_LK if missing <= 0 else torch.nn.functional.pad(codes_LK, (0, 0, 0, missing))


def kitchen_int8(x: Tensor | Rows, codes_MK: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """comfy-kitchen's int8 linear, which quantises the tokens in its own kernel."""
    from comfy_kitchen import int8_linear

    x_LK = tokens_of(x)
    bias = None if bias is None else bias.to(x_LK.dtype)
    return int8_linear(x_LK, codes_MK, scale.reshape(-1), bias, x_LK.dtype)


def _add(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y.add_(bias)


def _unfit(card: Card, weight: Weight, least: tuple[int, int], multiple: int) -> str | None:
    """What rows of PyTorch's own matmuls have in common."""
    if card.kind == "rocm":
        return "it has not been tried on AMD cards"
    if card.kind not in ("cuda", "cpu"):
        return f"PyTorch has no 8-bit matmul on {card.kind}"
    if card.kind == "cpu" and card.torch < (2, 13):
        return "on a CPU it was tried with PyTorch 2.13 and newer only"
    if card.kind == "cuda" and card.capability < least:
        return (
            f"it needs compute capability {_dotted(least)} and this is {_dotted(card.capability)}"
        )
    sides = (weight.in_features, weight.out_features)
    if card.kind == "cuda" and any(side % multiple for side in sides):
        return f"its sides must be multiples of {multiple} and these are {sides[0]} and {sides[1]}"
    return None


def _dotted(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"


# Major compute capability -> the first PyTorch that has row-wise kernels for it
# (pytorch/pytorch pull requests 125204, 145676, 155991).
ROW_WISE_SINCE = {8: (2, 7), 9: (2, 5), 10: (2, 8), 12: (2, 9)}


def _fp8_row_blocked_by(card: Card, weight: Weight) -> str | None:
    reason = _unfit(card, weight, (8, 9), 16)
    if reason or card.kind != "cuda":
        return reason
    if card.windows:
        return "PyTorch for Windows is built without row-wise scaling"
    since = ROW_WISE_SINCE.get(card.capability[0])
    if since is None:
        return f"row-wise scaling is not known for compute capability {_dotted(card.capability)}"
    if card.torch < since:
        return f"it needs PyTorch {_dotted(since)} on this card and this is {_dotted(card.torch)}"
    return None


def _fp8_tensor_blocked_by(card: Card, weight: Weight) -> str | None:
    if card.kind == "cpu":
        return "on a CPU PyTorch runs it in a loop that takes seconds for each linear"
    return _unfit(card, weight, (8, 9), 16)


def _int8_blocked_by(card: Card, weight: Weight) -> str | None:
    return _unfit(card, weight, (8, 0), 8)


def _dequantise_blocked_by(card: Card, weight: Weight) -> str | None:
    if card.kind == "mps" and weight.codes in (FP8, FP8_WIDE, "mxfp8"):
        # https://github.com/pytorch/pytorch/issues/148420
        return "PyTorch has no float8 on Apple GPUs; use an int8, bf16 or fp16 file"
    return None


def _kitchen_blocked_by(card: Card, weight: Weight) -> str | None:
    if find_spec("comfy_kitchen") is None:
        return "the comfy-kitchen package is not installed"
    return _unfit(card, weight, (7, 5), 16)


# "auto" takes the first that is not blocked.
ROWS = {
    "fp8-row": Row(fp8_row, (FP8,), _fp8_row_blocked_by, torch.float8_e4m3fn),
    "fp8-tensor": Row(fp8_tensor, (FP8, FP8_WIDE), _fp8_tensor_blocked_by, torch.float8_e4m3fn),
    "int8": Row(int8, (INT8,), _int8_blocked_by, torch.int8),
    "kitchen-int8": Row(kitchen_int8, (INT8,), _kitchen_blocked_by),
    DEQUANTISE: Row(None, (), _dequantise_blocked_by),
}
MEASURED = "measured"  # the fastest row by time, see quant/measured.py
MATMUL_CHOICES = ("auto", MEASURED, *ROWS)


class Choice(NamedTuple):
    """The name of a row, and why nothing faster was taken (empty where nothing is)."""

    row: str
    why: str = ""


def check_matmul(name: str) -> None:
    """Raise CapabilityError for a name that no row has."""
    if name not in MATMUL_CHOICES:
        raise CapabilityError(f"matmul {name!r} is unknown; use {', '.join(MATMUL_CHOICES)}")


def select_matmul(name: str, card: Card, weight: Weight, dtype: torch.dtype) -> Choice:
    """The row for one kind of weight; a named choice is honoured or refused, never replaced.

    `dtype` is what the rest computes in: `auto` multiplies in 8 bits on CUDA cards that compute in
    half precision, and is exact elsewhere. Raises CapabilityError when `name` is unknown or cannot
    multiply `weight` on `card`.
    """
    check_matmul(name)
    if reason := ROWS[DEQUANTISE].blocked_by(card, weight):
        raise CapabilityError(f"{weight.codes} weights cannot be used here: {reason}")
    if name == "auto":
        return _fastest(card, weight, dtype)
    if reason := ROWS[name].blocked_by(card, weight):
        raise CapabilityError(f"matmul {name!r} cannot run here: {reason}; use auto")
    return Choice(name)


def _fastest(card: Card, weight: Weight, dtype: torch.dtype) -> Choice:
    if card.kind != "cuda" or dtype == torch.float32:
        return Choice(DEQUANTISE, "8 bits are multiplied on CUDA cards in half precision")
    why = ""
    for name, row in ROWS.items():
        reason = row.blocked_by(card, weight)
        if reason is None:
            return Choice(name, why if name == DEQUANTISE else "")
        if weight.codes in row.codes:
            why = why or f"{name}: {reason}"
    raise AssertionError("the last row is never blocked")
