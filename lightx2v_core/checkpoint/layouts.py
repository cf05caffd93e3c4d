"""Key names of transformers and VAEs in the layouts they are published in, and the official ones.

Works on names alone; reads no file and knows no sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

# A tensor every Wan transformer has and no other family does.
LANDMARK = "head.modulation"
DIFFUSERS_LANDMARK = "condition_embedder.time_proj.weight"

# (layout, prefix in front of the official names); the first whose landmark is there wins.
PREFIXES = (
    ("official", ""),
    ("comfy", "model.diffusion_model."),
    ("diffusion_model", "diffusion_model."),
    ("self-forcing", "model."),
)

# Left behind by wrappers of training code; removed before anything else is looked at.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")

# Official stem, diffusers stem. `N` stands for a block number.
DIFFUSERS_STEMS = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("blocks.N.modulation", "blocks.N.scale_shift_table"),
    ("blocks.N.self_attn.q", "blocks.N.attn1.to_q"),
    ("blocks.N.self_attn.k", "blocks.N.attn1.to_k"),
    ("blocks.N.self_attn.v", "blocks.N.attn1.to_v"),
    ("blocks.N.self_attn.o", "blocks.N.attn1.to_out.0"),
    ("blocks.N.self_attn.norm_q", "blocks.N.attn1.norm_q"),
    ("blocks.N.self_attn.norm_k", "blocks.N.attn1.norm_k"),
    ("blocks.N.cross_attn.q", "blocks.N.attn2.to_q"),
    ("blocks.N.cross_attn.k", "blocks.N.attn2.to_k"),
    ("blocks.N.cross_attn.v", "blocks.N.attn2.to_v"),
    ("blocks.N.cross_attn.o", "blocks.N.attn2.to_out.0"),
    ("blocks.N.cross_attn.k_img", "blocks.N.attn2.add_k_proj"),
    ("blocks.N.cross_attn.v_img", "blocks.N.attn2.add_v_proj"),
    ("blocks.N.cross_attn.norm_q", "blocks.N.attn2.norm_q"),
    ("blocks.N.cross_attn.norm_k", "blocks.N.attn2.norm_k"),
    ("blocks.N.cross_attn.norm_k_img", "blocks.N.attn2.norm_added_k"),
    ("blocks.N.norm3", "blocks.N.norm2"),
    ("blocks.N.ffn.0", "blocks.N.ffn.net.0.proj"),
    ("blocks.N.ffn.2", "blocks.N.ffn.net.2"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
)
_TO_DIFFUSERS = dict(DIFFUSERS_STEMS)
_FROM_DIFFUSERS = {theirs: ours for ours, theirs in DIFFUSERS_STEMS}
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_LEAF = re.compile(r"\.(weight|bias)$")


def _rename(name: str, stems: dict[str, str]) -> str | None:
    """`name` with its stem translated; None when the table does not have it."""
    block, leaf = _BLOCK.match(name), _LEAF.search(name)
    stem = _BLOCK.sub("blocks.N.", name)
    stem = _LEAF.sub("", stem)
    if stem not in stems:
        return None
    number = block.group(1) if block else ""
    return stems[stem].replace("blocks.N.", f"blocks.{number}.") + (leaf.group(0) if leaf else "")


def to_diffusers(name: str) -> str:
    """The diffusers name of an official tensor name."""
    renamed = _rename(name, _TO_DIFFUSERS)
    if renamed is None:
        raise KeyError(f"{name} is not a tensor of the official layout")
    return renamed


def from_diffusers(name: str) -> str | None:
    """The official name of a diffusers tensor or module name; None where the two do not differ."""
    return _rename(name, _FROM_DIFFUSERS)


def unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def official_names(names: Iterable[str]) -> tuple[str, dict[str, str]] | None:
    """(layout, official name -> name in the file), or None when this is no Wan transformer.

    Names the layout has no translation for keep their own name, so that strict loading sees them.
    Names outside the prefix (a VAE or text encoder in the same file) are left out.
    """
    plain = {unwrapped(name): name for name in names}
    for layout, prefix in PREFIXES:
        if prefix + LANDMARK in plain:
            inside = {k.removeprefix(prefix): v for k, v in plain.items() if k.startswith(prefix)}
            return layout, inside
    if DIFFUSERS_LANDMARK in plain:
        return "diffusers", {_rename(k, _FROM_DIFFUSERS) or k: v for k, v in plain.items()}
    return None


# The VAE: official layer name, diffusers layer name.
VAE_PREFIXES = ("vae.", "first_stage_model.")
VAE_DIFFUSERS_LANDMARK = "decoder.mid_block.resnets.0.norm1.gamma"
VAE_OUTER = {
    "encoder.conv1": "encoder.conv_in",
    "encoder.head.0": "encoder.norm_out",
    "encoder.head.2": "encoder.conv_out",
    "decoder.conv1": "decoder.conv_in",
    "decoder.head.0": "decoder.norm_out",
    "decoder.head.2": "decoder.conv_out",
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
}
VAE_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
VAE_INNER = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


def vae_to_diffusers(name: str) -> str:
    """The diffusers name of an official VAE tensor name."""
    layer, leaf = name.rsplit(".", 1)
    if layer in VAE_OUTER:
        return f"{VAE_OUTER[layer]}.{leaf}"
    half, group, index, inner = layer.split(".", 3)
    inner = VAE_INNER.get(inner, inner)
    if group == "middle":
        return f"{half}.mid_block.{VAE_MIDDLE[index]}.{inner}.{leaf}"
    if group == "downsamples":
        return f"{half}.down_blocks.{index}.{inner}.{leaf}"
    level, place = divmod(int(index), 4)
    place_name = f"resnets.{place}" if place < 3 else "upsamplers.0"
    return f"{half}.up_blocks.{level}.{place_name}.{inner}.{leaf}"


def plain_vae_names(names: Iterable[str]) -> dict[str, str]:
    """Name without the prefix of files that hold more than a VAE -> name in the file.

    Where there is such a prefix, names outside it are left out.
    """
    stored = {name: name for name in names}
    for prefix in VAE_PREFIXES:
        inside = {name.removeprefix(prefix): name for name in stored if name.startswith(prefix)}
        if inside:
            return inside
    return stored


def official_vae_names(
    names: Iterable[str], official: Callable[[], Iterable[str]]
) -> dict[str, str]:
    """Official name -> name in the file. `official` gives all names a Wan 2.1 VAE has; it is asked
    for diffusers names alone.

    Names without a translation keep their own, so that strict loading sees them.
    """
    stored = plain_vae_names(names)
    if VAE_DIFFUSERS_LANDMARK not in stored:
        return stored
    back = {vae_to_diffusers(name): name for name in official()}
    return {back.get(name, name): value for name, value in stored.items()}
