"""LightX2V's names of number formats and attentions, and what they ask of us."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint.stored import PLAIN_SCHEMES
from ..errors import CapabilityError, RequestError
from ..quant.quantise import KEEP, ON_LOAD
from .read import Configuration

DEFAULT = ("Default", "Default-ForceFp32")
# Number format -> the kernels LightX2V names after it. All of them multiply the same codes.
KERNELS = {
    "fp8": (
        *("", "vllm", "sgl", "q8f", "triton", "torchao", "pertensor", "musa", "intel-xpu"),
        *("npu", "tmo"),
    ),
    "int8": (
        *("", "vllm", "sgl", "q8f", "triton", "torchao", "vllm-hygon-dcu", "npu", "tmo"),
        "iluvatar",
    ),
    "nvfp4": ("",),
    "mxfp8": ("",),
}
NOT_LOADED = {
    "fp8-b128-deepgemm": "fp8 with a scale for each block of 128 x 128",
    "int4-g128-marlin": "int4 with a scale for each group of 128",
    "mxfp4": "mxfp4",
    "mxfp6-mxfp8": "mxfp6",
}
# Attentions that compute the plain function; every other one of LightX2V leaves something out.
EXACT = (
    *("torch_sdpa", "flash_attn2", "flash_attn3", "flash_attn4", "flex_attn", "npu_flash_attn"),
    *("aiter_attn", "iluvatar_flash_attn", "flash_attn_hygon_dcu", "flash_attn_enflame_gcu"),
    *("intel_xpu_flash_attn", "intel_xpu_cute_attn", "mlu_flash_attn", "ring", "ulysses"),
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """A number format as the configuration names it. `family` is fp8, int8, nvfp4, mxfp8 or gguf;
    `gguf_type` such as Q4_K_S stands in the file's name."""

    name: str
    family: str
    gguf_type: str | None = None

    def fits(self, stored: str) -> bool:
        """Whether a file whose linears are `stored` (fp8-row, gguf-Q8_0, ...) is of this format."""
        return stored.partition("-")[0] == self.family


def read_scheme(source: str, key: str, name: str) -> Scheme | None:
    """None for a name that means full precision. Raises CapabilityError for a format that is known
    and not loaded, RequestError for a name LightX2V does not have."""
    if name in DEFAULT:
        return None
    if name in NOT_LOADED:
        raise CapabilityError(
            f"{source}: {key} {name} is {NOT_LOADED[name]}, which this version does not load; use "
            "an fp8, int8, nvfp4, mxfp8 or GGUF file of the model"
        )
    family, _, rest = name.partition("-")
    if family == "gguf" and rest:
        return Scheme(name, family, rest)
    if rest in KERNELS.get(family, ()):
        return Scheme(name, family)
    known = ", ".join(f"{family}-KERNEL" for family in ("fp8", "int8"))
    raise RequestError(
        f"{source}: {key} {name} is no scheme that LightX2V has; use {known} (such as fp8-sgl), "
        "nvfp4, mxfp8 or gguf-TYPE"
    )


def transformer_scheme(configuration: Configuration) -> Scheme | None:
    """By dit_quantized and dit_quant_scheme, or mm_config of older files; None for full weights."""
    source = configuration.source
    old = str(configuration.object("mm_config").get("mm_type", "Default"))
    if old != "Default":
        # Such as W-fp8-channel-sym-A-fp8-channel-sym-dynamic-Vllm.
        parts = old.split("-")
        family = parts[1] if len(parts) > 1 else old
        if "block128" in old:
            return read_scheme(source, "mm_config.mm_type", "fp8-b128-deepgemm")
        return read_scheme(source, "mm_config.mm_type", family)
    if not configuration.flag("dit_quantized"):
        return None
    name = configuration.text("dit_quant_scheme")
    if name is None:
        raise RequestError(
            f"{source}: dit_quantized is true without dit_quant_scheme; add it, such as "
            '"dit_quant_scheme": "fp8-sgl"'
        )
    return read_scheme(source, "dit_quant_scheme", name)


def encoder_scheme(configuration: Configuration, part: str) -> Scheme | None:
    """Of `part` t5 or clip."""
    key = f"{part}_quant_scheme"
    if not configuration.flag(f"{part}_quantized"):
        return None
    name = configuration.text(key)
    if name is None:
        raise RequestError(
            f"{configuration.source}: {part}_quantized is true without {key}; add it, such as "
            f'"{key}": "fp8-sgl"'
        )
    return read_scheme(configuration.source, key, name)


def is_quantised_on_load(configuration: Configuration) -> bool:
    return configuration.flag("weight_auto_quant") or bool(
        configuration.object("mm_config").get("weight_auto_quant")
    )


def choose_quantisation(configuration: Configuration, scheme: Scheme | None, stored: str) -> str:
    """What to turn the linears of a file into while it loads, whose linears are `stored` now.

    Raises for a full-precision file where the configuration says that it is quantised.
    """
    if scheme is None or stored not in PLAIN_SCHEMES.values():
        return KEEP
    if not is_quantised_on_load(configuration):
        raise RequestError(
            f"{configuration.source}: the model is to be {scheme.name}, and its file is {stored}; "
            'name the quantised file (dit_quantized_ckpt), add "weight_auto_quant": true to '
            "quantise it while it loads, or set dit_quantized to false"
        )
    if scheme.family not in ON_LOAD:
        raise CapabilityError(
            f"{configuration.source}: weights are not turned into {scheme.name} while loading; "
            f"use {' or '.join(ON_LOAD)}, or a file of that format"
        )
    return scheme.family


def read_attention(configuration: Configuration) -> tuple[str, list[str]]:
    """The attention to try for ("auto" is the exact one), and what to say about it."""
    name = configuration.text("self_attn_1_type") or configuration.text("attention_type")
    notes = []
    for key in ("cross_attn_1_type", "cross_attn_2_type"):
        other = configuration.text(key)
        if name and other and _attention(other) != _attention(name):
            notes.append(
                f"{configuration.source}: {key} {other} differs from self_attn_1_type {name}, "
                "which decides for all attentions"
            )
    if name and name not in EXACT and _attention(name) == "auto":
        notes.append(
            f"{configuration.source}: attention {name} leaves out part of the work there; the "
            "exact one is computed here, which is slower and differs by what is left out"
        )
    return _attention(name) if name else "auto", notes


def _attention(name: str) -> str:
    return "sage" if name.startswith("sage_attn") else "auto"
