"""8-bit attention for Hopper in Gluon, which is part of Triton 3.6 and experimental there.

A program takes 192 queries of one head: three warpgroups of 64 rows each, and one warp that copies
keys and values through rings of shared memory. For each block of keys: int8 Q K^T, running
maximum, P as float8 straight into the registers of P V (prepare.py numbers the tokens of V so that
nothing moves between lanes), a fresh sum P V added in float32, since Hopper adds float8 products
in about 14 bits, and the sum of each row as one more product with ones. A warpgroup does one thing
after the other; the products of the two others run meanwhile.

The last block is filled up with keys of zeros. They weigh nothing: their values are zeros, and the
ones of the sums are zeros there. Nor do they hide the others: keys have had their mean taken off,
so that a query's scores average to zero, and no padding lies above the largest.

CODE_EXP writes the float8 code of P without the exponential unit: the code of p is close to
8 (log2 p + 7), its mantissa taken as linear (Schraudolph, "A Fast, Compact Approximation of the
Exponential Function", 1999), and the running maximum stays on a grid of 1/8 so that offsets are
whole. A row's scores must lie within 4,096 powers of two of each other, as those of normalised
queries and keys do.

With it nothing is converted from int32 either: the sums of Q K^T start from the bits of 1.5 * 2^23,
so that their bits are those of a float32, that constant more than the sum (of 128 products of 127
by 127 at most). The constant comes off again in the sum that makes the code; scales are rounded to
whole multiples of 2^-22, 1.5e-4 of a usual one, so that what comes off is whole too.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_parts import along, arrived, barriers, exp2, fetch, store

ROWS = 64  # of one warpgroup
QUERIES = 3 * ROWS  # of one program
STAGES = 3
GROUPS = gl.constexpr(3)

# log2 of what P is multiplied by before it becomes float8: a row's largest is 2^8.75 = 430 of 448.
P_LOG2 = gl.constexpr(8.75)
# 1.5 * 2^23, which leaves a whole number in the low bits, plus the code of 2^8.75: 8 * (8.75 + 7).
CODE_OFFSET = gl.constexpr(12582912.0 + 126.0)
SHIFT, SHIFT_BITS = gl.constexpr(12582912.0), gl.constexpr(0x4B400000)  # 1.5 * 2^23


@gluon.jit
def largest_of(s, KEYS: gl.constexpr):
    """Of each row: first what lies in one lane, as two chains, which int32 does three at a time."""
    pairs = gl.max(gl.reshape(s, (64, KEYS // 8, 8)), 1)
    return gl.convert_layout(
        gl.max(pairs, 1), gl.SliceLayout(1, s.type.layout), assert_trivial=True
    )


@gluon.jit
def softmax_step(s, scale, largest, CODE_EXP: gl.constexpr, KEYS: gl.constexpr):
    """P before it is packed, the new maximum in powers of two, the factor of what is summed."""
    top = largest_of(s, KEYS)
    if CODE_EXP:
        eighth = (8.0 * scale + 3.0) - 3.0  # a multiple of 2^-22: of the numbers from 2 to 4
        top = (top.to(gl.float32, bitcast=True) - SHIFT) * (0.125 * eighth)
        above = 0.125 * gl.inline_asm_elementwise(
            "cvt.rpi.f32.f32 $0, $1;",
            "=f,f",
            [8.0 * gl.maximum(largest, top)],
            gl.float32,
            is_pure=True,
            pack=1,
        )
        offset = (CODE_OFFSET - 8.0 * above) - SHIFT * eighth
        p = s.to(gl.float32, bitcast=True) * eighth[:, None] + offset[:, None]
    else:
        above = gl.maximum(largest, top.to(gl.float32) * scale)
        p = exp2(s.to(gl.float32) * scale[:, None] - (above - P_LOG2)[:, None])
    return p, above, exp2(largest - above)


@gluon.jit
def packed(p, LAYOUT: gl.constexpr, CODE_EXP: gl.constexpr, KEYS: gl.constexpr):
    """P as float8 in the registers of the first operand; only the columns' names change."""
    p = gl.permute(gl.reshape(p, (64, KEYS // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    p = gl.convert_layout(gl.reshape(p, (64, KEYS)), LAYOUT, assert_trivial=True)
    if CODE_EXP:  # the low 16 bits hold the code, less than nothing where P vanishes
        codes = gl.inline_asm_elementwise(
            "{.reg .b32 a, b; prmt.b32 a, $1, $2, 0x5410; prmt.b32 b, $3, $4, 0x5410;"
            " max.s16x2 a, a, $5; max.s16x2 b, b, $5; prmt.b32 $0, a, b, 0x6420;}",
            "=r,r,r,r,r,r,r,r,r",
            [p.to(gl.int32, bitcast=True), gl.zeros_like(p).to(gl.int32)],
            dtype=gl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        codes = gl.inline_asm_elementwise(
            "{.reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1;"
            " cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; mov.b32 $0, {a, b};}",
            "=r,f,f,f,f",
            [p],
            dtype=gl.int8,
            is_pure=True,
            pack=4,
        )
    return codes.to(gl.float8e4nv, bitcast=True)


@gluon.jit
def scores(q, ring, ready, empty, i, start, RING: gl.constexpr, ADD: gl.constexpr):
    """Q K^T with the i-th block of keys, on top of `start` where ADD."""
    arrived(ready, i, RING)
    k = ring.index(i % RING).permute((1, 0))
    s = warpgroup_mma(q, k, start, use_acc=ADD, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    mbarrier.arrive(empty.index(i % RING))
    return s


@gluon.jit
def p_v(p, ring, ready, empty, i, ones, no_o, no_sum, SUM_LAYOUT: gl.constexpr, RING: gl.constexpr):
    """P V with the i-th block of values, and the sums of the rows of P."""
    arrived(ready, i, RING)
    v = ring.index(i % RING).permute((1, 0))
    o = warpgroup_mma(p, v, no_o, use_acc=False, is_async=True)
    p = gl.convert_layout(p, gl.DotOperandLayout(0, SUM_LAYOUT, 4), assert_trivial=True)
    total = warpgroup_mma(p, ones.permute((1, 0)), no_sum, use_acc=False, is_async=True)
    o, total = warpgroup_mma_wait(0, [o, total])
    mbarrier.arrive(empty.index(i % RING))
    return o, total


@gluon.jit
def consume(
    GROUP: gl.constexpr,
    shared,
    ready,
    scales,
    out,
    L,
    P,
    KEYS: gl.constexpr,
    D: gl.constexpr,
    RING: gl.constexpr,
    CODE_EXP: gl.constexpr,
):
    """What one warpgroup does: 64 rows against all keys."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    SUM_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 4)
    q_ring, k_ring, v_ring, ones = shared
    q_ready, k_ready, k_empty, v_ready, v_empty = ready
    Q_SCALE, K_SCALE, EXPONENT = scales
    one = gl.program_id(1)  # batch and head
    first_row = (gl.program_id(0) * GROUPS + GROUP) * 64
    rows = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT))
    q_scale = gl.load(Q_SCALE + one * P + rows, mask=rows < P, other=0.0)
    blocks = (L + KEYS - 1) // KEYS
    K_SCALE += one * (P // KEYS)
    EXPONENT += one * (P // KEYS)
    unit = gl.load(EXPONENT)  # what o is counted in
    start = gl.full((64, KEYS), SHIFT_BITS if CODE_EXP else 0, gl.int32, S_LAYOUT)
    no_o = gl.full((64, D), 0.0, gl.float32, O_LAYOUT)
    no_sum = gl.full((64, 8), 0.0, gl.float32, SUM_LAYOUT)
    o = no_o
    total = no_sum
    largest = gl.full((64,), -1e30, gl.float32, gl.SliceLayout(1, S_LAYOUT))
    mbarrier.wait(q_ready, 0)
    q = q_ring.index(GROUP)
    for i in range(0, blocks):
        scale = q_scale * gl.load(K_SCALE + i)  # both arrive while the scores are made
        exponent = gl.load(EXPONENT + i)
        s = scores(q, k_ring, k_ready, k_empty, i, start, RING, CODE_EXP)
        p, largest, shrink = softmax_step(s, scale, largest, CODE_EXP, KEYS)
        p = packed(p, P_LAYOUT, CODE_EXP, KEYS)
        one_each = ones.index((i < blocks - 1).to(gl.int32))
        more, sums = p_v(p, v_ring, v_ready, v_empty, i, one_each, no_o, no_sum, SUM_LAYOUT, RING)
        total = total * along(shrink, SUM_LAYOUT) + sums
        o = o * along(shrink * exp2(unit - exponent), O_LAYOUT) + more
        unit = exponent
    o = o * along(exp2(unit) / gl.max(total, 1), O_LAYOUT)
    store(o, out, first_row, L, D, O_LAYOUT)


@gluon.jit
def produce(
    descriptors, shared, ready, L, P, KEYS: gl.constexpr, D: gl.constexpr, RING: gl.constexpr
):
    """What the copying warp does: queries once, then keys and values as their places get free."""
    q_from, k_from, v_from, ones_from = descriptors
    q_ring, k_ring, v_ring, ones = shared
    q_ready, k_ready, k_empty, v_ready, v_empty = ready
    one = gl.program_id(1)
    row = one * P + gl.program_id(0) * (GROUPS * 64)
    mbarrier.expect(q_ready, GROUPS * 64 * D + 2 * 8 * KEYS)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(ones_from, [half * 8, 0], q_ready, ones.index(half))
    for group in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(q_from, [row + group * 64, 0], q_ready, q_ring.index(group))
    blocks = (L + KEYS - 1) // KEYS
    for i in range(blocks):
        fetch(k_from, [one * P + i * KEYS, 0], k_ring, k_ready, k_empty, i, KEYS * D, RING)
        fetch(v_from, [one * D, i * KEYS], v_ring, v_ready, v_empty, i, KEYS * D, RING)


@gluon.jit(do_not_specialize=["L", "H"])
def attend(
    q_from,
    k_from,
    v_from,
    ones_from,
    Q_SCALE,
    K_SCALE,
    EXPONENT,
    Y,
    L,
    P,
    H,
    y_b,
    y_l,
    y_h,
    KEYS: gl.constexpr,
    D: gl.constexpr,
    RING: gl.constexpr,
    CODE_EXP: gl.constexpr,
):
    q_ring = gl.allocate_shared_memory(q_from.dtype, [GROUPS, 64, D], q_from.layout)
    k_ring = gl.allocate_shared_memory(k_from.dtype, [RING, KEYS, D], k_from.layout)
    v_ring = gl.allocate_shared_memory(v_from.dtype, [RING, D, KEYS], v_from.layout)
    ones = gl.allocate_shared_memory(ones_from.dtype, [2, 8, KEYS], ones_from.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    k_ready, k_empty = barriers(RING, 1), barriers(RING, GROUPS)
    v_ready, v_empty = barriers(RING, 1), barriers(RING, GROUPS)
    fence_async_shared()
    shared = (q_ring, k_ring, v_ring, ones)
    ready = (q_ready, k_ready, k_empty, v_ready, v_empty)
    scales = (Q_SCALE, K_SCALE, EXPONENT)
    out = (Y, H, y_b, y_l, y_h)
    descriptors = (q_from, k_from, v_from, ones_from)
    gl.warp_specialize(
        [
            (consume, (0, shared, ready, scales, out, L, P, KEYS, D, RING, CODE_EXP)),
            (consume, (1, shared, ready, scales, out, L, P, KEYS, D, RING, CODE_EXP)),
            (consume, (2, shared, ready, scales, out, L, P, KEYS, D, RING, CODE_EXP)),
            (produce, (descriptors, shared, ready, L, P, KEYS, D, RING)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )
