"""The sizes of a Wan transformer, as read from a checkpoint's shapes."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_DIM = 128
PATCH = (1, 2, 2)
FREQ_DIM = 256
TEXT_LEN = 512
CLIP_DIM = 1280
CLIP_TOKENS = 257


@dataclass(frozen=True, slots=True)
class WanConfig:
    """Architecture only. `clip_tokens` is 0 (no CLIP branch), 257, or 514 (first + last frame)."""

    dim: int
    ffn_dim: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    text_dim: int = 4096
    clip_tokens: int = 0
    eps: float = 1e-6

    @property
    def num_heads(self) -> int:
        return self.dim // HEAD_DIM

    @property
    def takes_image(self) -> bool:
        """Whether the input carries mask and first-frame latent besides the noise."""
        return self.in_dim == 2 * self.out_dim + 4
