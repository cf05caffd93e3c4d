"""Recognise a file from names, shapes, dtypes and its own name. Reads no weights.

What the header cannot tell (the release, the expert, whether a T2V 14B is Wan 2.1 or 2.2) comes
from the published file names in registry.py; where those are silent too it stays "unknown", never
a guess.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod

from ..errors import CheckpointError, preview
from ..quant.schemes import LINEARS, LOADED
from ..wan.config import CLIP_TOKENS, HEAD_DIM, WanConfig
from .families import add_on_family, other_family
from .headers import TensorHeader
from .layouts import official_names
from .parts import WIDTHS as SIZES
from .parts import LoraFacts, detect_part, gguf_scheme, linear_scheme
from .registry import UNKNOWN, refine
from .source import Checkpoint
from .stored import PLAIN_SCHEMES, scheme_of
from .vaes import VaeFacts, detect_vae

METADATA_PREFIX = "lightx2v."

# (kind, a tensor name ending only that kind has); the first match wins.
OTHER_KINDS = (
    ("text encoder", "blocks.0.pos_embedding.embedding.weight"),
    ("text encoder", "block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    ("text encoder", "text_model.encoder.layers.0.mlp.fc1.weight"),
    ("text encoder", "enc.blk.0.attn_q.weight"),
    ("clip vision", "visual.patch_embedding.weight"),
    ("clip vision", "vision_model.embeddings.patch_embedding.weight"),
)
LORA_MARKS = (
    *(".lora_up.weight", ".lora_down.weight", ".lora_A.weight", ".lora_B.weight"),
    *(".lora_A", ".lora_B", ".lora_A.default.weight", ".lora.up.weight", "_lora.up.weight"),
    *(".lora_linear_layer.up.weight", ".diff", ".diff_b", ".diff_m", ".lokr_w1", ".hada_w1_a"),
)
PART = "transformer part"
BLOCK_PART = re.compile(r"(^|\.)blocks\.\d+\.(self_attn\.q\.weight|attn1\.to_q\.weight)$")


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a file is. `refusal` is the sentence for a file this version cannot run, else None."""

    kind: str
    family: str = UNKNOWN
    task: str = UNKNOWN
    expert: str | None = None
    size: str = UNKNOWN
    layout: str = UNKNOWN
    scheme: str = UNKNOWN
    release: str = UNKNOWN
    preset: str | None = None
    bytes: int = 0
    tensors: int = 0
    config: WanConfig | None = None
    refusal: str | None = None
    dialect: str | None = None  # who writes quantised files in this form
    unusable: str | None = None  # why not even the loader of its own kind takes it
    lora: LoraFacts | None = None
    repository: str | None = None
    licence: str | None = None
    source: str | None = None  # where the published name was seen
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    def describe(self) -> str:
        """One line for people: Wan 2.2 i2v 14B, high-noise expert, bf16, release distill."""
        if self.kind != "transformer":
            words = (self.family, self.task, self.size, self.expert and f"{self.expert} noise")
            named = [word for word in (*words, self.release) if word and word != UNKNOWN]
            return ", ".join((self.kind, *named, self.scheme, f"{self.tensors} tensors"))
        expert = f", {self.expert}-noise expert" if self.expert else ""
        family = f"Wan of {self.family} version" if self.family == UNKNOWN else self.family
        return (
            f"{family} {self.task} {self.size}{expert}, {self.scheme}, {self.layout} names, "
            f"release {self.release}"
        )


def detect(checkpoint: Checkpoint) -> CheckpointInfo:
    """Look at headers and names only: what the header says, refined by what the names add."""
    label = f"{checkpoint.path.parent.name}/{checkpoint.name}"
    ours = {
        key.removeprefix(METADATA_PREFIX): str(value)
        for key, value in checkpoint.metadata.items()
        if key.startswith(METADATA_PREFIX)
    }
    return refine(_read_header(checkpoint), label, ours)


