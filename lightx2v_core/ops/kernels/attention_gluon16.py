"""Attention of 16-bit operands for Hopper in Gluon, which is part of Triton 3.6 and experimental.

A program takes 192 queries of one head: three warpgroups of 64 rows each, and one warp that copies
keys and values through rings of shared memory, straight from the tensors as they lie. A warpgroup
does one thing after the other, scores, softmax, P V; the products of the two others run meanwhile,
and keys and values are fetched a third less often than with two warpgroups. An H200 is at its power
limit then; two warpgroups with two products each under way, as in FlashAttention-3
(https://arxiv.org/abs/2407.08608), took 2 % more there, exponents by a polynomial in place of the
exponential unit 6 % more. Blocks are taken from the last to the first, so that only what comes
before the loop masks keys past the end; the copy engine fills those with zeros.

Exponents, maxima and sums are float32; P is rounded to the operands' type for its product, as every
16-bit attention does. Sums stay in eight columns a row until the end: within the loop nothing moves
between lanes but the maxima.
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
BLOCK = 128  # keys of one step
K_STAGES, V_STAGES = 3, 2
GROUPS = gl.constexpr(3)


@gluon.jit
def in_eight(s, KEYS: gl.constexpr):
    """Columns of one remainder by eight lie in one lane: the next axis but one is a lane's own."""
    return gl.reshape(s, (64, KEYS // 8, 8))


@gluon.jit
def softmax_step(s, scale, largest, total, KEYS: gl.constexpr):
    """P, the new maximum in powers of two, the factor of what is summed, and the sums."""
    top = gl.max(gl.max(in_eight(s, KEYS), 1), 1)
    top = gl.convert_layout(top, largest.type.layout, assert_trivial=True)
    above = gl.maximum(largest, top * scale)
    p = exp2(s * scale - above[:, None])
    shrink = exp2(largest - above)
    sums = gl.sum(in_eight(p, KEYS), 1)
    EIGHT: gl.constexpr = sums.type.layout
    return p, above, shrink, total * along(shrink, EIGHT) + sums


@gluon.jit
def scores(q, ring, ready, empty, i, no_s, KEYS: gl.constexpr, D: gl.constexpr, RING: gl.constexpr):
    """Q K^T with the i-th block of keys."""
    arrived(ready, i, RING)
    k = ring.index(i % RING).reshape((KEYS, D)).permute((1, 0))
    s = warpgroup_mma(q, k, no_s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    mbarrier.arrive(empty.index(i % RING))
    return s


@gluon.jit
def p_v(p, ring, ready, empty, i, o, KEYS: gl.constexpr, D: gl.constexpr, RING: gl.constexpr):
    """o + P V with the i-th block of values. P lies in the registers of its operand already."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, o.type.layout, 2)
    p = gl.convert_layout(p.to(ring.dtype), OPERAND, assert_trivial=True)
    arrived(ready, i, RING)
    o = warpgroup_mma(p, ring.index(i % RING).reshape((KEYS, D)), o, is_async=True)
    o = warpgroup_mma_wait(0, [o])
    mbarrier.arrive(empty.index(i % RING))
    return o


@gluon.jit
def consume(
    GROUP: gl.constexpr,
    shared,
    ready,
    out,
    L,
    S,
    scale,
    KEYS: gl.constexpr,
    D: gl.constexpr,
    K_RING: gl.constexpr,
    V_RING: gl.constexpr,
):
    """What one warpgroup does: 64 rows against all keys."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q_ring, k_ring, v_ring = shared
    q_ready, k_ready, k_empty, v_ready, v_empty = ready
    blocks = (S + KEYS - 1) // KEYS
    no_s = gl.full((64, KEYS), 0.0, gl.float32, S_LAYOUT)
    o = gl.full((64, D), 0.0, gl.float32, O_LAYOUT)
    total = gl.sum(in_eight(no_s, KEYS), 1)
    largest = gl.full((64,), -1e30, gl.float32, gl.SliceLayout(1, S_LAYOUT))
    mbarrier.wait(q_ready, 0)
    q = q_ring.index(GROUP).reshape((64, D))
    s = scores(q, k_ring, k_ready, k_empty, 0, no_s, KEYS, D, K_RING)
    key = (blocks - 1) * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, S_LAYOUT))
    s = gl.where((key < S)[None, :], s, float("-inf"))
    for i in range(0, blocks - 1):
        p, largest, shrink, total = softmax_step(s, scale, largest, total, KEYS)
        o = o * along(shrink, O_LAYOUT)
        o = p_v(p, v_ring, v_ready, v_empty, i, o, KEYS, D, V_RING)
        s = scores(q, k_ring, k_ready, k_empty, i + 1, no_s, KEYS, D, K_RING)
    p, largest, shrink, total = softmax_step(s, scale, largest, total, KEYS)
    o = o * along(shrink, O_LAYOUT)
    o = p_v(p, v_ring, v_ready, v_empty, blocks - 1, o, KEYS, D, V_RING)
    o = o * along(1.0 / gl.sum(total, 1), O_LAYOUT)
    store(o, out, (gl.program_id(0) * GROUPS + GROUP) * 64, L, D, O_LAYOUT)


@gluon.jit
def produce(
    descriptors,
    shared,
    ready,
    H,
    S,
    KEYS: gl.constexpr,
    D: gl.constexpr,
    K_RING: gl.constexpr,
    V_RING: gl.constexpr,
):
    """What the copying warp does: queries once, then keys and values as their places get free."""
    q_from, k_from, v_from = descriptors
    q_ring, k_ring, v_ring = shared
    q_ready, k_ready, k_empty, v_ready, v_empty = ready
    batch = gl.program_id(1) // H
    head = gl.program_id(1) % H
    row = gl.program_id(0) * (GROUPS * 64)
    mbarrier.expect(q_ready, GROUPS * 64 * D * 2)
    for group in gl.static_range(GROUPS):
        at = [batch, row + group * 64, head, 0]
        tma.async_copy_global_to_shared(q_from, at, q_ready, q_ring.index(group))
    blocks = (S + KEYS - 1) // KEYS
    for i in range(blocks):
        at = [batch, (blocks - 1 - i) * KEYS, head, 0]
        fetch(k_from, at, k_ring, k_ready, k_empty, i, KEYS * D * 2, K_RING)
        fetch(v_from, at, v_ring, v_ready, v_empty, i, KEYS * D * 2, V_RING)


@gluon.jit(do_not_specialize=["L", "S", "H"])
def attend(
    q_from,
    k_from,
    v_from,
    Y,
    L,
    S,
    H,
    y_b,
    y_l,
    y_h,
    scale,
    KEYS: gl.constexpr,
    D: gl.constexpr,
    K_RING: gl.constexpr,
    V_RING: gl.constexpr,
):
    """L queries against S keys; descriptors of BLND, a tile of one clip and one head each."""
    q_ring = gl.allocate_shared_memory(q_from.dtype, [GROUPS, 1, 64, 1, D], q_from.layout)
    k_ring = gl.allocate_shared_memory(k_from.dtype, [K_RING, 1, KEYS, 1, D], k_from.layout)
    v_ring = gl.allocate_shared_memory(v_from.dtype, [V_RING, 1, KEYS, 1, D], v_from.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    k_ready, k_empty = barriers(K_RING, 1), barriers(K_RING, GROUPS)
    v_ready, v_empty = barriers(V_RING, 1), barriers(V_RING, GROUPS)
    fence_async_shared()
    shared = (q_ring, k_ring, v_ring)
    ready = (q_ready, k_ready, k_empty, v_ready, v_empty)
    out = (Y, H, y_b, y_l, y_h)
    descriptors = (q_from, k_from, v_from)
    gl.warp_specialize(
        [
            (consume, (0, shared, ready, out, L, S, scale, KEYS, D, K_RING, V_RING)),
            (consume, (1, shared, ready, out, L, S, scale, KEYS, D, K_RING, V_RING)),
            (consume, (2, shared, ready, out, L, S, scale, KEYS, D, K_RING, V_RING)),
            (produce, (descriptors, shared, ready, H, S, KEYS, D, K_RING, V_RING)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )
