"""The layers of the VAE as a tensor-core card runs them best: the same sums in another order.

Activations stay channels-last, BTHWC, from end to end; only views cross the border as BCTHW. A
convolution reads a buffer whose first frames are its past; bias, residual, norm and SiLU before it
are one pass that writes straight into that buffer. Without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import Card
from ..ops.channels import Between, Pass
from .vae_layers import (
    PAST,
    AttentionBlock,
    CausalConv3d,
    Downsample,
    ResidualBlock,
    RMSNorm,
    Stream,
    Upsample,
    halve_time,
)

PICTURE = 3  # channels
# What inputs of a 3x3x3 convolution are filled up to with zeros, by their channels: 16-bit tensor
# cores read 8 together, and cuDNN's fast kernels 128 (H200, 480x832: 128 inputs and 96 outputs take
# 1.8 ms where 96 and 96 take 2.7).
FILLED = {PICTURE: 8, 96: 128}
HALVES = (torch.float16, torch.bfloat16)


def blocked_by(card: Card, dtype: torch.dtype) -> str | None:
    """Why the plain layers run instead, in words; None when this way pays."""
    if card.kind != "cuda":
        return f"it was tried on NVIDIA cards only and this is {card.kind}"
    if dtype not in HALVES:
        return f"it is for 16-bit numbers and these are {str(dtype).removeprefix('torch.')}"
    if card.capability < (7, 0):
        return "the card has no tensor cores"
    return None


@dataclass(slots=True, eq=False)
class Ready:
    """The input of `conv` with its past in front, BTHWC, filled by the pass before.

    Whoever takes it holds it alone, so that its memory is free as soon as it was read.
    """

    conv: CausalConv3d
    frames: Tensor | None

    @property
    def body(self) -> Tensor:
        """The frames behind the past."""
        assert self.frames is not None, "filled before it is taken"
        return self.frames[:, PAST:]

    def fill(self, x_BTHWC: Tensor) -> None:
        channels = x_BTHWC.shape[-1]
        self.body[..., :channels] = x_BTHWC
        self.body[..., channels:] = 0.0

    def take(self) -> Tensor:
        frames, self.frames = self.frames, None
        assert frames is not None, "an input is read once"
        return frames


class CardLayers:
    """Runs layers as `run_layers` does. Keeps its own copies of weights, for one call."""

    def __init__(self, between: Pass) -> None:
        self.between = between
        self._weights: dict[nn.Module, Tensor] = {}

    def __call__(self, layers: Sequence[nn.Module], x_BCTHW: Tensor, stream: Stream) -> Tensor:
        x = x_BCTHW.permute(0, 2, 3, 4, 1).contiguous()
        ready: Ready | None = None
        for layer, after in zip(layers, (*layers[1:], None), strict=True):
            if isinstance(layer, ResidualBlock):
                x, ready = self._residual(layer, x, ready, after, stream)
                continue
            if isinstance(layer, Upsample):
                x, ready = self._upsample(layer, x, after, stream)
            elif isinstance(layer, AttentionBlock):
                x, ready = self._attention(layer, x), None
            elif isinstance(layer, Downsample):
                x, ready = self._downsample(layer, x, stream), None
            elif isinstance(layer, CausalConv3d):
                x, ready = self._first(layer, x, after, stream)
            else:
                x = self._head(layer, x, ready, stream)
        return x.permute(0, 4, 1, 2, 3)

    def _first(
        self, conv: CausalConv3d, x: Tensor, after: nn.Module | None, stream: Stream
    ) -> tuple[Tensor, Ready | None]:
        """The opening convolution, whose few channels are filled up with zeros."""
        ready = self._buffer(conv, x, stream)
        ready.fill(x)
        sums = self._convolve(ready, stream)
        return self._finish(sums, conv.bias, None, after, stream)

    def _residual(
        self,
        block: ResidualBlock,
        x: Tensor,
        ready: Ready | None,
        after: nn.Module | None,
        stream: Stream,
    ) -> tuple[Tensor, Ready | None]:
        norm1, conv1 = _norm_and_conv(block.residual[:3])
        norm2, conv2 = _norm_and_conv(block.residual[3:])
        if ready is None:
            ready = self._activate(x, Between(), norm1, conv1, stream)
        between = Between(conv1.bias)
        ready = self._activate(self._convolve(ready, stream), between, norm2, conv2, stream)
        sums = self._convolve(ready, stream)
        short = block.shortcut
        if isinstance(short, nn.Conv3d):
            x = F.linear(x, short.weight.flatten(1), short.bias)
        return self._finish(sums, conv2.bias, x, after, stream)

    def _attention(self, block: AttentionBlock, x: Tensor) -> Tensor:
        B, T, H, W, C = x.shape
        normed, x = torch.empty_like(x), x.flatten(0, 1)
        gain = block.norm.gamma.flatten()
        self.between(x, Between(gain=gain, activated=normed.flatten(0, 1), silu=False))
        qkv = F.linear(normed, block.to_qkv.weight.flatten(1), block.to_qkv.bias)
        q, k, v = qkv.view(B * T, 1, H * W, 3 * C).chunk(3, dim=-1)
        o = F.scaled_dot_product_attention(q, k, v).view(B * T, H, W, C)
        o = F.linear(o, block.proj.weight.flatten(1))
        self.between(o, Between(block.proj.bias, x, o))
        return o.unflatten(0, (B, T))

    def _downsample(self, layer: Downsample, x: Tensor, stream: Stream) -> Tensor:
        B, conv = x.shape[0], _conv2d(layer.resample)
        padded = F.pad(x.flatten(0, 1), (0, 0, 0, 1, 0, 1)).permute(0, 3, 1, 2)
        y = F.conv2d(padded, self._weight(conv), conv.bias, stride=2)
        y = y.unflatten(0, (B, -1)).transpose(1, 2)
        if layer.time_conv is not None:
            y = halve_time(layer, layer.time_conv, y, stream)
        return y.permute(0, 2, 3, 4, 1).contiguous()

    def _upsample(
        self, layer: Upsample, x: Tensor, after: nn.Module | None, stream: Stream
    ) -> tuple[Tensor, Ready | None]:
        """Nearest-neighbour doubling and a 3x3 convolution, as four 2x2 ones on the small frames.

        An output pixel sees 2x2 cells: of the three rows under the kernel two are copies of one.
        """
        if layer.time_conv is not None:
            x = self._double_time(layer.time_conv, x, stream)
        conv = _conv2d(layer.resample)
        small = x.flatten(0, 1).permute(0, 3, 1, 2)
        sums = F.conv2d(small, self._phases(conv), padding=1).permute(0, 2, 3, 1).contiguous()
        return self._finish(
            sums.unflatten(0, x.shape[:2]), conv.bias, None, after, stream, phases=True
        )

    def _double_time(self, conv: CausalConv3d, x: Tensor, stream: Stream) -> Tensor:
        """See `vae_layers.double_time`."""
        begins = stream.begins(conv)
        head, x = (x[:, :1], x[:, 1:]) if begins else (None, x)
        if x.shape[1] == 0:
            assert head is not None, "a chunk has frames"
            return head
        ready = self._buffer(conv, x, stream)
        ready.fill(x)
        pairs = _plus(self._convolve(ready, stream), conv.bias)
        doubled = pairs.unflatten(-1, (2, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
        return doubled.contiguous() if head is None else torch.cat([head, doubled], dim=1)

    def _head(self, head: nn.Module, x: Tensor, ready: Ready | None, stream: Stream) -> Tensor:
        norm, conv = _norm_and_conv(head)
        if ready is None:
            ready = self._activate(x, Between(), norm, conv, stream)
        return _plus(self._convolve(ready, stream)[..., : conv.out_channels], conv.bias)

    def _finish(
        self,
        sums: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        after: nn.Module | None,
        stream: Stream,
        phases: bool = False,
    ) -> tuple[Tensor, Ready | None]:
        """What a layer returns, and the input of the next one's first convolution with it."""
        if phases:
            B, T, H, W, K = sums.shape
            total = sums.new_empty(B, T, 2 * (H - 1), 2 * (W - 1), K // 4)
        else:
            total = sums
        between = Between(bias, residual, total)
        if not isinstance(after, ResidualBlock | nn.Sequential):
            self._pass(sums, between, phases)
            return total, None
        norm, conv = _norm_and_conv(
            after.residual[:3] if isinstance(after, ResidualBlock) else after
        )
        return total, self._activate(sums, between, norm, conv, stream, phases)

    def _activate(
        self,
        sums: Tensor,
        between: Between,
        norm: RMSNorm,
        conv: CausalConv3d,
        stream: Stream,
        phases: bool = False,
    ) -> Ready:
        like = sums if between.total is None else between.total
        ready = self._buffer(conv, like, stream)
        between = between._replace(gain=norm.gamma.flatten(), activated=ready.body)
        self._pass(sums, between, phases)
        return ready

    def _pass(self, sums: Tensor, between: Between, phases: bool) -> None:
        """Clip by clip: in a buffer, the past of the next clip lies between their frames."""
        names = ("residual", "total", "activated")
        for clip, of_clip in enumerate(sums):
            given = {name: getattr(between, name) for name in names}
            own = {name: t[clip] for name, t in given.items() if t is not None}
            self.between(of_clip, between._replace(**own), phases)

    def _buffer(self, conv: CausalConv3d, x: Tensor, stream: Stream) -> Ready:
        """Room for frames of the size of `x` behind the past of `conv`."""
        B, T, H, W, C = x.shape
        frames = x.new_empty(B, T + PAST, H, W, FILLED.get(C, C))
        past = stream.past(conv)
        if past is None:
            frames[:, :PAST] = 0.0
        else:
            frames[:, :PAST] = past
        return Ready(conv, frames)

    def _convolve(self, ready: Ready, stream: Stream) -> Tensor:
        """The sums without bias, BTHWC, of as many channels as the weight was filled up to."""
        conv, frames = ready.conv, ready.take()
        past, last = stream.past(conv), frames[:, -PAST:]
        if past is None:
            stream.set_past(conv, last.clone())
        else:
            past.copy_(last)
        assert not isinstance(conv.padding, str), "paddings are numbers in this file"
        x_BCTHW = frames.permute(0, 4, 1, 2, 3)
        y_BCTHW = F.conv3d(x_BCTHW, self._weight(conv), None, padding=conv.padding)
        return y_BCTHW.permute(0, 2, 3, 4, 1).contiguous()

    def _weight(self, conv: nn.Module) -> Tensor:
        """Channels-last, and few channels filled up with zeros."""
        if conv not in self._weights:
            weight = conv.get_parameter("weight").detach()
            outputs, inputs = weight.shape[:2]
            # Whoever takes a picture drops what is more; other sums stay as wide as they are.
            more = FILLED[PICTURE] - PICTURE if outputs == PICTURE else 0
            if isinstance(conv, CausalConv3d):
                edges = (0, 0) * (weight.ndim - 2)
                weight = F.pad(weight, (*edges, 0, FILLED.get(inputs, inputs) - inputs, 0, more))
            self._weights[conv] = _channels_last(weight)
        return self._weights[conv]

    def _phases(self, conv: nn.Module) -> Tensor:
        """The four 2x2 kernels of `_upsample`, (4 M) K 2 2; added up in float32."""
        if conv not in self._weights:
            weight = conv.get_parameter("weight").detach()
            w = weight.float()
            rows = (
                torch.stack([w[:, :, 0], w[:, :, 1] + w[:, :, 2]], 2),
                torch.stack([w[:, :, 0] + w[:, :, 1], w[:, :, 2]], 2),
            )
            phases = [
                torch.stack(pair, 3)
                for r in rows
                for pair in ((r[..., 0], r[..., 1] + r[..., 2]), (r[..., 0] + r[..., 1], r[..., 2]))
            ]
            self._weights[conv] = _channels_last(torch.cat(phases).to(weight.dtype))
        return self._weights[conv]


def _norm_and_conv(layers: nn.Module) -> tuple[RMSNorm, CausalConv3d]:
    """Of a head, and of either half of a residual block."""
    assert isinstance(layers, nn.Sequential), "layers of this kind lie in a sequence"
    norm, conv = layers[0], layers[-1]
    assert isinstance(norm, RMSNorm), "a norm comes first"
    assert isinstance(conv, CausalConv3d), "a convolution comes last"
    return norm, conv


def _conv2d(resample: nn.Sequential) -> nn.Conv2d:
    conv = resample[1]
    assert isinstance(conv, nn.Conv2d), "padding or doubling, then a convolution"
    return conv


def _plus(sums: Tensor, bias: Tensor | None) -> Tensor:
    return sums if bias is None else sums + bias


def _channels_last(weight: Tensor) -> Tensor:
    last = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
    return weight.contiguous(memory_format=last)