def _read_header(checkpoint: Checkpoint) -> CheckpointInfo:
    headers = checkpoint.headers
    if not (found := official_names(headers)):
        return _read_part(checkpoint)
    layout, names = found
    official = {name: headers[stored] for name, stored in names.items()}
    config = read_config(official, checkpoint.name)
    scheme = _block_scheme(official)
    return CheckpointInfo(
        kind="transformer",
        family=_family(config),
        task=_task(config),
        size=SIZES.get(config.dim, f"{sum(prod(h.shape) for h in official.values()) / 1e6:.1f}M"),
        layout=layout,
        scheme=scheme,
        bytes=checkpoint.nbytes,
        tensors=len(headers),
        config=config,
        refusal=_refusal(checkpoint, official, config, scheme),
        dialect=_dialect(official, checkpoint.metadata),
    )


def _read_part(checkpoint: Checkpoint) -> CheckpointInfo:
    """A file that is no transformer, or only a part of one."""
    headers = checkpoint.headers
    if vae := detect_vae(headers, checkpoint.name):
        return _read_vae(checkpoint, vae)
    kind = _other_kind(headers)
    part = detect_part(kind, headers)
    return CheckpointInfo(
        kind,
        family=part.family or UNKNOWN,
        task=part.task or UNKNOWN,
        size=part.size or UNKNOWN,
        layout=part.layout or UNKNOWN,
        scheme=linear_scheme(headers),
        bytes=checkpoint.nbytes,
        tensors=len(headers),
        refusal=_kind_refusal(checkpoint, kind, part.unusable),
        dialect=_dialect(headers, checkpoint.metadata),
        unusable=part.unusable,
        lora=part.lora,
    )


def _read_vae(checkpoint: Checkpoint, vae: VaeFacts) -> CheckpointInfo:
    return CheckpointInfo(
        "vae",
        family=vae.family or UNKNOWN,
        layout=vae.layout or UNKNOWN,
        release=vae.release or UNKNOWN,
        scheme=linear_scheme(checkpoint.headers),
        bytes=checkpoint.nbytes,
        tensors=len(checkpoint.headers),
        refusal=_kind_refusal(checkpoint, "vae", vae.refusal),
        unusable=vae.refusal,
    )


def read_config(headers: Mapping[str, TensorHeader], source: str) -> WanConfig:
    """Sizes of a transformer from the shapes of its official tensors."""
    try:
        dim, in_dim = headers["patch_embedding.weight"].shape[:2]
        blocks = {int(k.split(".")[1]) for k in headers if re.match(r"blocks\.\d+\.", k)}
        clip_tokens = CLIP_TOKENS if "img_emb.proj.1.weight" in headers else 0
        config = WanConfig(
            dim=dim,
            ffn_dim=headers["blocks.0.ffn.0.bias"].shape[0],
            num_layers=max(blocks) + 1,
            in_dim=in_dim,
            out_dim=headers["head.head.bias"].shape[0] // 4,
            text_dim=headers["text_embedding.0.weight"].shape[1],
            clip_tokens=2 * clip_tokens if "img_emb.emb_pos" in headers else clip_tokens,
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{source} looks like a Wan transformer but lacks {error}; "
            "the file holds only a part of the model: use the whole one"
        ) from error
    if dim % HEAD_DIM:
        raise CheckpointError(
            f"{source} has a width of {dim}; a Wan transformer's is a multiple of {HEAD_DIM}"
        )
    return config


def _other_kind(headers: Mapping[str, TensorHeader]) -> str:
    for kind, ending in OTHER_KINDS:
        if any(name.endswith(ending) for name in headers):
            return kind
    if any(name.endswith(LORA_MARKS) for name in headers):
        return "lora"
    if any(BLOCK_PART.search(name) for name in headers):
        return PART
    return "add-on" if add_on_family(headers) else UNKNOWN


def _kind_refusal(checkpoint: Checkpoint, kind: str, unusable: str | None) -> str:
    if kind == PART:
        return (
            f"{checkpoint.name} holds blocks of a Wan transformer and not the rest of it; give the "
            "whole folder (block_0 to the last, and non_block), or the file that is not split"
        )
    advice = unusable or {
        "vae": "load it with the VAE loader",
        "text encoder": "load it with the text encoder loader",
        "clip vision": "load it with CLIPVisionLoader",
        "lora": "apply it to a model with a LoRA node",
        "add-on": f"it belongs to Wan {add_on_family(checkpoint.headers)}, which this version does "
        "not run",
    }.get(kind, f"it holds {preview(checkpoint.headers)}; use a Wan 2.1 or 2.2 transformer file")
    what = f"a {kind} file" if kind != UNKNOWN else "of no kind known here"
    return f"{checkpoint.name} is not a Wan transformer but {what}: {advice}"


def _task(config: WanConfig) -> str:
    if config.in_dim == config.out_dim:
        return "t2v"
    if not config.takes_image:
        return UNKNOWN
    return "flf2v" if config.clip_tokens == 2 * CLIP_TOKENS else "i2v"


def _family(config: WanConfig) -> str:
    """Wan 2.1's and 2.2's T2V 14B have the same shapes: of them only a name can tell."""
    if config.out_dim == 48:
        return "wan2.2"
    if config.clip_tokens or config.dim == 1536:
        return "wan2.1"
    return "wan2.2" if config.takes_image else UNKNOWN  # only A14B takes a picture without CLIP


def _block_scheme(headers: Mapping[str, TensorHeader]) -> str:
    """The most frequent scheme of the blocks' linears; quantised ones come first."""
    if scheme := gguf_scheme(headers):
        return scheme
    counts: Counter[str] = Counter()
    for name, weight in headers.items():
        if name.startswith("blocks.") and name.endswith(".weight") and len(weight.shape) == 2:
            stem = name.removesuffix("weight")
            scale = headers.get(stem + "weight_scale") or headers.get(stem + "scale_weight")
            counts[scheme_of(weight, scale)] += 1
    quantised = {s: n for s, n in counts.items() if s not in PLAIN_SCHEMES.values()}
    found = quantised or counts
    return max(found, key=lambda scheme: found[scheme]) if found else UNKNOWN


# (dialect, end of a tensor's name that only it has); the first match wins.
DIALECTS = (
    ("ComfyUI (comfy_quant)", ".comfy_quant"),
    ("ComfyUI (scaled_fp8)", "scaled_fp8"),
    ("ComfyUI", ".weight_scale_2"),
    ("LightX2V", ".input_global_scale"),
    ("LightX2V, without its calibration", ".weight_global_scale"),
    ("ComfyUI", ".scale_weight"),
    ("LightX2V", ".weight_scale"),
)


def _dialect(headers: Mapping[str, TensorHeader], metadata: Mapping[str, str]) -> str | None:
    """Whose form of quantised file this is; None for plain files and for casts without scales."""
    if "_quantization_metadata" in metadata:
        return "ComfyUI (metadata)"
    return next((d for d, end in DIALECTS if any(name.endswith(end) for name in headers)), None)


def _refusal(
    checkpoint: Checkpoint,
    headers: Mapping[str, TensorHeader],
    config: WanConfig,
    scheme: str,
) -> str | None:
    """Why this transformer cannot be run by this version, or None."""
    name = checkpoint.name
    if family := other_family(headers, config.dim):
        return f"{name} is a Wan {family} model, which this version does not run; use T2V or I2V"
    if config.out_dim == 48:
        return f"{name} is the Wan 2.2 5B model, which this version does not run; use a 14B or 1.3B"
    if _task(config) == UNKNOWN:
        return (
            f"{name} takes {config.in_dim} input channels: a control variant this version does not "
            "run; use a T2V (16) or I2V (36) model"
        )
    if scheme not in LINEARS:
        return (
            f"{name} is quantised as {scheme}, which this version does not load; "
            f"use a file of the same release in {LOADED}"
        )
    return None
