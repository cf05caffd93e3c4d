"""The published files by name, and what a name adds to a header. Reads nothing but names.

A header decides; a published name refines it (release, preset, expert, and the family of a 14B
whose shapes 2.1 and 2.2 share). Where the two disagree the header counts and a warning says so. A
name that is not in the tables leaves the release "unknown".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .families import RUNS_AS, named_family

if TYPE_CHECKING:
    from .detect import CheckpointInfo

UNKNOWN = "unknown"

# Where a row was seen; its fourth column holds the letters.
SOURCES = {
    "L": "docs, configs and scripts of ModelTC/LightX2V at f8aee98b",
    "H": "the repository's page on Hugging Face",
    "W": "Wan-Video/Wan2.1 README and wan/configs, and their Wan 2.2 twins",
    "A": "the authors in ModelTC/LightX2V-Wan2.2-Lightning issues 3, 30 and 36",
    "C": "workflow templates and download scripts for ComfyUI",
    "K": "public workflows of kijai/ComfyUI-WanVideoWrapper",
    "U": "user issues deepbeepmeep/Wan2GP 260 and 264",
}
# By the start of a repository's name or of a release's, as the model cards say.
LICENCES = {
    "Wan-AI/": "Apache-2.0",
    "lightx2v/Wan": "Apache-2.0",
    "lightx2v/Light": "Apache-2.0",
    "umt5": "Apache-2.0",
    "clip-vit-h": "MIT",
}

FOUR, FOUR_720P, SHIFT_7 = "distill-4step", "distill-4step-720p", "distill-4step-shift7"
SELF, CAUSVID = "self-forcing-4step", "causvid-12step"
# of models that are not distilled
T13, T14, T22 = "base-t2v-1.3b", "base-t2v-14b", "base-t2v-a14b"
I480, I720, I22, FLF = "base-i2v-480p", "base-i2v-720p", "base-i2v-a14b", "base-flf2v"

MODELS_21, LORAS_21 = "lightx2v/Wan2.1-Distill-Models", "lightx2v/Wan2.1-Distill-Loras"
MODELS_22, LORAS_22 = "lightx2v/Wan2.2-Distill-Models", "lightx2v/Wan2.2-Distill-Loras"
LIGHTNING, MOE = "lightx2v/Wan2.2-Lightning", "lightx2v/Wan2.2-I2V-A14B-Moe-Distill-Lightx2v"
NVFP4, SPARSE = "lightx2v/Wan-NVFP4", "lightx2v/Wan2.2-NVFP4-Sparse"
OLD = "lightx2v/Wan2.1-*-StepDistill-CfgDistill"
COMFY_21 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged"
COMFY_22 = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
KIJAI, KIJAI_FP8 = "Kijai/WanVideo_comfy", "Kijai/WanVideo_comfy_fp8_scaled"
PARTS = "lightx2v/Autoencoders"

EXPERT = "(high|low)_noise"
FP8 = "fp8_e[45]m[32]"

Row = tuple[str, str, str, str, str, str]
# (pattern in "folder/name" in lower case, release, repository, sources, preset or "", facts that
# the header may contradict); the first row that fits wins.
TRANSFORMERS: tuple[Row, ...] = (
    (r"wan2\.1_i2v_480p_nvfp4_lightx2v_4step", "distill", NVFP4, "L", FOUR, "wan2.1 i2v 14B"),
    (r"wan2\.1_t2v_1_3b_nvfp4_lightx2v_4step", "distill", NVFP4, "L", FOUR, "wan2.1 t2v 1.3B"),
    (r"wan2\.1_i2v_480p_.*lightx2v_4step", "distill", MODELS_21, "LH", FOUR, "wan2.1 i2v 14B"),
    (r"wan2\.1_i2v_720p_.*lightx2v_4step", "distill", MODELS_21, "LH", FOUR_720P, "wan2.1 i2v 14B"),
    (r"wan2\.1_t2v_14b_.*lightx2v_4step", "distill", MODELS_21, "LH", FOUR, "wan2.1 t2v 14B"),
    (rf"wan2\.2_i2v_a14b_{EXPERT}_.*260412", "distill-260412", MODELS_22, "LH", FOUR_720P, "i2v"),
    (rf"wan2\.2_i2v_a14b_{EXPERT}_.*1030", "distill-1030", MODELS_22, "LH", FOUR, "wan2.2 i2v 14B"),
    (rf"wan2\.2_i2v_a14b_{EXPERT}_.*4step", "distill", MODELS_22, "LH", FOUR, "wan2.2 i2v 14B"),
    (rf"wan2\.2_t2v_a14b_{EXPERT}_.*4step", "distill", MODELS_22, "H", FOUR, "wan2.2 t2v 14B"),
    (r"wan2\.2-i2v-a14b-moe-distill", "moe-distill", MOE, "HA", FOUR, "wan2.2 i2v 14B"),
    (r"i2v.*nvfp4.*sparse|nvfp4.*sparse.*i2v", "nvfp4-sparse", SPARSE, "LH", SHIFT_7, "i2v 14B"),
    (r"nvfp4.*sparse", "nvfp4-sparse", SPARSE, "LH", FOUR, "wan2.2 14B"),
    (r"4steps-250928-dyno", "lightning-250928-dyno", LIGHTNING, "HA", FOUR, "wan2.2 t2v 14B"),
    (r"t2v-14b-stepdistill-cfgdistill", "step-cfg-distill", OLD, "L", FOUR, "wan2.1 t2v 14B"),
    (r"i2v-14b-480p-stepdistill", "step-cfg-distill", OLD, "L", FOUR, "wan2.1 i2v 14B"),
    (r"i2v-14b-720p-stepdistill", "step-cfg-distill", OLD, "L", FOUR_720P, "wan2.1 i2v 14B"),
    (r"distill_model\.(safetensors|pt)$", "step-cfg-distill", OLD, "L", FOUR, "wan2.1 14B"),
    (r"/distill_(models|fp8|int8)$", "step-cfg-distill", OLD, "L", FOUR, "wan2.1 14B"),
    (r"self[_-]forcing", "self-forcing", "lightx2v/Self-Forcing-*", "LH", SELF, "wan2.1 t2v"),
    (r"causal_model\.|causvid", "causvid", "lightx2v/Wan2.1-T2V-14B-CausVid", "L", "", "t2v"),
    # not distilled
    (r"wan2\.1-t2v-1\.3b", "base", "Wan-AI/Wan2.1-T2V-1.3B", "W", T13, "wan2.1 t2v 1.3B"),
    (r"wan2\.1-t2v-14b", "base", "Wan-AI/Wan2.1-T2V-14B", "W", T14, "wan2.1 t2v 14B"),
    (r"wan2\.1-i2v-14b-480p", "base", "Wan-AI/Wan2.1-I2V-14B-480P", "W", I480, "wan2.1 i2v 14B"),
    (r"wan2\.1-i2v-14b-720p", "base", "Wan-AI/Wan2.1-I2V-14B-720P", "W", I720, "wan2.1 i2v 14B"),
    (r"wan2\.1-flf2v-14b", "base", "Wan-AI/Wan2.1-FLF2V-14B-720P", "W", FLF, "wan2.1 flf2v 14B"),
    (r"wan2\.2-t2v-a14b/(high|low)", "base", "Wan-AI/Wan2.2-T2V-A14B", "W", T22, "wan2.2 t2v 14B"),
    (r"wan2\.2-i2v-a14b/(high|low)", "base", "Wan-AI/Wan2.2-I2V-A14B", "W", I22, "wan2.2 i2v 14B"),
    (r"wan2\.2[-_]ti2v[-_]5b", "base", "Wan-AI/Wan2.2-TI2V-5B", "WC", "", "wan2.2 5B"),
    (r"wan2\.1_t2v_1\.3b_", "base", COMFY_21, "C", T13, "wan2.1 t2v 1.3B"),
    (r"wan2\.1_t2v_14b_", "base", COMFY_21, "C", T14, "wan2.1 t2v 14B"),
    (r"wan2\.1_i2v_480p_14b_", "base", COMFY_21, "C", I480, "wan2.1 i2v 14B"),
    (r"wan2\.1_i2v_720p_14b_", "base", COMFY_21, "C", I720, "wan2.1 i2v 14B"),
    (r"wan2\.1_flf2v_720p_14b_", "base", COMFY_21, "C", FLF, "wan2.1 flf2v 14B"),
    (rf"wan2\.2_t2v_{EXPERT}_14b_", "base", COMFY_22, "C", T22, "wan2.2 t2v 14B"),
    (rf"wan2\.2_i2v_{EXPERT}_14b_", "base", COMFY_22, "C", I22, "wan2.2 i2v 14B"),
    (rf"wan2_1-t2v-14b_{FP8}", "base", KIJAI_FP8, "K", T14, "wan2.1 t2v 14B"),
    (rf"wan2_1-i2v-14b-480p_{FP8}", "base", KIJAI_FP8, "K", I480, "wan2.1 i2v 14B"),
    (rf"wan2_1-i2v-14b-720p_{FP8}", "base", KIJAI_FP8, "K", I720, "wan2.1 i2v 14B"),
    (rf"wan2_2-t2v-a14b-(high|low)_{FP8}", "base", KIJAI_FP8, "K", T22, "wan2.2 t2v 14B"),
    (rf"wan2_2-i2v-a14b-(high|low)_{FP8}", "base", KIJAI_FP8, "K", I22, "wan2.2 i2v 14B"),
)
LORAS: tuple[Row, ...] = (
    (r"wan2\.1_i2v_lora_rank\d+_lightx2v_4step", "distill", LORAS_21, "LH", FOUR, "wan2.1 i2v 14B"),
    (r"wan2\.1_t2v_14b_lora_rank\d+_lightx2v", "distill", LORAS_21, "LH", FOUR, "wan2.1 t2v 14B"),
    (rf"wan2\.2_i2v_a14b_{EXPERT}_lora.*_1022", "distill-1022", LORAS_22, "LH", FOUR, "i2v 14B"),
    (rf"wan2\.2_t2v_a14b_{EXPERT}_lora.*_1217", "distill-1217", LORAS_22, "LH", FOUR, "t2v 14B"),
    (r"wan.?2.?2.*i2v.*1030", "distill-1030", KIJAI, "H", FOUR, "i2v 14B"),
    (r"wan.?2.?2.*i2v.*260412", "distill-260412", KIJAI, "H", FOUR_720P, "i2v 14B"),
    (rf"wan2\.2_i2v_a14b_{EXPERT}_lora", "distill", LORAS_22, "L", FOUR, "i2v 14B"),
    (rf"wan2\.2_t2v_a14b_{EXPERT}_lora", "distill", LORAS_22, "L", FOUR, "t2v 14B"),
    (r"seko-v2", "lightning-seko-v2.0", LIGHTNING, "HA", FOUR, "wan2.2 t2v 14B"),
    (r"seko-v1\.1", "lightning-seko-v1.1", LIGHTNING, "HA", FOUR, "wan2.2 t2v 14B"),
    (r"i2v-a14b-4steps-lora.*seko-v1", "lightning-seko-v1", LIGHTNING, "HA", FOUR, "i2v 14B"),
    (r"seko-v1", "lightning-seko-v1", LIGHTNING, "HA", FOUR, "wan2.2 14B"),
    (r"250928", "lightning-250928", LIGHTNING, "HA", FOUR, "wan2.2 t2v 14B"),
    (r"moe-distill", "moe-distill", MOE, "HA", FOUR, "wan2.2 i2v 14B"),
    (r"wan2\.2_t2v_lightx2v_4steps_lora_v1\.1_", "lightx2v-v1.1", COMFY_22, "C", FOUR, "t2v 14B"),
    (r"wan2\.2_[ti]2v_lightx2v_4steps_lora_v1_", "lightx2v-v1", COMFY_22, "C", FOUR, "14B"),
    (r"wan21_[ti]2v_14b_lightx2v_cfg_step_distill", "step-cfg-distill", OLD, "L", FOUR, "14B"),
    (r"lightx2v_t2v_14b_cfg_step_distill_v2", "step-cfg-distill-v2", KIJAI, "K", FOUR, "t2v 14B"),
    (r"lightx2v_i2v_14b_480p_cfg_step", "step-cfg-distill", KIJAI, "LK", FOUR, "i2v 14B"),
    (r"lightx2v_i2v_14b_720p_cfg_step", "step-cfg-distill", KIJAI, "LK", FOUR_720P, "i2v 14B"),
    (r"wan21_causvid_14b_t2v_lora", "causvid", KIJAI, "KU", CAUSVID, "wan2.1 t2v 14B"),
)
OTHERS: tuple[tuple[str, Row], ...] = (
    ("vae", (r"lightvaew2_1\.", "lightvaew2_1", PARTS, "LH", "", "")),
    ("vae", (r"lighttaew2_1\.", "lighttaew2_1", PARTS, "LH", "", "")),
    ("vae", (r"lighttaew2_2\.", "lighttaew2_2", PARTS, "LH", "", "")),
    ("vae", (r"(^|/)taew2_1\.", "taew2_1", PARTS, "LH", "", "")),
    ("vae", (r"(^|/)taew2_2\.", "taew2_2", PARTS, "LH", "", "")),
    ("vae", (r"wan2\.1_vae\.", "wan_2.1_vae", PARTS, "LH", "", "wan2.1")),
    ("vae", (r"wan_2\.1_vae\.", "wan_2.1_vae", COMFY_21, "C", "", "wan2.1")),
    ("vae", (r"wan2_1_vae_(bf16|fp32)", "wan_2.1_vae", KIJAI, "K", "", "wan2.1")),
    ("vae", (r"wan2\.2_vae\.", "wan2.2_vae", PARTS, "LH", "", "wan2.2")),
    ("text encoder", (r"models_t5_umt5-xxl-enc", "umt5-xxl", "lightx2v/Encoders", "LW", "", "")),
    ("text encoder", (r"umt5_xxl_fp", "umt5-xxl", COMFY_21, "C", "", "")),
    ("text encoder", (r"umt5-xxl-enc-", "umt5-xxl", KIJAI, "K", "", "")),
    ("clip vision", (r"models_clip_open-clip", "clip-vit-h", "lightx2v/Encoders", "LW", "", "")),
    ("clip vision", (r"clip_vision_h\.", "clip-vit-h", COMFY_21, "C", "", "")),
)
# Releases that the demo's own files name in their metadata.
DEMO_PRESETS = {"demo": "demo-4step", "demo-base": "demo-base"}
# What is to be known of a release beside its preset.
NEEDS_LORA = "not distilled: four steps without CFG need a distillation LoRA beside it"
NOTES = {
    "base": NEEDS_LORA,
    "demo-base": NEEDS_LORA,
    "self-forcing": RUNS_AS["Self-Forcing"],
    "causvid": "made for chunks of frames in causal order; its users run 12 steps at shift 7 with "
    "LoRA strength 0.3",
    "nvfp4-sparse": RUNS_AS["sparse-attention"],
}

# (pattern, what a name says); more than one answer is no answer.
WORD = r"(?<![a-z0-9]){}(?![a-z0-9])"
FAMILY_WORDS = (
    (r"wan[ _-]?2[._]?1(?!\d)", "wan2.1"),
    (r"wan[ _-]?2[._]?2(?!\d)|a14b|(?:high|low)[ _-]?noise", "wan2.2"),
)
TASK_WORDS = tuple((WORD.format(task), task) for task in ("t2v", "i2v", "flf2v"))
SIZE_WORDS = (
    (WORD.format(r"a?14b"), "14B"),
    (WORD.format(r"1[._]3b"), "1.3B"),
    (WORD.format(r"5b"), "5B"),
)
SCHEME_WORDS = (
    (r"(?<![a-z0-9])(?:fp8|e4m3|e5m2)", "fp8"),
    *((WORD.format(word), word) for word in ("bf16", "fp16", "fp32", "int8", "nvfp4", "mxfp8")),
    (r"(?<![a-z0-9])i?q\d_[knx\d]", "gguf"),
)
NOISE = re.compile(r"(high|low)[ _-]?noise")
TWO_EXPERTS = re.compile(r"wan[ _-]?2[._]?2|a14b|lightning|4steps-250928")
LONE_EXPERT = re.compile(
    r"(?<![a-z])(high|low)(?=$|[._ -](?:lightx2v|lora|model|fp\d|bf16|rank|v?\d|safetensors|gguf))"
)
EXPERT_WORD = re.compile(r"(?<![a-z])(high|low)(?![a-z])")


@dataclass(frozen=True, slots=True)
class Published:
    """One known file. `preset` is a name in presets.PRESETS, None where no schedule is known."""

    release: str
    repository: str
    source: str
    preset: str | None
    facts: Mapping[str, str]  # of family, task and size


def find_published(label: str, kind: str) -> Published | None:
    """The row for `label` ("folder/name" in lower case), or None for a name nobody published."""
    tables = {"transformer": TRANSFORMERS, "lora": LORAS}
    rows = tables.get(kind) or [row for of, row in OTHERS if of == kind]
    for pattern, release, repository, letters, preset, facts in rows:
        if re.search(pattern, label):
            source = "; ".join(SOURCES[letter] for letter in letters)
            return Published(release, repository, source, preset or None, _facts(facts))
    return None


def _facts(text: str) -> dict[str, str]:
    keys = {"wan2.1": "family", "wan2.2": "family", "t2v": "task", "i2v": "task", "flf2v": "task"}
    return {keys.get(word, "size"): word for word in text.split()}


def read_name(label: str) -> dict[str, str]:
    """What a file's own name says of family, task, size, scheme and expert; silence is no key."""
    tables = {
        "family": FAMILY_WORDS,
        "task": TASK_WORDS,
        "size": SIZE_WORDS,
        "scheme": SCHEME_WORDS,
    }
    said = {key: _only(w for p, w in words if re.search(p, label)) for key, words in tables.items()}
    said["expert"] = _expert(label)
    return {key: word for key, word in said.items() if word is not None}


def _only(words: Iterable[str]) -> str | None:
    found = set(words)
    return found.pop() if len(found) == 1 else None


def _expert(label: str) -> str | None:
    if len(set(EXPERT_WORD.findall(label))) > 1:
        return None
    words = NOISE.findall(label)
    if not words and TWO_EXPERTS.search(label):
        words = LONE_EXPERT.findall(label)
    return _only(words)


def refine(info: CheckpointInfo, label: str, metadata: Mapping[str, str]) -> CheckpointInfo:
    """`info` of a header with what its name and its own metadata (`release`, `family`, `expert`)
    add. Nothing the header says is changed; each contradiction becomes one of `warnings`."""
    label = label.lower()
    name = label.rpartition("/")[2]
    row, said = find_published(label, info.kind), read_name(label)
    warnings = _contradictions(info, read_name(name), name)
    if row is not None and (wrong := _facts_denied(info, row)):
        warnings.append(
            f"its name is that of {row.repository}, whose file is {', '.join(wrong.values())}: it "
            f"holds {', '.join(getattr(info, key) for key in wrong)}, so the release is unknown"
        )
        row = None
    known = {**said, **(row.facts if row else {}), **metadata}
    family = info.family if info.family != UNKNOWN else known.get("family", UNKNOWN)
    release = metadata.get("release") or (row.release if row else info.release)
    is_lora = info.kind == "lora"
    filled = {
        key: known.get(key, UNKNOWN) if is_lora and value == UNKNOWN else value
        for key, value in (("task", info.task), ("size", info.size))
    }
    has_experts = is_lora or (info.kind == "transformer" and family == "wan2.2")
    return replace(
        info,
        family=family,
        **filled,
        expert=known.get("expert") if has_experts else None,
        release=release,
        preset=_preset(info, row, release),
        repository=row.repository if row else None,
        licence=_licence(row) if row else None,
        source=row.source if row else None,
        notes=tuple(note for note in (NOTES.get(release) or _named_note(info, name),) if note),
        warnings=tuple(warnings),
    )


