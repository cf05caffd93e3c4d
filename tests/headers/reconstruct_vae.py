"""Headers of published VAEs, put together from the code that reads them. No file was at hand.

Wan2.1_VAE and lightvaew2_1: what ModelTC/LightX2V at f8aee98b registers in
lightx2v/models/video_encoders/hf/wan/vae.py (RMS_norm 64, Resample 87, ResidualBlock 202,
AttentionBlock 243, Encoder3d 282, Decoder3d 386, WanVAE_ 502; pruning 294, 398 and 911).
taew2_1: madebyollin/taehv at 1f14a56, taehv.py:21 (MemBlock), 42 (TPool), 51 (TGrow), 210-217
(encoder), 228-234 (decoder). lighttaew2_1: the same layers, ModelTC/LightX2V at f8aee98b,
lightx2v/models/video_encoders/hf/tae.py:188-234, read strictly. Independent of our own modules.
"""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]

# name: (pruning rate, tensors)
WAN_VAES = {"wan_2.1_vae": (0.0, 194), "lightvaew2_1": (0.75, 194)}
TINY_TENSORS = 128


def wan_vae(pruning_rate: float = 0.0) -> Shapes:
    """Official name -> shape."""
    shapes: Shapes = {}
    widths = [int(96 * multiple * (1 - pruning_rate)) for multiple in (1, 1, 2, 4, 4)]
    _half(shapes, "encoder", 3, widths, 32, blocks=2)
    _half(shapes, "decoder", 16, [widths[-1], *widths[:0:-1]], 3, blocks=3)
    _conv(shapes, "conv1", 32, 32, (1, 1, 1))
    _conv(shapes, "conv2", 16, 16, (1, 1, 1))
    return shapes


def _half(
    shapes: Shapes, half: str, in_dim: int, widths: list[int], out_dim: int, blocks: int
) -> None:
    encodes = half == "encoder"
    _conv(shapes, f"{half}.conv1", in_dim, widths[0], (3, 3, 3))
    place = 0
    for level in range(4):
        before, width = widths[level], widths[level + 1]
        if not encodes and level:
            before //= 2
        stem = f"{half}.{'down' if encodes else 'up'}samples"
        for _ in range(blocks):
            _residual(shapes, f"{stem}.{place}", before, width)
            before, place = width, place + 1
        if level < 3:
            _conv(shapes, f"{stem}.{place}.resample.1", width, width if encodes else width // 2)
            if encodes and level > 0:
                _conv(shapes, f"{stem}.{place}.time_conv", width, width, (3, 1, 1))
            if not encodes and level < 2:
                _conv(shapes, f"{stem}.{place}.time_conv", width, 2 * width, (3, 1, 1))
            place += 1
    middle = widths[-1] if encodes else widths[0]
    for index in (0, 2):
        _residual(shapes, f"{half}.middle.{index}", middle, middle)
    shapes[f"{half}.middle.1.norm.gamma"] = (middle, 1, 1)
    _conv(shapes, f"{half}.middle.1.to_qkv", middle, 3 * middle, (1, 1))
    _conv(shapes, f"{half}.middle.1.proj", middle, middle, (1, 1))
    shapes[f"{half}.head.0.gamma"] = (widths[-1], 1, 1, 1)
    _conv(shapes, f"{half}.head.2", widths[-1], out_dim, (3, 3, 3))


def _residual(shapes: Shapes, stem: str, in_dim: int, out_dim: int) -> None:
    shapes[f"{stem}.residual.0.gamma"] = (in_dim, 1, 1, 1)
    _conv(shapes, f"{stem}.residual.2", in_dim, out_dim, (3, 3, 3))
    shapes[f"{stem}.residual.3.gamma"] = (out_dim, 1, 1, 1)
    _conv(shapes, f"{stem}.residual.6", out_dim, out_dim, (3, 3, 3))
    if in_dim != out_dim:
        _conv(shapes, f"{stem}.shortcut", in_dim, out_dim, (1, 1, 1))


def tiny_vae(latent_channels: int = 16, patch: int = 1, encoder: bool = True) -> Shapes:
    """Name -> shape of a TAEHV file."""
    shapes: Shapes = {}
    if encoder:
        _conv(shapes, "encoder.0", 3 * patch**2, 64)
        for start, frames in ((2, 2), (7, 2), (12, 1)):
            shapes[f"encoder.{start}.conv.weight"] = (64, 64 * frames, 1, 1)
            shapes[f"encoder.{start + 1}.weight"] = (64, 64, 3, 3)
            for index in range(start + 2, start + 5):
                _mem_block(shapes, f"encoder.{index}", 64)
        _conv(shapes, "encoder.17", 64, latent_channels)
    _conv(shapes, "decoder.1", latent_channels, 256)
    for start, width, after, frames in ((3, 256, 128, 1), (9, 128, 64, 2), (15, 64, 64, 2)):
        for index in range(start, start + 3):
            _mem_block(shapes, f"decoder.{index}", width)
        shapes[f"decoder.{start + 4}.conv.weight"] = (width * frames, width, 1, 1)
        shapes[f"decoder.{start + 5}.weight"] = (after, width, 3, 3)
    _conv(shapes, "decoder.22", 64, 3 * patch**2)
    return shapes


def _mem_block(shapes: Shapes, stem: str, width: int) -> None:
    for index, in_dim in ((0, 2 * width), (2, width), (4, width)):
        _conv(shapes, f"{stem}.conv.{index}", in_dim, width)


def _conv(
    shapes: Shapes, stem: str, in_dim: int, out_dim: int, kernel: tuple[int, ...] = (3, 3)
) -> None:
    shapes[f"{stem}.weight"] = (out_dim, in_dim, *kernel)
    shapes[f"{stem}.bias"] = (out_dim,)
