"""The layers of the Wan 2.1 VAE. Attribute names are the official checkpoint keys.

Every layer that looks back in time takes a `Stream`, which holds the past of one call; the
modules themselves remember nothing. However a clip is cut into chunks, the result is the same.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RES_BLOCKS = 2  # per level of the encoder; the decoder has one more
ENCODER_WIDTHS = (1, 1, 2, 4, 4)  # the first convolution and the levels, in multiples of dim
DECODER_WIDTHS = (4, 4, 4, 2, 1)
PAST = 2  # frames a causal convolution with a kernel of 3 looks back


class Stream:
    """What one encode or decode remembers between chunks: the last frames each layer saw."""

    def __init__(self) -> None:
        self._past: dict[nn.Module, Tensor] = {}
        self._begun: set[nn.Module] = set()

    def begins(self, layer: nn.Module) -> bool:
        """Whether `layer`, which asks once a chunk, is at the first frame of the clip."""
        begins = layer not in self._begun
        self._begun.add(layer)
        return begins

    def past(self, layer: nn.Module) -> Tensor | None:
        return self._past.get(layer)

    def set_past(self, layer: nn.Module, past: Tensor) -> None:
        """Memory of one's own, in whatever order of axes; the caller writes into it later."""
        self._past[layer] = past

    def keep(self, layer: nn.Module, x_BCTHW: Tensor, frames: int) -> None:
        """Remember the last `frames` frames; a copy, since a view would hold the whole chunk."""
        self._past[layer] = x_BCTHW[:, :, -frames:].clone()

    def extend(self, layer: nn.Module, x_BCTHW: Tensor, frames: int) -> Tensor:
        """`x` behind the `frames` frames that came before it, zeros before the clip began."""
        past = self._past.get(layer)
        if past is None:
            B, C, _, H, W = x_BCTHW.shape
            past = x_BCTHW.new_zeros(B, C, frames, H, W)
        joined = torch.cat([past, x_BCTHW], dim=2)
        self.keep(layer, joined, frames)
        return joined


