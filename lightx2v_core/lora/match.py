"""Finds the place of every part of a LoRA in one model, and says in one line what fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import CheckpointError, preview
from .identify import IMAGE_LAYERS, TASKS, Origin, identify, model_size, task_of
from .names import ModelNames, other_family
from .read import LoraFile, Pair
from .steps import Strengths, describe_strengths

FEW = 0.5  # of a LoRA's parts, below which it may be for another model

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What became of one LoRA. Counts are of pairs and differences, not of tensors."""

    name: str
    strengths: Strengths
    matched: int
    harmless: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()
    modulations: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return self.matched + len(self.harmless) + len(self.failed)

    def describe(self) -> str:
        """One line; names what did not match and whether that matters."""
        text = f"{self.name}: matched {self.matched}/{self.total}, rank {_joined(self.ranks)}"
        if self.alphas:
            text += f", alpha {_joined(self.alphas)}"
        strengths = describe_strengths(self.strengths)
        text += f", effective strength {strengths} x {_joined(self.scales or (1,))}"
        if self.harmless:
            text += (
                f"; ignored {len(self.harmless)} image-embedding layers this model does not have: "
                "harmless"
            )
        if self.failed:
            text += f"; NOT applied: {len(self.failed)} ({preview(self.failed)})"
        return text


def _joined(numbers: tuple[float, ...]) -> str:
    return "/".join(f"{number:g}" for number in numbers) or "none"


@dataclass(frozen=True, slots=True, eq=False)
class LoraMatch:
    """A LoRA with the names of one model: pairs by module, differences by tensor, all scales but
    the strength in them."""

    pairs: dict[str, Pair]
    differences: dict[str, Tensor]
    report: LoraReport
    order: tuple[object, ...] = ()  # sorts LoRAs alike, whichever way round they were given


def match_lora(
    lora: LoraFile, shapes: Shapes, strengths: Strengths = 1.0, expert: str | None = None
) -> LoraMatch:
    """Find the place of every part of `lora` in a model with tensors of `shapes`.

    `expert` is high or low where the model is one of two. Raises CheckpointError when nothing
    matches, a layer is named twice, or a pair has the shape of another model.
    """
    places = _Places(lora, shapes)
    for stem, pair in lora.pairs.items():
        places.put_pair(stem, pair)
    for (stem, leaf), difference in lora.differences.items():
        places.put_difference(stem, leaf, difference)
    has_clip = any(name.startswith("img_emb.") for name in shapes)
    missing = [*places.unmatched, *lora.unknown]
    image = {n for n in missing if IMAGE_LAYERS.search(n) and not has_clip}
    failed = tuple(sorted(set(missing) - image))
    matched = len(places.pairs) + len(places.differences)
    origin = identify(lora)
    if not matched:
        raise CheckpointError(_no_match(lora, origin, shapes, failed or tuple(image)))
    total = matched + len(image) + len(failed)
    report = LoraReport(
        name=lora.name,
        strengths=strengths,
        matched=matched,
        harmless=tuple(sorted(image)),
        failed=failed,
        ranks=tuple(sorted({pair.rank for pair in lora.pairs.values()})),
        alphas=tuple(sorted({p.alpha for p in lora.pairs.values() if p.alpha is not None})),
        scales=tuple(sorted({round(pair.scale, 6) for pair in lora.pairs.values()})),
        modulations=sum(name.endswith("modulation") for name in places.differences),
        warnings=_warnings(lora, (matched, total), origin, shapes, expert),
    )
    listed = (strengths,) if isinstance(strengths, (int, float)) else tuple(strengths)
    return LoraMatch(places.pairs, places.differences, report, (lora.name, str(lora.path), listed))


