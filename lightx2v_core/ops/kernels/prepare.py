"""What comes before attention, in Triton: RMS norm and rotary in one pass, and 8-bit codes.

Codes are stored head by head, with the number of tokens rounded up to BLOCK (called P below):
q BNPD int8 with a scale for each token, k BNPD int8 less its mean with a scale for each block,
v BND P float8 with a power of two for each block, transposed, and with the tokens of every 16
renumbered as the registers of a product's result are (16a + 8b + 2c + d to 16a + 4c + 2b + d), so
that the attention kernels move no data between lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 128  # tokens that share a scale in k and v
ROW_TOKENS, SUM_TOKENS = 16, 32  # of one program of `rows`, without and with sums
NOTHING, HALF, CODES = 0, 1, 2


@triton.jit
def to_int8(x):
    """Nearest integer; the callers' scales leave nothing beyond 127."""
    return (x + tl.where(x >= 0, 0.5, -0.5)).to(tl.int8)


@triton.jit
def scale_of(largest, is_nan):
    """A scale that is never zero, and not a number where its values are not."""
    scale = tl.maximum(largest, 1e-8) * (1.0 / 127.0)
    return tl.where(is_nan, float("nan"), scale)


@triton.jit
def turned(x, COS, SIN, token, HEADS: tl.constexpr, D: tl.constexpr):
    """Pairs of lanes of one token, HEADS x D, turned by the token's angles."""
    pairs = tl.arange(0, D // 2)
    cos = tl.load(COS + token * (D // 2) + pairs)[None, :]
    sin = tl.load(SIN + token * (D // 2) + pairs)[None, :]
    even, odd = tl.split(tl.reshape(x, (HEADS, D // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (HEADS, D))


@triton.jit(do_not_specialize=["L", "H"])
def rows(
    X,
    W,
    COS,
    SIN,
    Y,
    SCALE,
    SUMS,
    L,
    P,
    H,
    x_b,
    x_l,
    x_h,
    eps,
    log2_scale,
    NORM: tl.constexpr,
    TURN: tl.constexpr,
    OUT: tl.constexpr,
    SUM: tl.constexpr,
    T: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
):
    """T tokens with all their heads: norm, rotary, then half precision (BLND), codes, or nothing.

    SUM adds the float32 sum of the T tokens, B x chunks x N x D.
    """
    chunk = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    heads = tl.arange(0, HEADS)
    lanes = tl.arange(0, D)
    live = (heads < H)[:, None]
    flat = heads[:, None] * D + lanes[None, :]
    w = tl.zeros((HEADS, D), tl.float32)
    if NORM:
        w = tl.load(W + flat, mask=live, other=0.0).to(tl.float32)
    total = tl.zeros((HEADS, D), tl.float32)
    last = tl.minimum(chunk * T + T, L) - 1
    first = batch * x_b + heads[:, None] * x_h + lanes[None, :]
    step = tl.cast(x_l, tl.int64)
    coming = tl.load(X + first + chunk * T * step, mask=live, other=0.0)
    for token in range(chunk * T, last + 1):
        row = batch * L + token
        x = coming.to(tl.float32)
        # The next token is on its way while this one is worked on.
        coming = tl.load(X + first + tl.minimum(token + 1, last) * step, mask=live, other=0.0)
        if NORM:
            mean = tl.sum(tl.sum(x * x, 1), 0) / (H * D)
            x = x * tl.rsqrt(mean + eps) * w
        if TURN:
            x = turned(x, COS, SIN, token, HEADS, D)
        if OUT == 1:
            at = row * H * D + flat
            tl.store(Y + at, x.to(Y.dtype.element_ty), mask=live)
            x = x.to(Y.dtype.element_ty).to(tl.float32)
        if OUT == 2:
            is_nan = tl.max((x != x).to(tl.int32), 1) > 0
            scale = scale_of(tl.max(tl.abs(x), 1), is_nan)
            at = (batch * H + heads) * P + token
            tl.store(SCALE + at, scale * log2_scale, mask=heads < H)
            codes = to_int8(x * (1.0 / scale)[:, None])
            tl.store(Y + at[:, None] * D + lanes[None, :], codes, mask=live)
        if SUM:
            total += x
    if SUM:
        at = (batch * tl.num_programs(0) + chunk) * H * D + flat
        tl.store(SUMS + at, total, mask=live)


@triton.jit(do_not_specialize=["L", "H"])
def keys(X, MEAN, Y, SCALE, L, P, H, x_b, x_l, x_h, T: tl.constexpr, D: tl.constexpr):
    """One block of T tokens of one head: less the mean, over its largest value, int8."""
    block = tl.program_id(0)
    one = tl.program_id(1).to(tl.int64)  # batch and head
    lanes = tl.arange(0, D)
    token = block * T + tl.arange(0, T)
    real = (token < L)[:, None]
    at = (one // H) * x_b + token[:, None].to(tl.int64) * x_l + (one % H) * x_h + lanes[None, :]
    x = tl.load(X + at, mask=real, other=0.0).to(tl.float32)
    x = tl.where(real, x - tl.load(MEAN + one * D + lanes)[None, :], 0.0)
    is_nan = tl.max(tl.max((x != x).to(tl.int32), 1), 0) > 0
    scale = scale_of(tl.max(tl.max(tl.abs(x), 1), 0), is_nan)
    tl.store(Y + (one * P + token)[:, None] * D + lanes[None, :], to_int8(x * (1.0 / scale)))
    tl.store(SCALE + one * (P // T) + block, scale)


@triton.jit(do_not_specialize=["L", "H"])
def values(X, Y, EXPONENT, L, P, H, x_b, x_l, x_h, T: tl.constexpr, D: tl.constexpr):
    """One block of T tokens of one head: over a power of two, float8, transposed, renumbered.

    float8 keeps its relative precision over 15 powers of two, so that one scale serves all lanes.
    """
    block = tl.program_id(0)
    one = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, D)
    token = block * T + tl.arange(0, T)
    at = (one // H) * x_b + token[:, None].to(tl.int64) * x_l + (one % H) * x_h + lanes[None, :]
    x = tl.load(X + at, mask=(token < L)[:, None], other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.abs(x), 1), 0)
    # Under 2^-32 values are nothing beside any other block's; the floor keeps ratios finite.
    exponent = tl.ceil(tl.log2(tl.maximum(largest, 2.0**-32) * (1.0 / 448.0)))
    codes = tl.trans((x * tl.exp2(-exponent)).to(tl.float8e4nv))
    codes = tl.reshape(codes, (D, T // 16, 2, 4, 2))
    codes = tl.reshape(tl.permute(codes, (0, 1, 3, 2, 4)), (D, T))
    at = (one * D + lanes)[:, None] * P + (block * T + tl.arange(0, T))[None, :]
    tl.store(Y + at, codes)
    tl.store(EXPONENT + one * (P // T) + block, exponent)
