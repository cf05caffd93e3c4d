"""What lies between the matmuls of a block: one function for each contract.

Each computes in Triton where ops/fused.py has something for the device and there are no
gradients, else in plain PyTorch. An activation leaves in the `Form` that the linears reading it
want: as a tensor, or quantised already.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import kernels_for, load_kernels
from .layers import LayerNorm, Linear, cast
from .norm_rotary import HALVES
from .norm_rotary import kernel_runs as norm_runs
from .rows import Form, Rows, quantise_rows, tokens_of


def computes_in_one_pass(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether what lies between the matmuls of a block, all of it, computes in Triton."""
    return dtype in HALVES and load_kernels(device).module is not None and norm_runs(device)


class ModulatedNorm(NamedTuple):
    """LayerNorm without parameters, then x * (1 + scale) + shift, all in float32."""

    shift_B1E: Tensor
    scale_B1E: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
        return normed * (1 + self.scale_B1E) + self.shift_B1E


Norm = ModulatedNorm | nn.Module


def rows_of(x: Tensor | Rows, codes: torch.dtype) -> Rows:
    """`x` as rows of `codes`; quantised here unless it is that already."""
    if isinstance(x, Rows) and x.codes_LK.dtype == codes:
        return x
    tokens = tokens_of(x)
    form = Form(tokens.dtype, codes, tokens=False)
    kernels = kernels_for(tokens)
    return _plainly(tokens, form) if kernels is None else kernels.rows(tokens, form)


def norm(x_BLE: Tensor, how: Norm, form: Form) -> Tensor | Rows:
    """`how` applied to the float32 residual, in `form`."""
    kernels, parameters = kernels_for(x_BLE), _parameters(how, x_BLE)
    if kernels is None or parameters is None:
        return _in_form(how(x_BLE).to(form.dtype), form)
    return kernels.add_norm(x_BLE, None, None, parameters, form, in_place=False)[1]


def total(x: Tensor, y: Tensor, form: Form) -> Tensor | Rows:
    """x + y, both in the dtype of `form`, in `form`."""
    kernels = kernels_for(x)
    if kernels is None or form.codes is None:
        return _in_form(x + y, form)
    return kernels.rows(x, form, more=y)


def add(x_BLE: Tensor, y_BLE: Tensor, gate_B1E: Tensor, in_place: bool = False) -> Tensor:
    """x + y * gate, float32. `in_place` allows to write over x; what is returned counts."""
    kernels = kernels_for(x_BLE)
    if kernels is None or x_BLE.dtype != torch.float32:
        return x_BLE + y_BLE * gate_B1E
    return kernels.add(x_BLE, y_BLE, gate_B1E, in_place)


def add_norm(
    x_BLE: Tensor,
    y_BLE: Tensor,
    gate_B1E: Tensor | None,
    how: Norm,
    form: Form,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | Rows]:
    """(x + y * gate, `norm` of that); no gate is a gate of 1."""
    kernels, parameters = kernels_for(x_BLE), _parameters(how, x_BLE)
    if kernels is None or parameters is None:
        x_BLE = x_BLE + (y_BLE if gate_B1E is None else y_BLE * gate_B1E)
        return x_BLE, _in_form(how(x_BLE).to(form.dtype), form)
    return kernels.add_norm(x_BLE, y_BLE, gate_B1E, parameters, form, in_place)


def gelu_of(linear: nn.Module, x: Tensor | Rows, form: Form) -> Tensor | Rows:
    """GELU, in its tanh form, of `linear` (x), in `form`."""
    kernels = kernels_for(x)
    if kernels is None:
        return _in_form(F.gelu(linear(x), approximate="tanh"), form)
    if form.codes is None and isinstance(x, Tensor) and _has_epilogue(linear, x):
        assert isinstance(linear, Linear)
        y_LM = torch._addmm_activation(  # pyright: ignore[reportPrivateImportUsage]
            cast(linear.bias, x), x.flatten(0, -2), cast(linear.weight, x).t(), use_gelu=True
        )
        return y_LM.unflatten(0, x.shape[:-1])
    return kernels.rows(linear(x), form, gelu=True)


def scale_sums(
    sums_LM: Tensor, row_scale_L1: Tensor, column_scale: Tensor, bias: Tensor | None, y_LM: Tensor
) -> None:
    """y = sums * row_scale * column_scale + bias, computed in float32; column_scale M1 or 11."""
    kernels = kernels_for(sums_LM)
    if kernels is not None:
        kernels.scale_sums(sums_LM, row_scale_L1, column_scale, bias, y_LM)
        return
    wide = (sums_LM * row_scale_L1).mul_(column_scale.reshape(1, -1))
    y_LM.copy_(wide if bias is None else wide.add_(bias))


def _has_epilogue(linear: nn.Module, x: Tensor) -> bool:
    """Whether cuBLAS can apply bias and GELU while it writes the product (in its tanh form)."""
    is_ours = type(linear) is Linear and linear.bias is not None and not linear.branches
    return is_ours and x.dtype in (torch.bfloat16, torch.float16)


def _parameters(how: Norm, x: Tensor) -> tuple[Tensor, Tensor, float, float] | None:
    """(weight, bias, what is added to the weight, eps), or None for a norm that is not ours."""
    if x.dtype != torch.float32:
        return None
    if isinstance(how, ModulatedNorm):
        return how.scale_B1E, how.shift_B1E, 1.0, how.eps
    if type(how) is LayerNorm and how.weight is not None and how.bias is not None:
        return how.weight.to(x.device), how.bias.to(x.device), 0.0, how.eps
    return None


def _in_form(tokens: Tensor, form: Form) -> Tensor | Rows:
    return tokens if form.codes is None else _plainly(tokens, form)


def _plainly(tokens: Tensor, form: Form) -> Rows:
    assert form.codes is not None
    codes, scale = quantise_rows(tokens.reshape(-1, tokens.shape[-1]), form.codes)
    return Rows(codes, scale, tokens.shape, form.dtype, tokens if form.tokens else None)