@dataclass(slots=True)
class _Places:
    lora: LoraFile
    shapes: Shapes
    pairs: dict[str, Pair] = field(default_factory=dict)
    differences: dict[str, Tensor] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    names: ModelNames = field(init=False)
    taken: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = ModelNames(self.shapes)

    def put_pair(self, stem: str, pair: Pair) -> None:
        target = self.names.find(stem, "weight")
        shape = self.shapes.get(target or "", ())
        if target is None or len(shape) < 2:
            self.unmatched.append(stem)
        elif len(shape) > 2:  # a convolution: small, and so a difference of its weight
            difference = pair.scale * (pair.up_MR.float() @ pair.down_RK.float())
            if pair.shape == shape:
                self._take(target, stem, "pair")
                self._add(target, difference.reshape(shape))
            else:
                self.unmatched.append(stem)
        else:
            self._check_shape(target, pair, shape)
            self._take(target, stem, "pair")
            self.pairs[target.removesuffix(".weight")] = pair

    def put_difference(self, stem: str, leaf: str, difference: Tensor) -> None:
        target = self.names.find(stem, leaf)
        if target is None or self.shapes[target] != tuple(difference.shape):
            self.unmatched.append(f"{stem}.{leaf}")
            return
        self._take(target, stem, "difference")
        self._add(target, difference)

    def _add(self, target: str, difference: Tensor) -> None:
        """A convolution may have a pair and a difference: both count."""
        if target in self.differences:
            difference = self.differences[target].float() + difference.float()
        self.differences[target] = difference

    def _take(self, target: str, stem: str, kind: str) -> None:
        """Two spellings of one layer in one file would be applied twice, or overwrite each other"""
        other = self.taken.setdefault(f"{kind} {target}", stem)
        if other != stem:
            raise CheckpointError(
                f"{self.lora.name} names {target} twice ({other} and {stem}); it holds two "
                "adapters: save them as two files"
            )

    def _check_shape(self, target: str, pair: Pair, needed: tuple[int, ...]) -> None:
        found = (pair.up_MR.shape[0], pair.down_RK.shape[1])
        if found != needed:
            name, width = target.removesuffix(".weight"), identify(self.lora).width
            ours = self.shapes.get("patch_embedding.weight", (0,))[0]
            sizes = "(14B and 1.3B LoRAs do not mix)"
            if width and width != ours:
                sizes = (
                    f"(the LoRA is for the {model_size(width)} model, this is {model_size(ours)})"
                )
            raise CheckpointError(
                f"{self.lora.name} was trained for another model: its {name} is "
                f"{found[0]}x{found[1]} and this model's is {needed[0]}x{needed[1]} {sizes}"
            )


def _no_match(lora: LoraFile, origin: Origin, shapes: Shapes, names: tuple[str, ...]) -> str:
    family = other_family(lora.stems)
    ours = shapes.get("patch_embedding.weight", (0,))[0]
    if family is not None:
        why = f"it was made for {family}; use a LoRA for Wan 2.1 or 2.2"
    elif origin.width and origin.width != ours:
        why = f"it was made for the {origin.size} model, and this is {model_size(ours)}"
    else:
        why = "it was trained for another model, or its naming is not known here"
    return f"no layer of {lora.name} matches this model ({preview(names)}); {why}"


def _warnings(
    lora: LoraFile, fitted: tuple[int, int], origin: Origin, shapes: Shapes, expert: str | None
) -> tuple[str, ...]:
    lines, (matched, total) = [], fitted
    if matched < FEW * total:
        family = other_family(lora.stems)
        made = f"it was made for {family}" if family else "for another model?"
        lines.append(f"{lora.name}: only {matched} of {total} parts fit: {made}")
    if expert and origin.expert and origin.expert != expert:
        lines.append(
            f"{lora.name} is for the {origin.expert}-noise expert and this is the {expert}-noise "
            "one: exchange the two LoRAs?"
        )
    task = task_of(shapes)
    if task and origin.task and origin.task != task:
        lines.append(
            f"{lora.name} is {TASKS[origin.task]} LoRA on {TASKS[task]} model: what fits is "
            "applied, the effect may be weaker than it should be"
        )
    return tuple(lines)
