"""How large everything is: the demo family, and a smoke form whose every stage takes seconds."""

from __future__ import annotations

from dataclasses import dataclass

from lightx2v_core.wan.config import WanConfig


@dataclass(frozen=True, slots=True)
class Sizes:
    """Clips are `side` x `side` x `frames`. Batches are what one H200 holds with room to spare."""

    side: int = 128
    frames: int = 17
    # VAE: most of its training sees short clips, which hold every kind of chunk, cut around the
    # objects.
    vae_dim: int = 16
    vae_batch: int = 8
    short_frames: int = 9
    short_side: int = 64
    short_batch: int = 32
    fold_clips: int = 512
    # Text encoder
    text_dim: int = 256
    text_ffn: int = 512
    text_layers: int = 2
    text_heads: int = 4
    # Transformer
    dim: int = 256
    ffn_dim: int = 512
    layers: int = 5
    teacher_batch: int = 256
    student_batch: int = 256
    dmd_batch: int = 128
    # Data and sampling
    bank_clips: int = 80_000
    text_batch: int = 256
    chunk: int = 32  # clips that go through the VAE together
    teacher_steps: int = 48  # a multiple of four: the student's sigmas lie on its path
    path_batch: int = 128  # doubled by guidance; then it is the student's, and compiles once
    exam_clips: int = 256

    def transformer(self, takes_image: bool) -> WanConfig:
        return WanConfig(
            dim=self.dim,
            ffn_dim=self.ffn_dim,
            num_layers=self.layers,
            in_dim=36 if takes_image else 16,
            text_dim=self.text_dim,
        )

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """C T H W."""
        return (16, (self.frames - 1) // 4 + 1, self.side // 8, self.side // 8)


DEMO = Sizes()
SMOKE = Sizes(
    side=32,
    frames=5,
    vae_dim=4,
    vae_batch=2,
    short_frames=5,
    short_side=16,
    short_batch=2,
    fold_clips=8,
    text_dim=64,
    text_ffn=64,
    text_layers=1,
    text_heads=1,
    dim=128,
    ffn_dim=256,
    layers=2,
    teacher_batch=4,
    text_batch=8,
    student_batch=4,
    dmd_batch=4,
    bank_clips=8,
    chunk=4,
    teacher_steps=4,
    path_batch=4,
    exam_clips=4,
)
