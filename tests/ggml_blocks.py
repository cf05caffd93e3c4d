"""Random blocks of every GGUF block type, with scales that are ordinary numbers."""

from __future__ import annotations

import numpy as np

from lightx2v_core.quant.ggml import BLOCK_TYPES

# Where a block keeps its float16 scales, in bytes. The other bytes are valid whatever they are.
SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)},
}


def random_blocks(name: str, count: int, seed: int = 0, scale: float = 0.02) -> np.ndarray:
    """`count` rows of bytes. `scale` is the spread of the float16 scales, where there are any."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, BLOCK_TYPES[name].nbytes), dtype=np.uint8)
    for at in SCALES.get(name, ()):
        scales = rng.normal(0, scale, (count, 1)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8)
    if name == "IQ1_M":  # its scale is spread over four words: an ordinary exponent
        blocks[:, 55] = (blocks[:, 55] & 0x8F) | 0x20
    if name == "MXFP4":  # a power of two
        blocks[:, 0] = rng.integers(110, 130, count)
    if name == "NVFP4":
        blocks[:, :4] = rng.integers(0, 64, (count, 4))
    return blocks
