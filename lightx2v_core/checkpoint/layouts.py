"""Key names of one transformer in the layouts it is published in, turned into the official ones.

Works on names alone; reads no file and knows no sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

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
