"""Recognise a file from names, shapes, dtypes and its own name. Reads no weights.

What the header cannot tell (the release, the expert, whether a T2V 14B is Wan 2.1 or 2.2) comes
from the published file names; where those are silent too it stays "unknown", never a guess.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod

from ..errors import CheckpointError, preview
from ..quant.ggml import BLOCK_TYPES
from ..quant.schemes import LINEARS, LOADED
from ..wan.config import CLIP_TOKENS, HEAD_DIM, WanConfig
from .headers import TensorHeader
from .layouts import official_names
from .source import Checkpoint
from .stored import PLAIN_SCHEMES, scheme_of
from .vaes import VaeFacts, detect_vae

UNKNOWN = "unknown"

SIZES = {1536: "1.3B", 3072: "5B", 5120: "14B"}

# (kind, a tensor name ending only that kind has); the first match wins.
OTHER_KINDS = (
    ("text encoder", "blocks.0.pos_embedding.embedding.weight"),
    ("text encoder", "block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    ("text encoder", "text_model.encoder.layers.0.mlp.fc1.weight"),
    ("text encoder", "enc.blk.0.attn_q.weight"),
    ("clip vision", "visual.patch_embedding.weight"),
    ("clip vision", "vision_model.embeddings.patch_embedding.weight"),
)
LORA_MARKS = (".lora_up.weight", ".lora_down.weight", ".lora_A.weight", ".lora_B.weight", ".diff")

# (a tensor prefix, the family it belongs to): recognised and refused by name.
OTHER_FAMILIES = (
    ("vace_", "VACE"),
    ("control_adapter.", "Fun Camera"),
    ("pose_patch_embedding.", "Animate"),
    ("audio_proj", "HuMo"),
    ("casual_audio_encoder.", "S2V"),
    ("cond_encoder.", "S2V"),
    ("ref_conv.", "Fun Control"),
    ("guidance_embedding.", "dynamic-CFG distill"),
    ("time_embedding_r.", "mean-flow distill"),
)

# (pattern in file or folder name, release); the first match wins.
RELEASES = (
    (r"seko-v2", "lightning-seko-v2.0"),
    (r"seko-v1\.1", "lightning-seko-v1.1"),
    (r"seko-v1", "lightning-seko-v1"),
    (r"250928", "lightning-250928"),
    (r"260412", "distill-260412"),
    (r"lightx2v_4step_1030|_1030", "distill-1030"),
    (r"_1022", "distill-1022"),
    (r"_1217", "distill-1217"),
    (r"moe-distill", "moe-distill"),
    (r"lightx2v_4step|stepdistill|step_distill|distill_model", "distill"),
)


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

    def as_json(self) -> dict[str, object]:
        return asdict(self)

    def describe(self) -> str:
        """One line for people: Wan 2.2 i2v 14B, high-noise expert, bf16, release distill."""
        if self.kind != "transformer":
            named = [word for word in (self.release, self.family) if word != UNKNOWN]
            return ", ".join((self.kind, *named, self.scheme, f"{self.tensors} tensors"))
        expert = f", {self.expert}-noise expert" if self.expert else ""
        family = f"Wan of {self.family} version" if self.family == UNKNOWN else self.family
        return (
            f"{family} {self.task} {self.size}{expert}, {self.scheme}, {self.layout} names, "
            f"release {self.release}"
        )


def detect(checkpoint: Checkpoint) -> CheckpointInfo:
    """Look at headers and names only."""
    headers = checkpoint.headers
    if not (found := official_names(headers)):
        return _detect_other(checkpoint)
    layout, names = found
    official = {name: headers[stored] for name, stored in names.items()}
    config = read_config(official, checkpoint.name)
    scheme = _block_scheme(official)
    label = f"{checkpoint.path.parent.name}/{checkpoint.name}".lower()
    metadata = {k.removeprefix("lightx2v."): v for k, v in checkpoint.metadata.items()}
    release = metadata.get("release") or _release(label)
    family = metadata.get("family") or _family(config, label)
    distilled = release not in (UNKNOWN, "demo-teacher")
    return CheckpointInfo(
        kind="transformer",
        family=family,
        task=_task(config),
        expert=metadata.get("expert") or _expert(label, family),
        size=SIZES.get(config.dim, f"{sum(prod(h.shape) for h in official.values()) / 1e6:.1f}M"),
        layout=layout,
        scheme=scheme,
        release=release,
        preset=_preset(config) if distilled else None,
        bytes=checkpoint.nbytes,
        tensors=len(headers),
        config=config,
        refusal=_refusal(checkpoint, official, config, scheme),
    )


def _detect_other(checkpoint: Checkpoint) -> CheckpointInfo:
    """A file that is no transformer."""
    headers = checkpoint.headers
    vae = detect_vae(headers, checkpoint.name)
    kind = _other_kind(headers) if vae is None else "vae"
    vae = vae or VaeFacts()
    return CheckpointInfo(
        kind,
        family=vae.family or UNKNOWN,
        layout=vae.layout or UNKNOWN,
        release=vae.release or UNKNOWN,
        scheme=_common_scheme(headers),
        bytes=checkpoint.nbytes,
        tensors=len(headers),
        refusal=_kind_refusal(checkpoint, kind, vae.refusal),
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
    return UNKNOWN


def _kind_refusal(checkpoint: Checkpoint, kind: str, reason: str | None = None) -> str:
    advice = reason or {
        "vae": "load it with the VAE loader",
        "text encoder": "load it with the text encoder loader",
        "clip vision": "load it with CLIPVisionLoader",
        "lora": "apply it to a model with a LoRA node",
    }.get(kind, f"it holds {preview(checkpoint.headers)}; use a Wan 2.1 or 2.2 transformer file")
    what = f"a {kind} file" if kind != UNKNOWN else "of no kind known here"
    return f"{checkpoint.name} is not a Wan transformer but {what}: {advice}"


def _task(config: WanConfig) -> str:
    if config.in_dim == config.out_dim:
        return "t2v"
    if not config.takes_image:
        return UNKNOWN
    return "flf2v" if config.clip_tokens == 2 * CLIP_TOKENS else "i2v"


def _family(config: WanConfig, label: str) -> str:
    if config.out_dim == 48:
        return "wan2.2"
    if config.clip_tokens or config.dim == 1536:
        return "wan2.1"
    if config.takes_image:
        return "wan2.2"  # only the A14B experts take an image without CLIP
    if re.search(r"wan_?2[._]?2|a14b|(high|low)_noise", label):
        return "wan2.2"
    return "wan2.1" if re.search(r"wan_?2[._]?1", label) else UNKNOWN


def _expert(label: str, family: str) -> str | None:
    if family != "wan2.2":
        return None
    if match := re.search(r"(high|low)[_-]?(noise|lightx2v)?", label):
        return match.group(1)
    return None


def _release(label: str) -> str:
    return next((name for pattern, name in RELEASES if re.search(pattern, label)), UNKNOWN)


def _preset(config: WanConfig) -> str:
    return "flf2v-4step" if config.clip_tokens == 2 * CLIP_TOKENS else "distill-4step"


def _common_scheme(headers: Mapping[str, TensorHeader]) -> str:
    """The scheme of the largest tensor, for files that are not transformers."""
    if scheme := _gguf_scheme(headers):
        return scheme
    largest = max(headers.values(), key=lambda header: prod(header.shape), default=None)
    return PLAIN_SCHEMES.get(largest.dtype, largest.dtype.lower()) if largest else UNKNOWN


def _gguf_scheme(headers: Mapping[str, TensorHeader]) -> str | None:
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


def _block_scheme(headers: Mapping[str, TensorHeader]) -> str:
    """The most frequent scheme of the blocks' linears; quantised ones come first."""
    if scheme := _gguf_scheme(headers):
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


def _refusal(
    checkpoint: Checkpoint,
    headers: Mapping[str, TensorHeader],
    config: WanConfig,
    scheme: str,
) -> str | None:
    """Why this transformer cannot be run by this version, or None."""
    name = checkpoint.name
    for prefix, family in OTHER_FAMILIES:
        if any(key.startswith(prefix) for key in headers):
            return (
                f"{name} is a Wan {family} model, which this version does not run; use T2V or I2V"
            )
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
