"""Puts LoRAs on a transformer and takes them off again, bit for bit.

As branches beside the linears on any base, or merged into the weights of full-precision ones. What
is no linear (norms, biases, modulation, patch embedding) is replaced by a sum in either case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import CapabilityError, RequestError
from ..wan.model import WanModel
from .branches import Branch, Level, set_lora, weight_shapes
from .match import LoraMatch, LoraReport, match_lora
from .read import LoraFile
from .steps import Strengths, Sum, keep_steps

Terms = dict[str, tuple[Branch, ...]]  # by tensor name


def apply_loras(
    model: WanModel,
    loras: Sequence[tuple[LoraFile, Strengths]],
    expert: str | None = None,
    merge: bool = False,
) -> list[LoraReport]:
    """Replace whatever LoRAs are on `model` by these; an empty list removes all, bit for bit.

    A strength is one number, or one for each step (`steps_of(model).follow` moves through them).
    The order of `loras` changes nothing, not even the last bit. `merge` adds them to the weights
    in float32 and rounds once: no branch to compute, a second copy of the changed weights in RAM.
    To be called while the weights are where they were loaded, not placed on a card.
    Raises with nothing changed: CheckpointError when a file matches nothing or a shape differs,
    CapabilityError for a merge into quantised weights, RequestError for one that changes by step.
    """
    shapes = weight_shapes(model)
    matches = [match_lora(lora, shapes, strengths, expert) for lora, strengths in loras]
    branches: Terms = {}
    sums: Terms = {}
    for match in sorted(matches, key=lambda match: match.order):
        _collect(model, match, branches, sums)
    if merge:
        _check_merge(model, branches, [match.report for match in matches])
        for name, terms in branches.items():
            if active := tuple(term for term in terms if not term.is_idle):
                sums[f"{name}.weight"] = active
        branches = {}
    set_lora(model, branches)
    kept = _set_sums(model, sums)
    keep_steps(model, [b for terms in branches.values() for b in terms], kept)
    return [match.report for match in matches]


def _collect(model: WanModel, match: LoraMatch, branches: Terms, sums: Terms) -> None:
    """Sort the parts of one LoRA into branches by module and sums by tensor."""
    strength, level = _strength(match)
    for name, pair in match.pairs.items():
        branch = Branch(pair.down_RK, pair.up_MR, strength * pair.scale, level)
        branches[name] = (*branches.get(name, ()), branch)
    for name, difference in match.differences.items():
        term = Branch(difference, None, strength, level)
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and hasattr(model.get_submodule(module), "branches"):
            branches[module] = (*branches.get(module, ()), term)
        elif not term.is_idle:
            sums[name] = (*sums.get(name, ()), term)


def _strength(match: LoraMatch) -> tuple[float, Level | None]:
    strengths = match.report.strengths
    if isinstance(strengths, (int, float)):
        return float(strengths), None
    return 1.0, Level(match.report.name, strengths)


def _check_merge(model: WanModel, branches: Terms, reports: list[LoraReport]) -> None:
    for report in reports:
        if not isinstance(report.strengths, (int, float)):
            raise RequestError(
                f"{report.name} has a strength for each step, which cannot be merged into the "
                "weights; give one strength, or do not merge"
            )
    for name in branches:
        linear: Any = model.get_submodule(name)
        if isinstance(linear, nn.Linear) and linear.weight.itemsize >= 2:
            continue
        weight = getattr(linear, "weight", None)
        stored = type(linear).__name__ if weight is None else str(weight.dtype)
        raise CapabilityError(
            f"{name} is stored as {stored.removeprefix('torch.')}, and merging a LoRA would round "
            "it to the codes of the quantised weight; do not merge (it is applied exactly beside "
            "the weights), or use a bf16, fp16 or fp32 model"
        )


def _set_sums(model: WanModel, sums: Terms) -> list[Sum]:
    """Tensors are replaced by sums; the loaded ones are kept and put back first."""
    originals: dict[str, nn.Parameter] = model.__dict__.setdefault("_lora_originals", {})
    for name, parameter in originals.items():
        _put(model, name, parameter)
    originals.clear()
    kept = []
    for name, terms in sums.items():
        originals[name] = model.get_parameter(name)
        owner, _, leaf = name.rpartition(".")
        made = Sum(model.get_submodule(owner), leaf, originals[name], terms)
        _put(model, name, made.total())
        kept.append(made)
    return kept


def _put(model: WanModel, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
    model.get_submodule(owner)._parameters[leaf] = parameter