class RMSNorm(nn.Module):
    """Unit length over the channels times sqrt(C) and a gain; `axes` follow the channel axis."""

    def __init__(self, dim: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        gain = sum_of_squares(x).clamp_min(1e-24).rsqrt() * math.sqrt(x.shape[1])
        return (x * gain).to(x.dtype) * self.gamma


class CausalConv3d(nn.Conv3d):
    """Kernel 3 in time that sees its frame and the two before; frames in, frames out."""

    def __init__(self, in_dim: int, out_dim: int, spatial: int = 3) -> None:
        super().__init__(
            in_dim, out_dim, (3, spatial, spatial), padding=(0, spatial // 2, spatial // 2)
        )

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        return conv3d(self, stream.extend(self, x_BCTHW, PAST))


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and causal convolution, plus the input."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_dim),
            nn.SiLU(inplace=True),
            CausalConv3d(in_dim, out_dim),
            RMSNorm(out_dim),
            nn.SiLU(inplace=True),
            nn.Identity(),  # dropout in the original, which takes an index in the key names
            CausalConv3d(out_dim, out_dim),
        )
        self.shortcut = nn.Identity() if in_dim == out_dim else nn.Conv3d(in_dim, out_dim, 1)

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        norm1, silu, conv1, norm2, _, _, conv2 = self.residual
        y = conv1(silu(norm1(x_BCTHW)), stream)
        y = conv2(silu(norm2(y)), stream)
        return y.add_(self.shortcut(x_BCTHW))


class AttentionBlock(nn.Module):
    """Single-head attention over the pixels of each frame, plus the input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        B, _, _, H, W = x_BCTHW.shape
        x = frames_as_batch(x_BCTHW)
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (BT)(3C)(HW) -> (BT)(HW)(3C)
        q, k, v = qkv.unsqueeze(1).contiguous().chunk(3, dim=-1)
        o = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        o = o.transpose(1, 2).unflatten(2, (H, W))  # (BT)(HW)C -> (BT)CHW
        return x_BCTHW + batch_as_frames(self.proj(o), B)


class Downsample(nn.Module):
    """Halves height and width; with `halve_time` also the frames after the first."""

    def __init__(self, dim: int, halve_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if halve_time else None

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        x = batch_as_frames(self.resample(frames_as_batch(x_BCTHW)), x_BCTHW.shape[0])
        return x if self.time_conv is None else halve_time(self, self.time_conv, x, stream)


def halve_time(layer: nn.Module, conv: nn.Conv3d, x_BCTHW: Tensor, stream: Stream) -> Tensor:
    """One frame for each two; the clip's first passes as it is and is the past of the first pair.

    A frame without its second waits for the next chunk, so the result may have no frame at all.
    """
    begins, past = stream.begins(layer), stream.past(layer)
    joined = x_BCTHW if past is None else torch.cat([past, x_BCTHW], dim=2)
    used = (joined.shape[2] - 1) // 2 * 2 + 1
    stream.keep(layer, joined, joined.shape[2] - used + 1)
    halved = joined[:, :, :0] if used == 1 else conv3d(conv, joined[:, :, :used])
    return torch.cat([x_BCTHW[:, :, :1], halved], dim=2) if begins else halved


class Upsample(nn.Module):
    """Doubles height and width at half the channels; with `double_time` also later frames."""

    def __init__(self, dim: int, double_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
            nn.Conv2d(dim, dim // 2, 3, padding=1),
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, spatial=1) if double_time else None

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        x = x_BCTHW
        if self.time_conv is not None:
            x = double_time(self.time_conv, x, stream)
        return batch_as_frames(self.resample(frames_as_batch(x)), x.shape[0])


def double_time(time_conv: CausalConv3d, x_BCTHW: Tensor, stream: Stream) -> Tensor:
    """Two frames for each but the first, which stays single and is in no later frame's past."""
    begins = stream.begins(time_conv)
    head, x = (x_BCTHW[:, :, :1], x_BCTHW[:, :, 1:]) if begins else (None, x_BCTHW)
    if x.shape[2] == 0:
        return x_BCTHW
    pairs = time_conv(x, stream).unflatten(1, (2, x.shape[1]))
    doubled = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # B2CTHW -> BC(T2)HW
    return doubled if head is None else torch.cat([head, doubled], dim=2)


class Stage(NamedTuple):
    """Layers of one size of frames: `level` 0 is that of the pixels, each next one half as wide.

    `frames` come in for each latent frame.
    """

    layers: tuple[nn.Module, ...]
    level: int
    frames: int


class Encoder(nn.Module):
    """Pixels BCFHW to mean and log variance (2 * z_dim channels) before the closing 1x1x1."""

    def __init__(self, dim: int, z_dim: int) -> None:
        super().__init__()
        widths = [dim * width for width in ENCODER_WIDTHS]
        layers: list[nn.Module] = []
        for level, (in_dim, out_dim) in enumerate(pairwise(widths)):
            layers += _residual_blocks(in_dim, out_dim, RES_BLOCKS)
            if level < 3:
                layers.append(Downsample(out_dim, halve_time=level > 0))
        self.conv1 = CausalConv3d(3, widths[0])
        self.downsamples = nn.ModuleList(layers)
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], 2 * z_dim)

    def forward(self, x_BCFHW: Tensor, stream: Stream) -> Tensor:
        return run_layers((self.conv1, *self.downsamples, *self.middle, self.head), x_BCFHW, stream)

    def stages(self) -> list[Stage]:
        """From pixels to latents; each but the last ends with its downsampling."""
        ends = [i + 1 for i, layer in enumerate(self.downsamples) if isinstance(layer, Downsample)]
        parts = [tuple(self.downsamples[a:b]) for a, b in pairwise([0, *ends, None])]
        parts[0] = (self.conv1, *parts[0])
        parts[-1] = (*parts[-1], *self.middle, self.head)
        return [Stage(part, level, (4, 4, 2, 1)[level]) for level, part in enumerate(parts)]


