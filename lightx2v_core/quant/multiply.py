"""Which matmul each linear of codes takes on a device, chosen once, after loading."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from ..device import describe_card
from ..errors import CapabilityError
from ..ops.matmul import DEQUANTISE, MEASURED, ROWS, Choice, Weight, check_matmul, select_matmul
from .linear import DequantisedLinear, QuantisedLinear
from .measured import fastest

log = logging.getLogger(__name__)


def set_matmul(
    model: nn.Module,
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    cache: Path | None = None,
) -> str:
    """Give every linear of codes in `model` its row of ops/matmul.py; one line that says which.

    The line is empty for a model without such linears. `measured` times the rows on `device`, once
    for each shape, and keeps the times in the folder `cache` where there is one. Raises
    CapabilityError when a named row cannot multiply one of them on `device`, or there is nothing
    for it to multiply.
    """
    linears = [module for module in model.modules() if isinstance(module, DequantisedLinear)]
    if not linears:
        check_matmul(name)
        if name not in ("auto", MEASURED, DEQUANTISE):
            raise CapabilityError(
                f"matmul {name!r} multiplies 8-bit weights and this model has none; load an fp8 or "
                "int8 file, or quantise while loading"
            )
        return ""
    card = describe_card(device)
    chosen: Counter[Choice] = Counter()

    @functools.cache  # a model has hundreds of linears, of a few shapes
    def choose(weight: Weight) -> Choice:
        if name == MEASURED:
            return fastest(weight, card, torch.device(device), dtype, cache)
        return select_matmul(name, card, weight, dtype)

    for linear in linears:
        choice = choose(Weight(linear.codes_name, linear.in_features, linear.out_features))
        chosen[choice] += 1
        if isinstance(linear, QuantisedLinear):
            linear.use(ROWS[choice.row])
    line = _describe(chosen)
    log.info("matmul: %s", line)
    return line


def _describe(chosen: Counter[Choice]) -> str:
    counted = len(chosen) > 1
    parts = []
    for choice, count in chosen.most_common():
        number = f" in {count} linears" if counted else ""
        parts.append(f"{choice.row}{number}{f' ({choice.why})' if choice.why else ''}")
    return ", ".join(parts)
