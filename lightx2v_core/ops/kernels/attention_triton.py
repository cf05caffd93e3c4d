"""8-bit attention in plain Triton, for the cards that our Hopper kernel does not run on.

Q K^T of int8 codes, softmax in float32, P V in float8 or in the dtype of V. An online softmax over
blocks of keys: https://arxiv.org/abs/2205.14135
"""

from __future__ import annotations

import triton
import triton.language as tl

# log2 of what P is multiplied by before it becomes float8: a row's largest is 2^8.75 = 430 of 448.
P_LOG2 = tl.constexpr(8.75)


@triton.jit
def renumbered(p, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """The columns of P as the tokens of V are numbered; see prepare.py."""
    p = tl.permute(tl.reshape(p, (ROWS, KEYS // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(p, (ROWS, KEYS))


@triton.jit(do_not_specialize=["L", "H"])
def attend(
    Q,
    K,
    V,
    Q_SCALE,
    K_SCALE,
    EXPONENT,
    Y,
    L,
    P,
    H,
    v_b,
    v_l,
    v_h,
    y_b,
    y_l,
    y_h,
    COPIES: tl.constexpr,
    WIDE_V: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """ROWS queries of one head. WIDE_V: V is BNLD in half precision, by strides.

    COPIES: the codes K and V come as descriptors for the copy engine, else as pointers.
    """
    one = tl.program_id(1).to(tl.int64)  # batch and head
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, D)
    q = tl.load(Q + (one * P + rows)[:, None] * D + lanes[None, :])
    q_scale = tl.load(Q_SCALE + one * P + rows)
    largest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    exponent = 0.0
    if not WIDE_V:
        exponent = tl.load(EXPONENT + one * (P // BLOCK))
    for first in tl.range(0, L, KEYS, num_stages=STAGES):
        token = first + tl.arange(0, KEYS)
        if COPIES:
            k = K.load([(one * P + first).to(tl.int32), 0]).T
        else:
            k = tl.load(K + (one * P + token)[None, :] * D + lanes[:, None])
        block = one * (P // BLOCK) + first // BLOCK
        scale = q_scale * tl.load(K_SCALE + block)
        s = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32)
        if first + KEYS > L:
            s = tl.where((token < L)[None, :], s, -float("inf"))
        s = s * scale[:, None]
        above = tl.maximum(largest, tl.max(s, 1))
        shrink = tl.exp2(largest - above)
        largest = above
        if WIDE_V:
            at = (one // H) * v_b + token[:, None].to(tl.int64) * v_l + (one % H) * v_h
            v = tl.load(V + at + lanes[None, :], mask=(token < L)[:, None], other=0.0)
            p = tl.exp2(s - above[:, None])
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        else:
            if COPIES:
                v = V.load([(one * D).to(tl.int32), first]).T
            else:
                v = tl.load(V + (one * D + lanes)[None, :] * P + token[:, None])
            p = tl.exp2(s - (above - P_LOG2)[:, None])
            total = total * shrink + tl.sum(p, 1)
            p = renumbered(p.to(tl.float8e4nv), ROWS, KEYS)
            here = tl.load(EXPONENT + block)
            # A fresh sum for each block: Hopper adds float8 products in few bits.
            acc = acc * (shrink * tl.exp2(exponent - here))[:, None] + tl.dot(p, v)
            exponent = here
    o = acc * (tl.exp2(exponent) / total)[:, None]
    at = (one // H) * y_b + rows[:, None].to(tl.int64) * y_l + (one % H) * y_h + lanes[None, :]
    tl.store(Y + at, o.to(Y.dtype.element_ty), mask=(rows < L)[:, None])
