"""What `inspect` says of a file: what it is, what it needs, what goes with it, whether it runs."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .checkpoint.detect import CheckpointInfo, detect
from .checkpoint.headers import gigabytes
from .checkpoint.registry import UNKNOWN
from .checkpoint.source import Checkpoint
from .datatypes import VideoSize
from .lora.identify import Origin, identify
from .lora.read import outline
from .memory.plan import activation_bytes, video_tokens
from .presets import PRESETS, Preset, note_for, preset_for
from .quant.schemes import PLAIN

BF16_BYTES = 2
# Schemes whose weights stay as they are in the file; others are turned into bfloat16 on a card.
CONVERTED = ("fp32", "fp16")
OWN_LOADERS = ("vae", "text encoder", "clip vision", "lora")

UMT5 = "a UMT5-XXL text encoder (umt5_xxl_fp16, umt5_xxl_fp8_e4m3fn_scaled)"
VAE_21 = "the Wan 2.1 VAE (wan_2.1_vae), for Wan 2.2 14B too"
VAE_22 = "the Wan 2.2 VAE (wan2.2_vae)"
CLIP = "the CLIP image encoder clip_vision_h"
DEMO = "the other files of the demo, in lightx2v_core/demo"


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes: `weights` as they are kept, `activations` counted for one forward at `size`,
    `converted` that must be in RAM because the file's dtype is not the one computed in."""

    weights: int
    activations: int = 0
    converted: int = 0
    size: VideoSize | None = None

    @property
    def vram(self) -> int:
        """With every block on the card."""
        return self.weights + self.activations

    def describe(self) -> str:
        weights = f"{gigabytes(self.weights)} of weights"
        if self.size is None:
            return weights
        clip = f"{self.size.width}x{self.size.height}, {self.size.frames} frames"
        ram = "the file stays mapped, so RAM only holds what is streamed"
        if self.converted:
            ram = f"{gigabytes(self.converted)} of RAM, since the file is not in bf16"
        return (
            f"{weights} and about {gigabytes(self.activations)} of activations at {clip}: "
            f"{gigabytes(self.vram)} of VRAM, or less with blocks streamed; {ram}"
        )


@dataclass(frozen=True, slots=True)
class Report:
    """A file's facts with what follows from them."""

    name: str
    info: CheckpointInfo
    preset: Preset | None
    needs: Needs
    goes_with: tuple[str, ...]
    problem: str | None  # why this version cannot use it
    files: int = 1

    def as_json(self) -> dict[str, object]:
        needs = {
            "weights_bytes": self.needs.weights,
            "activation_bytes": self.needs.activations,
            "ram_bytes": self.needs.converted,
        }
        return {
            **self.info.as_json(),
            "files": self.files,
            "runs": self.problem is None,
            "needs": needs,
            "goes_with": list(self.goes_with),
        }

    def lines(self) -> list[str]:
        info = self.info
        stored = (info.scheme, info.dialect and f"as {info.dialect} writes it")
        names = f"{info.layout} names" if info.layout != UNKNOWN else None
        files = f"{self.files} files" if self.files > 1 else None
        words = [*stored, names, files, f"{info.tensors} tensors", gigabytes(info.bytes)]
        lines = [
            f"{self.name}: {info.describe()}, {gigabytes(info.bytes)}",
            f"format: {', '.join(word for word in words if word)}",
            f"release: {_release(info)}",
        ]
        if info.lora:
            lines.append(f"holds: {_lora(info)}")
        if self.preset:
            lines.append(f"preset: {_preset(self.preset, info)}")
        elif info.kind == "lora" and info.preset:
            preset = PRESETS[info.preset]
            strength = f"strength {preset.lora_strength:g}"
            lines.append(f"preset: {_preset(preset, info)}; {strength}, on a base model")
        if info.kind in ("transformer", *OWN_LOADERS):
            lines.append(f"needs: {self.needs.describe()}")
        if self.goes_with:
            lines.append(f"goes with: {'; '.join(self.goes_with)}")
        lines.append(f"this version: {_verdict(info, self.problem)}")
        lines += [f"note: {note}" for note in info.notes]
        return lines + [f"warning: {warning}" for warning in info.warnings]


def make_report(checkpoint: Checkpoint) -> Report:
    """Everything `inspect` says, from names and headers alone."""
    info = detect(checkpoint)
    if info.kind == "lora":
        info = _as_applied(info, identify(outline(checkpoint)))
    runs = info.kind == "transformer" and info.refusal is None
    preset = preset_for(info) if runs else None
    problem = info.refusal
    if info.kind in OWN_LOADERS:
        problem = info.unusable
    return Report(
        checkpoint.name,
        info,
        preset,
        _needs(info, preset),
        tuple(goes_with(info, checkpoint.name)),
        problem,
        max(1, len(set(checkpoint.files.values()))),
    )