class Decoder(nn.Module):
    """Latent BCTHW, after the opening 1x1x1, to pixels BCFHW that are not clamped."""

    def __init__(self, dim: int, z_dim: int) -> None:
        super().__init__()
        widths = [dim * width for width in DECODER_WIDTHS]
        layers: list[nn.Module] = []
        for level, (in_dim, out_dim) in enumerate(pairwise(widths)):
            # An upsampling before this level has halved the channels already.
            layers += _residual_blocks(in_dim // 2 if level else in_dim, out_dim, RES_BLOCKS + 1)
            if level < 3:
                layers.append(Upsample(out_dim, double_time=level < 2))
        self.conv1 = CausalConv3d(z_dim, widths[0])
        self.middle = _middle(widths[0])
        self.upsamples = nn.ModuleList(layers)
        self.head = _head(widths[-1], 3)

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        return run_layers((self.conv1, *self.middle, *self.upsamples, self.head), x_BCTHW, stream)

    def stages(self) -> list[Stage]:
        """From latents to pixels; each but the first begins with its upsampling."""
        starts = [i for i, layer in enumerate(self.upsamples) if isinstance(layer, Upsample)]
        parts = [tuple(self.upsamples[a:b]) for a, b in pairwise([0, *starts, None])]
        parts[0] = (self.conv1, *self.middle, *parts[0])
        parts[-1] = (*parts[-1], self.head)
        return [Stage(part, 3 - i, (1, 1, 2, 4)[i]) for i, part in enumerate(parts)]


def run_layers(layers: tuple[nn.Module, ...], x_BCTHW: Tensor, stream: Stream) -> Tensor:
    """One chunk through layers that take the stream; a Sequential is a head."""
    x = x_BCTHW
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            norm, silu, conv = layer
            x = conv(silu(norm(x)), stream)
        else:
            x = layer(x, stream)
        if x.shape[2] == 0:
            break  # halving the frames left one to wait for the next chunk
    return x


def lookback(layer: nn.Module) -> int:
    """How many frames of its input, beside the present one, an output frame depends on at most."""
    if isinstance(layer, Downsample):
        return 0 if layer.time_conv is None else 2
    return PAST * sum(isinstance(module, CausalConv3d) for module in layer.modules())


def frames_as_batch(x_BCTHW: Tensor) -> Tensor:
    """BCTHW -> (BT)CHW"""
    return x_BCTHW.transpose(1, 2).flatten(0, 1)


def batch_as_frames(x_NCHW: Tensor, batch: int) -> Tensor:
    """(BT)CHW -> BCTHW"""
    return x_NCHW.unflatten(0, (batch, -1)).transpose(1, 2)


def sum_of_squares(x: Tensor) -> Tensor:
    """Over the channels, in float32."""
    if x.is_cuda:
        # Without a float32 copy of x; on a CPU this reduction is thirty times slower.
        return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).square()
    return x.float().square().sum(dim=1, keepdim=True)


def conv3d(conv: nn.Conv3d, x_BCTHW: Tensor) -> Tensor:
    """`conv(x)` on the fast kernel.

    PyTorch gives a single small float32 clip on a CPU to a loop ten times slower than oneDNN, and
    its measure of small leaves out the width.
    """
    if x_BCTHW.device.type == "cpu" and x_BCTHW.dtype == torch.float32 and has_onednn():
        assert not isinstance(conv.padding, str), "paddings are numbers in this file"
        sizes = (conv.padding, conv.stride, conv.dilation)
        return torch.mkldnn_convolution(x_BCTHW, conv.weight, conv.bias, *sizes, conv.groups)
    return F.conv3d(x_BCTHW, conv.weight, conv.bias, conv.stride, conv.padding)


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _residual_blocks(in_dim: int, out_dim: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(out_dim if i else in_dim, out_dim) for i in range(count)]


def _middle(dim: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim)])


def _head(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(RMSNorm(dim), nn.SiLU(inplace=True), CausalConv3d(dim, out_dim))
