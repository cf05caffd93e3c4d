"""Headers of the official transformers, put together from documentation of their layout.

No published file was at hand. Names and shapes are those that ModelTC/LightX2V at commit f8aee98b
reads (lightx2v/models/networks/wan/weights/pre_weights.py:13-175, transformer_weights.py,
post_weights.py) and that Wan-Video/Wan2.1 wan/modules/model.py registers; sizes are those of
wan/configs/*.py. Independent of this project's own model classes.
"""

from __future__ import annotations

Header = dict[str, tuple[tuple[int, ...], str]]

# name: (dim, ffn, layers, in_channels, clip tokens, tensors in the official file)
OFFICIAL = {
    "wan2.1_t2v_1.3b": (1536, 8960, 30, 16, 0, 825),
    "wan2.1_t2v_14b": (5120, 13824, 40, 16, 0, 1095),
    "wan2.1_i2v_14b": (5120, 13824, 40, 36, 257, 1303),
    "wan2.1_flf2v_14b": (5120, 13824, 40, 36, 514, 1304),
    "wan2.2_i2v_a14b_high_noise": (5120, 13824, 40, 36, 0, 1095),
    "wan2.2_t2v_a14b_low_noise": (5120, 13824, 40, 16, 0, 1095),
}


def reconstruct(name: str, dtype: str = "BF16") -> Header:
    """Official name -> (shape, dtype)."""
    dim, ffn, layers, in_channels, clip_tokens, _ = OFFICIAL[name]
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (dim, in_channels, 1, 2, 2),
        "patch_embedding.bias": (dim,),
        "head.modulation": (1, 2, dim),
    }
    linears = {
        "text_embedding.0": (dim, 4096),
        "text_embedding.2": (dim, dim),
        "time_embedding.0": (dim, 256),
        "time_embedding.2": (dim, dim),
        "time_projection.1": (6 * dim, dim),
        "head.head": (64, dim),
    }
    if clip_tokens:
        linears |= {"img_emb.proj.1": (1280, 1280), "img_emb.proj.3": (dim, 1280)}
        for norm, width in (("0", 1280), ("4", dim)):
            shapes |= {f"img_emb.proj.{norm}.{leaf}": (width,) for leaf in ("weight", "bias")}
    if clip_tokens == 514:
        shapes["img_emb.emb_pos"] = (1, 514, 1280)
    for block in range(layers):
        prefix = f"blocks.{block}."
        shapes[prefix + "modulation"] = (1, 6, dim)
        shapes |= {prefix + "norm3.weight": (dim,), prefix + "norm3.bias": (dim,)}
        linears |= {prefix + "ffn.0": (ffn, dim), prefix + "ffn.2": (dim, ffn)}
        for attention in ("self_attn", "cross_attn"):
            image = clip_tokens and attention == "cross_attn"
            for leaf in ("q", "k", "v", "o", *(("k_img", "v_img") if image else ())):
                linears[f"{prefix}{attention}.{leaf}"] = (dim, dim)
            for norm in ("norm_q", "norm_k", *(("norm_k_img",) if image else ())):
                shapes[f"{prefix}{attention}.{norm}.weight"] = (dim,)
    for linear, shape in linears.items():
        shapes[linear + ".weight"] = shape
        shapes[linear + ".bias"] = shape[:1]
    return {key: (shape, dtype) for key, shape in shapes.items()}