def _as_applied(info: CheckpointInfo, origin: Origin) -> CheckpointInfo:
    """A LoRA's facts as Apply LoRA goes by them: no expert where names and metadata disagree."""
    size = origin.size if origin.width else info.size
    return replace(info, expert=origin.expert, task=origin.task or info.task, size=size)


def goes_with(info: CheckpointInfo, name: str) -> list[str]:
    """What else one generation with this file takes; `name` shows what the other expert's is."""
    if info.release.startswith("demo"):
        return [DEMO, *_other_expert(info, name, "the LoRA of")]
    if info.kind == "transformer":
        return _transformer_goes_with(info, name)
    if info.kind == "lora" and not info.unusable:
        known = (word for word in (info.family, info.task, info.size) if word != UNKNOWN)
        model = " ".join(("a Wan model:", *known)) if info.task != UNKNOWN else "a Wan model"
        expert = f", its {info.expert}-noise expert" if info.expert else ""
        return [model + expert, *_other_expert(info, name, "the LoRA of")]
    if info.kind == "vae":
        is_22 = "2.2" in f"{info.family} {info.release}"
        return ["Wan 2.2 5B" if is_22 else "Wan 2.1 models and Wan 2.2 14B"]
    if info.kind == "text encoder" and not info.unusable:
        return ["every Wan model"] if info.size == "xxl" else ["the model it was trained with"]
    if info.kind == "clip vision" and not info.unusable:
        return ["Wan 2.1 I2V and FLF2V; Wan 2.2 needs none"]
    return []


def _transformer_goes_with(info: CheckpointInfo, name: str) -> list[str]:
    parts = [UMT5, VAE_22 if info.size == "5B" else VAE_21]
    if info.config and info.config.clip_tokens:
        parts.append(CLIP)
    return parts + _other_expert(info, name, "the other expert,")


def _other_expert(info: CheckpointInfo, name: str, what: str) -> list[str]:
    if info.expert is None:
        return []
    other = {"high": "low", "low": "high"}[info.expert]
    swapped = re.sub(info.expert, lambda m: _like(other, m.group()), name, flags=re.IGNORECASE)
    return [f"{what} {other} noise" + (f" ({swapped})" if swapped != name else "")]


def _like(word: str, example: str) -> str:
    return word.upper() if example.isupper() else word


def _needs(info: CheckpointInfo, preset: Preset | None) -> Needs:
    if preset is None or info.config is None:
        return Needs(info.bytes)
    converted = info.scheme in CONVERTED
    item = {"fp32": 4, "fp16": 2}.get(info.scheme, BF16_BYTES)
    weights = info.bytes * BF16_BYTES // item if converted else info.bytes
    is_quantised = info.scheme not in PLAIN
    tokens = video_tokens(preset.size)
    activations = activation_bytes(info.config, tokens, BF16_BYTES, quantised=is_quantised)
    return Needs(weights, activations, weights if converted else 0, preset.size)


def _release(info: CheckpointInfo) -> str:
    known = (info.repository and f"of {info.repository}", info.licence)
    return ", ".join((info.release, *(word for word in known if word)))


def _preset(preset: Preset, info: CheckpointInfo) -> str:
    assumed = note_for(info)
    size = f"{preset.size.width}x{preset.size.height}, {preset.size.frames} frames"
    cfg = "CFG off" if preset.is_distilled else f"CFG {preset.cfg:g}"
    if preset.cfg_low is not None:
        cfg += f" (low noise {preset.cfg_low:g})"
    text = f"{preset.name}: {preset.describe_steps()}; shift {preset.shift:g}; {cfg}; {size}"
    return f"{text} ({assumed})" if assumed else text


def _lora(info: CheckpointInfo) -> str:
    lora = info.lora
    assert lora is not None, "only called for a LoRA"
    ranks = f" of rank {', '.join(map(str, lora.ranks))}" if lora.ranks else ""
    scale = "scaled by the alpha in the file" if lora.has_alpha else "no alpha: scale 1"
    return f"{lora.pairs} pairs{ranks}, {lora.differences} differences; {scale}"


def _verdict(info: CheckpointInfo, problem: str | None) -> str:
    if problem:
        return f"does not use it: {problem}"
    uses = {
        "transformer": "runs it",
        "vae": "loads it with Load VAE",
        "text encoder": "loads it with Load Text Encoder",
        "clip vision": "uses it through CLIPVisionLoader",
        "lora": "applies it with Apply LoRA",
    }
    return uses[info.kind]
