"""How LoRA files call their tensors: the roles, the prefixes, and the way back to a model's names.

Spellings read: LightX2V and ComfyUI (``diffusion_model.``), kohya and musubi (``lora_unet_`` with
underscores), Wan-Fun (``lora_unet__``), LyCORIS and SimpleTuner (``lycoris_``), PEFT, diffusers and
finetrainers (``transformer.``), DiffSynth (``pipe.dit.``), and bare official or diffusers names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..checkpoint.layouts import to_diffusers, unwrapped

# Taken off the front until none fits; files of converted adapters carry two of them.
PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "unet.",
    "model.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
_PAIR = re.compile(
    r"(?P<stem>.+?)(?:"
    # PEFT; what stands between A and weight is the adapter's name.
    r"\.lora_(?P<letter>[AB])(?:\.(?!weight$|bias$)[^.]+)?(?P<leaf>\.weight|\.bias)?"
    r"|(?:\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)(?P<side>up|down)(?:\.weight)?"
    r")"
)
# (ending, last part of the tensor it is added to)
_DIFFERENCES = (
    (".diff_b", "bias"),
    (".diff_m", "modulation"),
    (".diff", "weight"),
    (".w_norm", "weight"),
    (".b_norm", "bias"),
)
_ALPHA = ".alpha"

# (a part of the tensor's name, what such an adapter is called); applied by nobody here.
OTHER_ADAPTERS = (
    (re.compile(r"\.lokr_"), "LoKr"),
    (re.compile(r"\.hada_"), "LoHa"),
    (re.compile(r"\.dora_scale$|\.lora_magnitude_vector"), "DoRA"),
    (re.compile(r"\.boft_"), "BOFT"),
    (re.compile(r"\.oft_"), "OFT"),
    (re.compile(r"\.lora_mid\b"), "LoCon with a middle matrix"),
    (re.compile(r"\.(a1|a2|b1|b2)\.weight$"), "GLoRA"),
    (re.compile(r"\.on_input$|\.ia3_l"), "IA3"),
    (re.compile(r"\.vera_lambda"), "VeRA"),
    (re.compile(r"\.(set_weight|reshape_weight)$"), "weight replacement"),
)

# (the module a name starts with, the family it belongs to); the first match wins.
OTHER_FAMILIES = (
    (re.compile(r"double_blocks\.\d+\.(img|txt)_attn\."), "FLUX"),
    (re.compile(r"double_blocks\.\d+\.(img|txt)_attn_"), "HunyuanVideo"),
    (
        re.compile(r"(double|single)_blocks[._]\d|single_transformer_blocks"),
        "FLUX or HunyuanVideo",
    ),
    (re.compile(r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)"), "Qwen-Image"),
    (re.compile(r"transformer_blocks[._]\d+[._]attn[12]"), "LTX-Video or CogVideoX"),
    (re.compile(r"joint_blocks[._]|transformer_blocks[._]\d+[._]attn[._]"), "SD3 or FLUX"),
    (re.compile(r"(down|up|mid|input|output|middle)_blocks?[._]"), "Stable Diffusion or SDXL"),
    (re.compile(r"layers[._]\d+[._](attention|feed_forward|adaLN)"), "Z-Image or Lumina"),
    (re.compile(r"lora_te\d?_|text_encoders?\d?[._]|te\d[._]|text_model"), "a text encoder"),
    (re.compile(r"vace_"), "Wan VACE"),
    (re.compile(r"face_adapter|pose_patch_embedding|motion_encoder"), "Wan Animate"),
    (re.compile(r"casual_audio_encoder|audio_injector|cond_encoder"), "Wan S2V"),
    (re.compile(r"audio_proj"), "HuMo"),
    (re.compile(r"control_adapter|ref_conv"), "Wan Fun"),
    (re.compile(r"transformer_2\."), "the second expert in diffusers' form"),
)


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor's name taken apart. `role` is up, down, up_bias, alpha or difference.

    `leaf` is the last part of the model's tensor that a difference is added to.
    """

    stem: str
    role: str
    leaf: str = "weight"


def parse(name: str) -> Part | None:
    """None for a tensor that is no part of a LoRA."""
    if found := _PAIR.fullmatch(name):
        stem = bare(found["stem"])
        if found["leaf"] == ".bias":
            return Part(stem, "up_bias", "bias") if found["letter"] == "B" else None
        is_up = found["letter"] == "B" or found["side"] == "up"
        return Part(stem, "up" if is_up else "down")
    if name.endswith(_ALPHA):
        return Part(bare(name.removesuffix(_ALPHA)), "alpha")
    for ending, leaf in _DIFFERENCES:
        if name.endswith(ending):
            return Part(bare(name.removesuffix(ending)), "difference", leaf)
    return None


def bare(stem: str) -> str:
    """`stem` without wrappers and prefixes."""
    stem = unwrapped(stem)
    while prefix := next((p for p in PREFIXES if stem.startswith(p)), ""):
        stem = stem.removeprefix(prefix)
    return stem


def other_family(stems: Iterable[str]) -> str | None:
    """The family most of whose modules are named, where it is not a plain Wan."""
    counts: dict[str, int] = {}
    for stem in stems:
        family = next((name for mark, name in OTHER_FAMILIES if mark.match(stem)), None)
        if family is not None:
            counts[family] = counts.get(family, 0) + 1
    return max(counts, key=lambda family: counts[family]) if counts else None


def flat(name: str) -> str:
    """kohya's spelling: dots have become underscores."""
    return name.replace(".", "_")


class ModelNames:
    """The tensor names of one model under every spelling; ambiguous flat ones lead nowhere."""

    def __init__(self, tensors: Iterable[str]) -> None:
        self._official = set(tensors)
        by_flat: dict[str, set[str]] = {}
        for name in self._official:
            for spelled in {name, _diffusers(name)}:
                by_flat.setdefault(flat(spelled), set()).add(name)
        self._by_flat = {key: min(names) for key, names in by_flat.items() if len(names) == 1}

    def find(self, stem: str, leaf: str) -> str | None:
        """The model's tensor for `stem`.`leaf`, or for `stem` where that is a tensor itself."""
        for name in (f"{stem}.{leaf}", stem):
            if name in self._official:
                return name
        return self._by_flat.get(flat(f"{stem}.{leaf}")) or self._by_flat.get(flat(stem))


def _diffusers(name: str) -> str:
    try:
        return to_diffusers(name)
    except KeyError:
        return name
