"""Patches as ComfyUI's LoRA loaders leave them, sorted into branches and changes in place."""

from __future__ import annotations

import comfy.utils
import comfy.weight_adapter
from torch import Tensor, nn

from ..lightx2v_core.errors import CapabilityError
from ..lightx2v_core.lora.branches import Branch, Level
from .strengths import Patch, refuse_changing, steps_in


def sort_patches(
    model: nn.Module, patches: dict[str, list[Patch]], merge: bool = False
) -> tuple[dict[str, tuple[Branch, ...]], list[str]]:
    """Branches by module name, and the keys whose weight must be changed in place.

    `merge` sends everything in place, for saving. Patches that change nothing are left out, so that
    strength 0 is bit-identical to no LoRA.
    """
    if merge:
        refuse_changing(patches, "a weight that it is merged into")
    branches, in_place = {}, []
    levels: dict[int, Level] = {}
    for key, wanted in patches.items():
        active = [p for p in wanted if p[0] != 0.0 or p[2] != 1.0]
        made = None if merge else _branches(model, key, active, levels)
        if made is not None:
            branches[key.rpartition(".")[0]] = made
        elif active:
            in_place.append(key)
    return branches, in_place


def refuse_quantised(model: nn.Module, key: str, what: str) -> None:
    """Adding to codes of a quantised weight would change nothing and say nothing."""
    weight = comfy.utils.get_attr(model, key)
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise CapabilityError(
            f"{key} is stored as {weight.dtype}, and {what} would have to change it in place; "
            "use a bf16 or fp16 file, or a LoRA of up and down pairs"
        )


def _branches(
    model: nn.Module, key: str, patches: list[Patch], levels: dict[int, Level]
) -> tuple[Branch, ...] | None:
    name, _, leaf = key.rpartition(".")
    linear = comfy.utils.get_attr(model, name) if name else model
    if leaf != "weight" or not hasattr(linear, "branches"):
        return None
    made = [_branch(patch, linear, levels) for patch in patches]
    return None if any(branch is None for branch in made) else tuple(made)


def _branch(patch: Patch, linear: nn.Linear, levels: dict[int, Level]) -> Branch | None:
    """None where the patch has no branch form (LoHa, DoRA, merges, slices, other shapes)."""
    strength, value, base_strength, offset, function = patch
    if base_strength != 1.0 or offset is not None or function is not None:
        return None
    level = None
    if steps_in(patch):
        # All patches of one LoRA hold the same strength, and their branches share its level.
        level = levels.setdefault(id(strength), strength.level())
        strength = 1.0
    shape = (linear.out_features, linear.in_features)
    if isinstance(value, comfy.weight_adapter.LoRAAdapter):
        up, down, alpha, *rest = value.weights
        up, down = up.flatten(1), down.flatten(1)
        if any(part is not None for part in rest) or (up.shape[0], down.shape[1]) != shape:
            return None
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        return Branch(down, up, float(strength) * scale, level)
    diff = _full_difference(value)
    return (
        Branch(diff, None, float(strength), level)
        if diff is not None and diff.shape == shape
        else None
    )


def _full_difference(value: object) -> Tensor | None:
    """The tensor of ("diff", (tensor,)) or (tensor,), the two spellings the host uses."""
    if not isinstance(value, tuple):
        return None
    if len(value) == 2 and value[0] == "diff" and len(value[1]) == 1:
        return value[1][0]
    return value[0] if len(value) == 1 and isinstance(value[0], Tensor) else None
