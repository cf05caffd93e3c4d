"""What a text encoder, a CLIP image encoder, or a LoRA is, from names and shapes alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ..quant.ggml import BLOCK_TYPES
from .headers import TensorHeader
from .layouts import from_diffusers
from .stored import PLAIN_SCHEMES, scheme_of

WIDTHS = {1536: "1.3B", 3072: "5B", 5120: "14B"}

UMT5_XXL = (4096, 24)  # width, blocks
VIT_H = (1280, 32)
HEAD_DIM = 80  # of ViT-H; the other published CLIPs have 64, 88 or 104
WAN_TEXT = "Wan needs umt5_xxl"

# (layout, pattern of a bias table of relative positions, stem of the first block's query)
TEXT_LAYOUTS = (
    ("official", r"blocks\.(\d+)\.pos_embedding\.embedding\.weight", "blocks.0.attn.q"),
    (
        "huggingface",
        r"(?:encoder\.)?block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
        "encoder.block.0.layer.0.SelfAttention.q",
    ),
    ("llama.cpp", r"enc\.blk\.(\d+)\.attn_rel_b\.weight", "enc.blk.0.attn_q"),
)
# (layout, prefix of a layer, the patch embedding)
CLIP_LAYOUTS = (
    ("official", r"visual\.transformer\.(\d+)\.", "visual.patch_embedding.weight"),
    (
        "huggingface",
        r"vision_model\.encoder\.layers\.(\d+)\.",
        "vision_model.embeddings.patch_embedding.weight",
    ),
)

LORA_SIDE = re.compile(
    r"\.lora_(?P<a>up|down|A|B)(\.default)?(\.weight)?$"
    r"|[._]lora(_linear_layer)?\.(?P<b>up|down)\.weight$"
)
LORA_DIFFERENCE = re.compile(r"\.diff(_[bm])?$")
LORA_PREFIXES = (
    ("kohya", "lora_unet_"),
    ("peft", "base_model.model."),
    ("comfy", "model.diffusion_model."),
    ("comfy", "diffusion_model."),
    ("diffusers", "transformer."),
    ("kijai", "pipe.dit."),
)
OTHER_ADAPTERS = (
    ("lokr_", "LoKr"),
    ("hada_", "LoHa"),
    ("dora_scale", "DoRA"),
    ("oft_", "OFT"),
    ("lora_mid", "LoCon with a middle matrix"),
    ("self_attn.q_loras", "Stand-In"),
    ("dwpose_embedding", "UniAnimate"),
)
WAN_LAYER = re.compile(r"blocks[._]\d+[._](self_attn|cross_attn|attn[12]|ffn)[._]")
QUERY = re.compile(r"blocks[._]\d+[._](self_attn[._]|attn1[._]to_)q$")
IMAGE_LAYER = re.compile(r"img_emb|k_img|v_img|image_embedder|add[._][kv][._]proj|norm_added_k")
TASKS = {16: "t2v", 36: "i2v"}  # by input channels


@dataclass(frozen=True, slots=True)
class LoraFacts:
    """What a LoRA file holds. `ranks` are those of its pairs, `has_alpha` whether they are scaled
    by a number in the file."""

    ranks: tuple[int, ...]
    pairs: int
    differences: int
    has_alpha: bool


@dataclass(frozen=True, slots=True)
class PartFacts:
    """None where the header does not tell. `unusable` says why Wan cannot use the file."""

    family: str | None = None
    task: str | None = None
    size: str | None = None
    layout: str | None = None
    unusable: str | None = None
    lora: LoraFacts | None = None


def detect_part(kind: str, headers: Mapping[str, TensorHeader]) -> PartFacts:
    """Facts beyond the kind, which is known already."""
    detect = {"text encoder": _detect_text, "clip vision": _detect_clip, "lora": _detect_lora}
    return detect[kind](headers) if kind in detect else PartFacts()


def linear_scheme(headers: Mapping[str, TensorHeader]) -> str:
    """The scheme of most of the numbers in a file's matrices; "unknown" in a file without any."""
    if scheme := gguf_scheme(headers):
        return scheme
    counts: Counter[str] = Counter()
    for name, weight in headers.items():
        if len(weight.shape) < 2 or name.endswith(("_scale", "scale_weight")):
            continue
        stem = name.removesuffix("weight")
        scale = headers.get(stem + "weight_scale") or headers.get(stem + "scale_weight")
        counts[scheme_of(weight, scale)] += prod(weight.shape)
    if not counts:
        dtypes = Counter(header.dtype for header in headers.values())
        found = max(dtypes, key=lambda dtype: dtypes[dtype], default="")
        return PLAIN_SCHEMES.get(found, found.lower() or "unknown")
    return max(counts, key=lambda scheme: counts[scheme])