def _preset(info: CheckpointInfo, row: Published | None, release: str) -> str | None:
    if release in DEMO_PRESETS and info.kind in ("transformer", "lora"):
        return DEMO_PRESETS[release]
    if row is None or row.preset is None:
        return None
    is_distilled = release != "base"
    return "flf2v-4step" if info.task == "flf2v" and is_distilled else row.preset


def _licence(row: Published) -> str | None:
    starts = (row.repository, row.release)
    return next(
        (text for start, text in LICENCES.items() if any(s.startswith(start) for s in starts)), None
    )


def _facts_denied(info: CheckpointInfo, row: Published) -> dict[str, str]:
    return {
        key: word for key, word in row.facts.items() if getattr(info, key) not in (UNKNOWN, word)
    }


def _named_note(info: CheckpointInfo, name: str) -> str | None:
    """For families that only a name tells from plain T2V and I2V."""
    family = named_family(name) if info.kind == "transformer" and info.refusal is None else None
    if family is None:
        return None
    if family in RUNS_AS:
        return f"its name says {family}: {RUNS_AS[family]}"
    return f"its name says {family}, and its header shows a plain model: the header counts"


def _contradictions(info: CheckpointInfo, said: Mapping[str, str], name: str) -> list[str]:
    keys = ("family", "task", "size") if info.kind in ("transformer", "lora") else ()
    found = {key: getattr(info, key) for key in keys}
    found["scheme"] = info.scheme.partition("-")[0]
    warnings = [
        f"the name says {said[key]}, the header says {getattr(info, key)}: the header counts"
        for key, value in found.items()
        if key in said and value not in (UNKNOWN, said[key])
    ]
    if info.scheme == "fp8-e5m2" and "e4m3" in name:
        warnings.append("the name says e4m3, the header says fp8-e5m2: the header counts")
    if info.scheme.startswith("fp8") and info.scheme != "fp8-e5m2" and "e5m2" in name:
        warnings.append(f"the name says e5m2, the header says {info.scheme}: the header counts")
    return warnings
