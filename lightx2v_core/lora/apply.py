"""Puts LoRAs on a transformer and says what matched. Base weights stay as they were loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import CheckpointError, preview
from ..quant.shapes import weight_shapes
from ..wan.model import WanModel
from .branches import Branch, set_lora
from .read import LoraFile, Pair, without_dots

# Layers that only models with a CLIP branch have: a LoRA of such a model fits one without.
IMAGE_LAYERS = re.compile(r"img_emb|k_img|v_img|norm_k_img")


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What became of one LoRA. Counts are of pairs and differences, not of tensors."""

    name: str
    strength: float
    matched: int
    harmless: tuple[str, ...]
    failed: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def total(self) -> int:
        return self.matched + len(self.harmless) + len(self.failed)

    def describe(self) -> str:
        """One line; names what did not match and whether that matters."""
        ranks = "/".join(map(str, self.ranks)) or "none"
        scales = "/".join(f"{scale:g}" for scale in self.scales) or "1"
        text = (
            f"{self.name}: matched {self.matched}/{self.total}, rank {ranks}, "
            f"effective strength {self.strength:g} x {scales}"
        )
        if self.harmless:
            text += (
                f"; ignored {len(self.harmless)} image-embedding layers this model does not have: "
                "harmless"
            )
        if self.failed:
            text += f"; NOT applied: {len(self.failed)} ({preview(self.failed)})"
        return text


def apply_loras(model: WanModel, loras: Sequence[tuple[LoraFile, float]]) -> list[LoraReport]:
    """Replace whatever LoRAs are on `model` by these; an empty list removes all, bit for bit.

    To be called while the weights are where they were loaded, not placed on a card.
    Raises CheckpointError, with nothing changed, when a file matches nothing or a shape differs.
    """
    shapes = weight_shapes(model)
    has_clip = model.config.clip_tokens > 0
    branches: dict[str, tuple[Branch, ...]] = {}
    added: dict[str, list[tuple[float, Tensor]]] = {}
    reports = []
    for lora, strength in loras:
        match = match_lora(lora, shapes, strength, has_clip)
        reports.append(match.report)
        for name, pair in match.pairs.items():
            branch = Branch(pair.down_RK, pair.up_MR, strength * pair.scale)
            branches[name] = (*branches.get(name, ()), branch)
        for name, difference in match.differences.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and hasattr(model.get_submodule(module), "branches"):
                branches[module] = (*branches.get(module, ()), Branch(difference, None, strength))
            elif strength:
                added.setdefault(name, []).append((strength, difference))
    set_lora(model, branches)
    _set_differences(model, added)
    return reports


@dataclass(frozen=True, slots=True, eq=False)
class LoraMatch:
    """A LoRA with the names of one model: pairs by module, differences by tensor."""

    pairs: dict[str, Pair]
    differences: dict[str, Tensor]
    report: LoraReport


def match_lora(
    lora: LoraFile, shapes: Mapping[str, tuple[int, ...]], strength: float, has_clip: bool
) -> LoraMatch:
    """Find the place of every part of `lora` in a model with tensors of `shapes`.

    Raises CheckpointError when nothing matches or a pair has the shape of another model.
    """
    dotless = without_dots(name.rpartition(".")[0] for name in shapes)
    pairs, differences, unmatched = {}, {}, list(lora.unknown)
    for name, pair in lora.pairs.items():
        name = dotless.get(name, name)
        weight = shapes.get(f"{name}.weight", ())
        if len(weight) != 2:
            unmatched.append(name)
            continue
        _check_shape(lora, name, (pair.up_MR.shape[0], pair.down_RK.shape[1]), weight)
        pairs[name] = pair
    for name, difference in lora.differences.items():
        stem, _, leaf = name.rpartition(".")
        name = f"{dotless.get(stem, stem)}.{leaf}"
        if shapes.get(name) == tuple(difference.shape):
            differences[name] = difference
        else:
            unmatched.append(name)
    image = [n for n in unmatched if IMAGE_LAYERS.search(n) and not has_clip]
    failed = sorted(set(unmatched) - set(image))
    matched = len(pairs) + len(differences)
    if not matched:
        raise CheckpointError(
            f"no layer of {lora.name} matches this model ({preview(failed or image)}); it was "
            "trained for another model, or its naming is not known here"
        )
    ranks = tuple(sorted({pair.rank for pair in lora.pairs.values()}))
    scales = tuple(sorted({round(pair.scale, 6) for pair in lora.pairs.values()}))
    sorted_image = tuple(sorted(image))
    report = LoraReport(lora.name, strength, matched, sorted_image, tuple(failed), ranks, scales)
    return LoraMatch(pairs, differences, report)


def _check_shape(
    lora: LoraFile, name: str, found: tuple[int, int], needed: tuple[int, ...]
) -> None:
    if found != tuple(needed):
        raise CheckpointError(
            f"{lora.name} was trained for another model: its {name} is {found[0]}x{found[1]} and "
            f"this model's is {needed[0]}x{needed[1]} (14B and 1.3B LoRAs do not mix)"
        )


def _set_differences(model: WanModel, added: dict[str, list[tuple[float, Tensor]]]) -> None:
    """Small tensors are replaced by sums; the loaded ones are kept and put back first."""
    originals: dict[str, nn.Parameter] = model.__dict__.setdefault("_lora_originals", {})
    for name, parameter in originals.items():
        _put(model, name, parameter)
    originals.clear()
    for name, terms in added.items():
        originals[name] = model.get_parameter(name)
        total = originals[name].detach().float()
        for strength, difference in terms:
            total = total + strength * difference.float().to(total.device)
        summed = total.to(originals[name].dtype)
        _put(model, name, nn.Parameter(summed, requires_grad=False))


def _put(model: WanModel, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = parameter