def gguf_scheme(headers: Mapping[str, TensorHeader]) -> str | None:
    """The type that most of the matrices (of the blocks, in a transformer) have, where any matrix
    is in a block type of GGUF."""
    matrices = {name: header for name, header in headers.items() if len(header.shape) == 2}
    if not any(header.dtype in BLOCK_TYPES for header in matrices.values()):
        return None
    inner = [header for name, header in matrices.items() if name.startswith("blocks.")]
    counts: Counter[str] = Counter()
    for header in inner or matrices.values():
        counts[header.dtype] += prod(header.shape)
    return f"gguf-{counts.most_common(1)[0][0]}"


def _detect_text(headers: Mapping[str, TensorHeader]) -> PartFacts:
    if any(name.startswith("text_model.") for name in headers):
        return PartFacts("clip", layout="huggingface", unusable=f"a CLIP text encoder: {WAN_TEXT}")
    for layout, pattern, query in TEXT_LAYOUTS:
        tables = {int(m.group(1)) for name in headers if (m := re.fullmatch(pattern, name))}
        if not tables:
            continue
        weight = headers.get(query + ".weight")
        width = weight.shape[-1] if weight and weight.shape else 0
        # UMT5 has a bias table in every block, T5 one for all of them.
        if tables == {0} and _blocks(headers, query) > 1:
            return PartFacts("t5", layout=layout, unusable=f"T5, not UMT5: {WAN_TEXT}")
        size = "xxl" if (width, len(tables)) == UMT5_XXL else f"{len(tables)} x {width}"
        return PartFacts("umt5", size=size, layout=layout)
    return PartFacts()


def _blocks(headers: Mapping[str, TensorHeader], first: str) -> int:
    pattern = re.compile(re.escape(first).replace("0", r"\d+", 1) + r"\.weight")
    return sum(bool(pattern.fullmatch(name)) for name in headers)


def _detect_clip(headers: Mapping[str, TensorHeader]) -> PartFacts:
    for layout, pattern, patches in CLIP_LAYOUTS:
        if patches not in headers:
            continue
        layers = {m.group(1) for name in headers if (m := re.match(pattern, name))}
        shape = headers[patches].shape
        width = shape[0] if shape else 0
        size = "ViT-H/14" if (width, len(layers)) == VIT_H else f"{len(layers)} x {width}"
        wrong = f"a CLIP image encoder of {size}: Wan 2.1 I2V needs clip_vision_h (32 x 1280)"
        is_other = layers and width % HEAD_DIM
        return PartFacts("clip", size=size, layout=layout, unusable=wrong if is_other else None)
    return PartFacts()


def _detect_lora(headers: Mapping[str, TensorHeader]) -> PartFacts:
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    differences: dict[str, tuple[int, ...]] = {}
    for name, header in headers.items():
        if match := LORA_SIDE.search(name):
            side = {"B": "up", "A": "down"}.get(match["a"] or "", match["a"] or match["b"])
            sides.setdefault(name[: match.start()], {})[side] = header.shape
        elif match := LORA_DIFFERENCE.search(name):
            differences[name[: match.start()]] = header.shape
    stems = {_plain_stem(stem) for stem in [*sides, *differences]}
    pairs = {_plain_stem(s): shapes for s, shapes in sides.items() if len(shapes) == 2}
    ranks = sorted({shapes["down"][0] for shapes in pairs.values() if shapes["down"]})
    alpha = any(name.endswith(".alpha") for name in headers)
    lora = LoraFacts(tuple(ranks), len(pairs), len(differences), alpha)
    return PartFacts(
        task=_lora_task(stems, {_plain_stem(s): shape for s, shape in differences.items()}),
        size=_lora_size(pairs),
        layout=next((n for n, p in LORA_PREFIXES if any(s.startswith(p) for s in headers)), "bare"),
        unusable=_lora_problem(headers, stems),
        lora=lora,
    )


def _plain_stem(stem: str) -> str:
    prefix = next((p for _, p in LORA_PREFIXES if stem.startswith(p)), "")
    stem = stem.removeprefix(prefix)
    return from_diffusers(stem) or stem


def _lora_size(pairs: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str | None:
    widths = {s["up"][0] for stem, s in pairs.items() if QUERY.search(stem) and s["up"]}
    if len(widths) != 1:
        return None
    width = widths.pop()
    return WIDTHS.get(width, f"{width} wide")


def _lora_task(stems: set[str], differences: Mapping[str, tuple[int, ...]]) -> str | None:
    patches = differences.get("patch_embedding", ())
    if len(patches) == 5:
        return TASKS.get(patches[1])
    return "i2v" if any(IMAGE_LAYER.search(stem) for stem in stems) else None


def _lora_problem(headers: Mapping[str, TensorHeader], stems: set[str]) -> str | None:
    for mark, kind in OTHER_ADAPTERS:
        if any(mark in name for name in headers):
            return f"a {kind} adapter, which this version does not apply"
    if not any(WAN_LAYER.search(stem) for stem in stems):
        return "made for another model than Wan: none of its layers is one of Wan's blocks"
    return None
