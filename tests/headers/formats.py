"""What each published format makes of a full-precision header: names, shapes, dtypes.

Follows the code named in published.py; independent of this project's own readers and writers.
"""

from __future__ import annotations

from tests.headers.reconstruct import Header, reconstruct

BLOCK_LINEARS = ("self_attn.", "cross_attn.", "ffn.")


def linears(header: Header) -> list[str]:
    """Names of the weights that converters quantise: matrices of attention and feed-forward."""
    return [
        name
        for name, (shape, _) in header.items()
        if len(shape) == 2
        and name.endswith(".weight")
        and name.startswith("blocks.")
        and any(part in name for part in BLOCK_LINEARS)
    ]


def quantised(
    name: str, dtype: str, scale: str, shape: tuple, rest: str = "F32", **extra: tuple
) -> Header:
    """`name` with its linears in `dtype` and one `scale` each; `shape` may hold "rows"."""
    header = {key: (s, rest) for key, (s, _) in reconstruct(name).items()}
    for key in linears(header):
        rows = header[key][0][0]
        stem = key.removesuffix("weight")
        header[key] = (header[key][0], dtype)
        header[stem + scale] = (tuple(rows if n == "rows" else n for n in shape), "F32")
        header |= {stem + leaf: value for leaf, value in extra.items()}
    return header


def lightx2v_fp8(name: str) -> Header:
    return quantised(name, "F8_E4M3", "weight_scale", ("rows", 1))


def lightx2v_int8(name: str) -> Header:
    return quantised(name, "I8", "weight_scale", ("rows", 1))


def scaled_fp8(name: str, rest: str = "F32") -> Header:
    return quantised(name, "F8_E4M3", "scale_weight", (), rest) | {"scaled_fp8": ((2,), "F8_E4M3")}


def comfy_quant(name: str) -> Header:
    described = {"comfy_quant": ((60,), "U8"), "input_scale": ((), "F32")}
    return quantised(name, "F8_E4M3", "weight_scale", (), "BF16", **described)


def cast(name: str, dtype: str = "F8_E4M3") -> Header:
    header = reconstruct(name)
    return header | {key: (header[key][0], dtype) for key in linears(header)}


def nvfp4(name: str, dialect: str = "lightx2v") -> Header:
    """Two codes a byte, an e4m3 scale for each 16 columns in tiles of 128 rows and 4 scales."""
    header = reconstruct(name)
    for key in linears(header):
        (rows, columns), stem = header[key][0], key.removesuffix("weight")
        tiles = (-(-rows // 128) * 128, -(-(columns // 16) // 4) * 4)
        header[key] = ((rows, columns // 2), "U8")
        header[stem + "weight_scale"] = (tiles, "F8_E4M3")
        scalars = ("alpha", "input_global_scale")
        for leaf in scalars if dialect == "lightx2v" else ("weight_scale_2", "input_scale"):
            header[stem + leaf] = ((), "F32")
    return header


def prefixed(header: Header, prefix: str) -> Header:
    return {prefix + key: value for key, value in header.items()}


def extracted_lora(name: str, rank: int) -> Header:
    """Pairs for matrices of a million numbers or more, differences for everything else."""
    lora: Header = {}
    for key, (shape, _) in reconstruct(name).items():
        stem = "diffusion_model." + key.rpartition(".")[0]
        numbers = 1
        for side in shape:
            numbers *= side
        if key.endswith(".weight") and len(shape) == 2 and numbers >= 1_000_000:
            lora[f"{stem}.lora_up.weight"] = ((shape[0], rank), "BF16")
            lora[f"{stem}.lora_down.weight"] = ((rank, shape[1]), "BF16")
        else:
            leaf = {"bias": ".diff_b", "modulation": ".diff_m"}.get(key.rpartition(".")[2], ".diff")
            lora[stem + leaf] = (shape, "BF16")
    return lora


def pairs_only(name: str, rank: int, dtype: str = "BF16", alpha: bool = False) -> Header:
    lora: Header = {}
    model = reconstruct(name)
    for key in linears(model):
        shape, stem = model[key][0], "diffusion_model." + key.removesuffix(".weight")
        lora[stem + ".lora_up.weight"] = ((shape[0], rank), dtype)
        lora[stem + ".lora_down.weight"] = ((rank, shape[1]), dtype)
        if alpha:
            lora[stem + ".alpha"] = ((), dtype)
    return lora


def umt5(layout: str, dtype: str = "BF16", scale: str | None = None, blocks: int = 24) -> Header:
    """UMT5-XXL; a bias table in every block. `scale` is the leaf of quantised linears."""
    dim, hidden, heads, vocabulary = 4096, 10240, 64, 256384
    official = layout == "official"
    table = "token_embedding.weight" if official else "shared.weight"
    final = "norm.weight" if official else "encoder.final_layer_norm.weight"
    plain = "BF16" if scale else dtype
    header: Header = {table: ((vocabulary, dim), plain), final: ((dim,), plain)}
    for n in range(blocks):
        b = f"blocks.{n}." if official else f"encoder.block.{n}.layer."
        attention = [b + (f"attn.{x}" if official else f"0.SelfAttention.{x}") for x in "qkvo"]
        gate, up, out = (
            ("ffn.gate.0", "ffn.fc1", "ffn.fc2")
            if official
            else ("1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1", "1.DenseReluDense.wo")
        )
        shapes = dict.fromkeys(attention, (dim, dim))
        shapes |= {b + gate: (hidden, dim), b + up: (hidden, dim), b + out: (dim, hidden)}
        for stem, shape in shapes.items():
            header[stem + ".weight"] = (shape, dtype)
            if scale:
                header[f"{stem}.{scale}"] = (
                    (shape[0], 1) if scale == "weight_scale" else (),
                    "F32",
                )
        norms = ("norm1", "norm2") if official else ("0.layer_norm", "1.layer_norm")
        header |= {f"{b}{norm}.weight": ((dim,), plain) for norm in norms}
        bias = "pos_embedding.embedding" if official else "0.SelfAttention.relative_attention_bias"
        header[f"{b}{bias}.weight"] = ((32, heads), plain)
    return header


def clip(layout: str, dtype: str = "F16", scale: bool = False) -> Header:
    """The image tower of open-clip ViT-H/14."""
    dim, hidden, layers = 1280, 5120, 32
    official = layout == "official"
    patches = "visual.patch_embedding" if official else "vision_model.embeddings.patch_embedding"
    header: Header = {patches + ".weight": ((dim, 3, 14, 14), "F16")}
    for n in range(layers):
        if official:
            stem = f"visual.transformer.{n}."
            shapes = {"attn.to_qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
            shapes |= {"mlp.0": (hidden, dim), "mlp.2": (dim, hidden)}
        else:
            stem = f"vision_model.encoder.layers.{n}."
            shapes = {f"self_attn.{x}_proj": (dim, dim) for x in ("q", "k", "v", "out")}
            shapes |= {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
        for leaf, shape in shapes.items():
            header[f"{stem}{leaf}.weight"] = (shape, dtype)
            header[f"{stem}{leaf}.bias"] = (shape[:1], "F16")
            if scale:
                header[f"{stem}{leaf}.weight_scale"] = ((shape[0], 1), "F32")
    return header
