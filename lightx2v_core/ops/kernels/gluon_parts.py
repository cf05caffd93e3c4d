"""What the attention kernels in Gluon share: rings of shared memory that one warp fills and three
warpgroups read, each block of a ring with a barrier that says it has arrived and one that says its
place is free, and the rows of a program's result."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def along(row, LAYOUT: gl.constexpr):
    """A number for each row, as a column of a matrix in LAYOUT."""
    return gl.convert_layout(row, gl.SliceLayout(1, LAYOUT))[:, None]


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def arrived(ready, i, RING: gl.constexpr):
    """Wait for the i-th block of a ring."""
    mbarrier.wait(ready.index(i % RING), (i // RING) & 1)


@gluon.jit
def fetch(descriptor, at, ring, ready, empty, i, BYTES: gl.constexpr, RING: gl.constexpr):
    """The i-th block of a ring, as soon as its place is free."""
    place = i % RING
    mbarrier.wait(empty.index(place), ((i // RING) & 1) ^ 1)
    mbarrier.expect(ready.index(place), BYTES)
    tma.async_copy_global_to_shared(descriptor, at, ready.index(place), ring.index(place))


@gluon.jit
def store(o, out, first_row, L, D: gl.constexpr, LAYOUT: gl.constexpr):
    Y, H, y_b, y_l, y_h = out
    one = gl.program_id(1)
    rows = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    lanes = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    at = (one // H).to(gl.int64) * y_b + (one % H) * y_h
    at = at + rows[:, None].to(gl.int64) * y_l + lanes[None, :]
    gl.store(Y + at, o.to(Y.dtype.element_ty), mask=(rows < L)[:, None])
