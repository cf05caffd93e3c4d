"""The Wan 2.1 / 2.2 transformer: noisy video latent, time and text in, velocity out.

Attribute names equal the official checkpoint keys. What stays float32 whatever the compute dtype:
patch and time embedding, modulation, norms, rotary, the residual stream and the head. Matmuls and
attention of the blocks run in ``compute_dtype``.
Wan: https://arxiv.org/abs/2503.20314
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from typing import cast as cast_type

import torch
from einops import rearrange
from torch import Tensor, nn

from .. import ops as default_ops
from ..errors import RequestError
from ..ops import glue
from ..ops.attention import Attend, sdpa
from ..ops.eight_bit import EightBit
from ..ops.glue import ModulatedNorm
from ..ops.layers import cast
from ..ops.norm_rotary import norm_rotate, split_heads
from ..ops.rows import Rows, form_for
from .config import CLIP_DIM, CLIP_TOKENS, FREQ_DIM, HEAD_DIM, PATCH, WanConfig
from .rope import rotary_table

Ops = ModuleType | Any  # anything with Linear, Conv3d, RMSNorm, LayerNorm


@dataclass(frozen=True, slots=True, eq=False)
class BlockInputs:
    """What every block of one forward shares."""

    modulation_B6E: Tensor  # float32
    text_BSE: Tensor
    clip_BSE: Tensor | None
    rotary: tuple[Tensor, Tensor]
    attend: Attend
    dtype: torch.dtype

    def replace(self, **changes: object) -> BlockInputs:
        return replace(self, **changes)


RunBlock = Callable[[int, "WanBlock", Tensor, BlockInputs], Tensor]


def run_block_plainly(_index: int, block: WanBlock, x: Tensor, inputs: BlockInputs) -> Tensor:
    return block(x, inputs)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (ops.Linear(dim, dim) for _ in range(4))
        # Over the full dim, before the heads are split.
        self.norm_q, self.norm_k = (ops.RMSNorm(dim, eps=eps) for _ in range(2))

    def forward(self, x: Tensor | Rows, inputs: BlockInputs) -> Tensor:
        attend, rotary = inputs.attend, inputs.rotary
        q = self.q(x)
        if isinstance(attend, EightBit) and attend.fuses(q, self.norm_q, self.norm_k):
            q_codes = attend.queries(q, self.norm_q, rotary)
            del q
            k_codes = attend.keys(self.k(x), self.norm_k, rotary)
            v_codes = attend.values(split_heads(self.v(x)))
            return self.o(attend.attend(q_codes, k_codes, v_codes, x))
        q = norm_rotate(q, self.norm_q, rotary)
        k = norm_rotate(self.k(x), self.norm_k, rotary)
        v = split_heads(self.v(x))
        # BLND -> BNLD -> BLE
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o(y.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Text attention; with a CLIP branch, image attention by the same query is added before o.

    Keys and values of text and picture are the same in every step, and made again all the same: of
    a 14B forward they are 0.2 %, and keeping them takes 0.63 GB.
    """

    def __init__(self, dim: int, eps: float, takes_clip: bool, ops: Ops) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (ops.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (ops.RMSNorm(dim, eps=eps) for _ in range(2))
        if takes_clip:
            self.k_img, self.v_img = (ops.Linear(dim, dim) for _ in range(2))
            self.norm_k_img = ops.RMSNorm(dim, eps=eps)

    def forward(self, x: Tensor | Rows, inputs: BlockInputs) -> Tensor:
        q = norm_rotate(self.q(x), self.norm_q, None).transpose(1, 2)  # BLND -> BNLD
        text = inputs.text_BSE
        y = self._attend(q, norm_rotate(self.k(text), self.norm_k, None), self.v(text), inputs)
        if inputs.clip_BSE is not None:
            clip = inputs.clip_BSE
            k = norm_rotate(self.k_img(clip), self.norm_k_img, None)
            more = self._attend(q, k, self.v_img(clip), inputs)
            return self.o(glue.total(y, more, form_for((self.o,), inputs.dtype)))
        return self.o(y)

    def _attend(self, q_BNLD: Tensor, k_BLND: Tensor, v: Tensor, inputs: BlockInputs) -> Tensor:
        k, v = k_BLND.transpose(1, 2), split_heads(v).transpose(1, 2)
        return inputs.attend(q_BNLD, k, v).transpose(1, 2).flatten(2)  # BNLD -> BLE


def starting_modulation(count: int, dim: int) -> nn.Parameter:
    """1 count E, as training starts; empty on ``meta``, where drawing makes PyTorch import its
    compiler first (seconds)."""
    empty = torch.empty(1, count, dim)
    return nn.Parameter(empty if empty.is_meta else torch.randn(1, count, dim) / dim**0.5)


class WanBlock(nn.Module):
    def __init__(self, config: WanConfig, ops: Ops) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.self_attn = SelfAttention(dim, config.eps, ops)
        self.norm3 = ops.LayerNorm(dim, eps=config.eps)
        self.cross_attn = CrossAttention(dim, config.eps, config.clip_tokens > 0, ops)
        self.ffn = nn.Sequential(
            ops.Linear(dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            ops.Linear(config.ffn_dim, dim),
        )
        self.modulation = starting_modulation(6, dim)

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """x BLE float32 -> BLE float32."""
        modulation = cast(self.modulation, x) + inputs.modulation_B6E
        # Order in the checkpoint: shift, scale, gate of attention, then the same of the FFN.
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = modulation.chunk(6, dim=1)
        attention, cross, (rise, _, fall) = self.self_attn, self.cross_attn, self.ffn
        dtype = inputs.dtype

        how = ModulatedNorm(shift_sa, scale_sa, self.eps)
        y = glue.norm(x, how, form_for((attention.q, attention.k, attention.v), dtype))
        y = attention(y, inputs)
        x, y = glue.add_norm(x, y, gate_sa, self.norm3, form_for((cross.q,), dtype))
        y = cross(y, inputs)
        # From here on x is this block's own, so that kernels may write over it.
        how = ModulatedNorm(shift_ffn, scale_ffn, self.eps)
        x, y = glue.add_norm(x, y, None, how, form_for((rise,), dtype), in_place=True)
        y = glue.gelu_of(rise, y, form_for((fall,), dtype))
        return glue.add(x, fall(y), gate_ffn, in_place=True)


class Head(nn.Module):
    def __init__(self, config: WanConfig, ops: Ops) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = ops.Linear(config.dim, config.out_dim * math.prod(PATCH))
        self.modulation = starting_modulation(2, config.dim)

    def forward(self, x: Tensor, embedding_BE: Tensor) -> Tensor:
        modulation = cast(self.modulation, x) + embedding_BE[:, None]
        shift, scale = modulation.chunk(2, dim=1)
        return self.head(ModulatedNorm(shift, scale, self.eps)(x))


class ImageEmbedding(nn.Module):
    """CLIP features to model dim. First + last frame come as 514 tokens with learned positions."""

    def __init__(self, config: WanConfig, ops: Ops) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            ops.LayerNorm(CLIP_DIM, eps=1e-5),
            ops.Linear(CLIP_DIM, CLIP_DIM),
            nn.GELU(),
            ops.Linear(CLIP_DIM, config.dim),
            ops.LayerNorm(config.dim, eps=1e-5),
        )
        if config.clip_tokens == 2 * CLIP_TOKENS:
            self.emb_pos = nn.Parameter(torch.zeros(1, 2 * CLIP_TOKENS, CLIP_DIM))

    def forward(self, clip_BSE: Tensor) -> Tensor:
        if hasattr(self, "emb_pos"):
            clip_BSE = clip_BSE + cast(self.emb_pos, clip_BSE)
        return self.proj(clip_BSE)


class WanModel(nn.Module):
    """See the module docstring. `ops` is a namespace with Linear, Conv3d, RMSNorm, LayerNorm."""

    compute_dtype: torch.dtype = torch.float32
    attend: Attend = staticmethod(sdpa)
    run_block: RunBlock = staticmethod(run_block_plainly)

    def __init__(self, config: WanConfig, ops: Ops = default_ops) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = ops.Conv3d(config.in_dim, dim, kernel_size=PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(
            ops.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), ops.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            ops.Linear(FREQ_DIM, dim), nn.SiLU(), ops.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), ops.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanBlock(config, ops) for _ in range(config.num_layers))
        self.head = Head(config, ops)
        if config.clip_tokens:
            self.img_emb = ImageEmbedding(config, ops)

    def forward(
        self,
        x_BCTHW: Tensor,
        timestep_B: Tensor,
        text_BSE: Tensor,
        clip_BSE: Tensor | None = None,
        *,
        run_block: RunBlock | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """Velocity, B out_dim T H W float32.

        x_BCTHW: in_dim channels (noise, then 4 mask and 16 latent channels for image models), H and
        W even. timestep_B: floats in 0..1000. text_BSE: 512 positions, zero-padded, all attended.
        clip_BSE: config.clip_tokens x 1280 for models with a CLIP branch; None skips the branch.
        `run_block` and `attend` stand in for the model's own for this call.
        """
        self._check(x_BCTHW, text_BSE, clip_BSE)
        run_block, dtype = run_block or self.run_block, self.compute_dtype
        x = self.patch_embedding(x_BCTHW.float())
        grid = (x.shape[2], x.shape[3], x.shape[4])
        x = x.flatten(2).transpose(1, 2)  # BEthw -> BLE
        embedding = self.time_embedding(sinusoid(timestep_B, FREQ_DIM).to(x))
        inputs = BlockInputs(
            modulation_B6E=self.time_projection(embedding).unflatten(1, (6, -1)),
            text_BSE=self.text_embedding(text_BSE.to(dtype)),
            clip_BSE=None if clip_BSE is None else self.img_emb(clip_BSE.to(dtype)),
            rotary=rotary_table(grid, HEAD_DIM, x.device),
            attend=attend or self.attend,
            dtype=dtype,
        )
        for index, block in enumerate(self.blocks):
            x = run_block(index, cast_type("WanBlock", block), x, inputs)
        return unpatchify(self.head(x, embedding), grid)

    def _check(self, x: Tensor, text: Tensor, clip: Tensor | None) -> None:
        config = self.config
        if x.shape[1] != config.in_dim:
            raise RequestError(
                f"this model takes {config.in_dim} input channels and got {x.shape[1]}; "
                f"{channels_advice(config, x.shape[1])}"
            )
        if x.shape[3] % PATCH[1] or x.shape[4] % PATCH[2]:
            raise RequestError(
                f"latent {x.shape[3]}x{x.shape[4]} has an odd side; "
                "use a width and height divisible by 16"
            )
        if text.shape[-1] != config.text_dim:
            raise RequestError(
                f"text states are {text.shape[-1]} wide and this model needs {config.text_dim}; "
                "encode the prompt with the umt5 text encoder that belongs to it"
            )
        if clip is not None and clip.shape[1] != config.clip_tokens:
            raise RequestError(
                f"{clip.shape[1]} CLIP tokens given and this model takes {config.clip_tokens}; "
                "257 is one image, 514 a first and a last one, 0 a model without CLIP branch"
            )


def channels_advice(config: WanConfig, given: int) -> str:
    """What to do about `given` input channels on a model that takes another number."""
    if not config.takes_image and given > config.in_dim:
        return "it is a text-to-video model: load an image-to-video model or remove the start image"
    if config.takes_image and given < config.in_dim:
        return "it is an image-to-video model: give it a start image"
    return "the conditioning belongs to another kind of Wan model"


def sinusoid(position_B: Tensor, dim: int) -> Tensor:
    """B x dim float64: cosines, then sines, of position * 10000^(-i / half)."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=position_B.device) / half
    angle = torch.outer(position_B.double(), 10000.0**-exponent)
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def unpatchify(x_BLE: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """B (t h w) (1 2 2 C) -> B C T H W."""
    t, h, w = grid
    (i, j, k) = PATCH
    return rearrange(
        x_BLE,
        "b (t h w) (i j k c) -> b c (t i) (h j) (w k)",
        **{"t": t, "h": h, "w": w, "i": i, "j": j, "k": k},
    )
