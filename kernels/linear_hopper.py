"""The fused-linear kernels for Hopper, in Gluon: warps that load and warps that multiply.

One warp streams tiles of hidden states and head through a ring of buffers with the tensor memory accelerator, and never
stops between tiles. Two warpgroups each take 64 of a tile's 128 rows; a buffer is free once both have read it, so
they drift apart, and what one does at the end of a tile (exponentials and sums, or dz and its store) runs beside the
other's products. The plain Triton kernels of `linear_forward` and `linear_backward` compute the same.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from entropy_fast.kernels.device import LOG2E, LOWEST
from entropy_fast.kernels.linear_tiles import tile_of
from entropy_fast.kernels.tanh import NEAR_ZERO, tanh_far, tanh_near_zero

# Renamed in Triton 3.7 or later.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _loader(
    hidden,
    weight,
    a_ring,
    b_ring,
    full,
    empty,
    K,
    n_row_tiles,
    n_col_tiles,
    n_units,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,
):
    stage = 0
    phase = 1
    steps = gl.cdiv(K, BK)
    if PARTS:
        steps = 3 * steps
    for unit in range(gl.program_id(0), n_units, PROGRAMS):
        row_tile, col_tile = tile_of(unit, n_row_tiles, n_col_tiles, GROUP)
        for step in range(steps):
            k_hidden = step * BK
            k_weight = k_hidden
            if PARTS:
                k = k_hidden
                k_hidden = gl.where(k < 2 * K, k, k - K)
                k_weight = gl.where(k < K, k + K, k - K)
            mbarrier.wait(empty.index(stage), phase)
            arrived = full.index(stage)
            mbarrier.expect(arrived, hidden.block_type.nbytes + weight.block_type.nbytes)
            tma_load(hidden, [row_tile * BM, k_hidden], arrived, a_ring.index(stage))
            tma_load(weight, [col_tile * BN, k_weight], arrived, b_ring.index(stage))
            stage += 1
            phase = phase ^ (stage == STAGES).to(gl.int32)
            stage = gl.where(stage == STAGES, 0, stage)


@gluon.jit
def _run(
    HALF: gl.constexpr,
    a_ring,
    b_ring,
    full,
    empty,
    stage,
    phase,
    steps,
    ROWS: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Products of the next `steps` buffers, summed by the tensor cores; and where in the ring that leaves us."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    acc = warpgroup_mma_init(gl.zeros([ROWS, BN], gl.float32, layout))
    for step in range(steps):
        mbarrier.wait(full.index(stage), phase)
        a = a_ring.index(stage).slice(HALF * ROWS, ROWS, 0)
        b = b_ring.index(stage).permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
        # the product before this one is done with its buffer
        mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1, pred=step > 0)
        stage += 1
        phase = phase ^ (stage == STAGES).to(gl.int32)
        stage = gl.where(stage == STAGES, 0, stage)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1)
    return acc, stage, phase


@gluon.jit
def _worker(
    HALF: gl.constexpr,
    a_ring,
    b_ring,
    full,
    empty,
    outbox,
    out,
    tiles_ptr,
    saved_peaks_ptr,
    row_scale_ptr,
    col_scale_ptr,
    bias_ptr,
    target_ptr,
    lse_ptr,
    constant_ptr,
    slope_ptr,
    dz_target_ptr,
    N,
    C,
    K,
    n_row_tiles,
    n_col_tiles,
    n_units,
    saved_tiles,
    slab_tiles,
    saved_rows,
    factor,
    squeeze,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    RUN: gl.constexpr,
    PARTS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SOFTCAP: gl.constexpr,
    HAS_ENTROPY: gl.constexpr,
    BACKWARD: gl.constexpr,
):
    ROWS: gl.constexpr = BM // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    cols = gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    stage = 0
    phase = 0
    steps = gl.cdiv(K, BK)
    if PARTS:
        steps = 3 * steps
    for unit in range(gl.program_id(0), n_units, PROGRAMS):
        row_tile, col_tile = tile_of(unit, n_row_tiles, n_col_tiles, GROUP)
        if RUN == 0:
            acc, stage, phase = _run(HALF, a_ring, b_ring, full, empty, stage, phase, steps, ROWS, BN, STAGES)
        else:
            acc = gl.zeros([ROWS, BN], gl.float32, layout)
            for first in range(0, steps, RUN):
                part, stage, phase = _run(
                    HALF, a_ring, b_ring, full, empty, stage, phase, min(RUN, steps - first), ROWS, BN, STAGES
                )
                acc += part

        row0 = row_tile * BM + HALF * ROWS
        col0 = col_tile * BN
        rows = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        live = rows < N
        target = gl.load(target_ptr + rows, mask=live, other=-1)
        here = (target >= col0) & (target < min(col0 + BN, C))
        column = (target - col0).to(gl.int32)
        if PARTS:
            row_scale = gl.load(row_scale_ptr + rows, mask=live, other=0.0)
            col_scale = gl.load(col_scale_ptr + col0 + cols, mask=cols < C - col0, other=0.0)
            acc = acc * row_scale[:, None] * col_scale[None, :]
        if HAS_BIAS:
            bias = gl.load(bias_ptr + col0 + cols, mask=cols < C - col0, other=0.0).to(gl.float32)
            if not SOFTCAP:
                # NaN compares false and stays
                bias = gl.where(bias < LOWEST, LOWEST, bias)
            acc = acc + bias[None, :]
        scale = factor * LOG2E
        if SOFTCAP:
            acc = acc * squeeze
            # the tile's largest decides how, not what: either way an element gets the same bits
            if gl.max(gl.max(gl.abs(acc), 1), 0) < NEAR_ZERO:
                acc = tanh_near_zero(acc)
            else:
                # 0 in place of the large ones: what both branches compute is moved before them, and fills registers
                far = gl.abs(acc) >= NEAR_ZERO
                acc = gl.where(far, tanh_far(acc), tanh_near_zero(gl.where(far, 0.0, acc)))
        if BACKWARD:
            lse = gl.load(lse_ptr + rows, mask=live, other=0.0)
            constant = gl.load(constant_ptr + rows, mask=live, other=0.0)
            logp = acc * scale - lse[:, None]
            dz = -gl.exp2(logp)
            if HAS_ENTROPY:
                slope = gl.load(slope_ptr + rows, mask=live, other=0.0)
                dz = dz * (constant[:, None] + slope[:, None] * logp)
            else:
                dz = dz * constant[:, None]
            if SOFTCAP:
                # before the target's branch, which the logits then need not outlive
                dz = dz * (1.0 - acc * acc)
            if gl.max(here.to(gl.int32), 0) > 0:
                at_target = gl.load(dz_target_ptr + rows, mask=live, other=0.0)
                dz = gl.where(cols[None, :] == column[:, None], at_target[:, None], dz)
            high = dz.to(out.dtype)
            buffer = outbox.index(HALF)
            tma.store_wait(0)
            buffer.store(high)
            fence_async_shared()
            tma_store(out, [row0, col0], buffer)
            if PARTS:
                low = (dz - high.to(gl.float32)).to(out.dtype)
                tma.store_wait(0)
                buffer.store(low)
                fence_async_shared()
                tma_store(out, [row0, n_col_tiles * BN + col0], buffer)
        else:
            if col0 + BN > C:
                acc = gl.where((cols < C - col0)[None, :], acc, LOWEST)
            m = gl.maximum(gl.max(acc, 1) * scale, LOWEST)
            at = tiles_ptr + col_tile.to(gl.int64) * 4 * N + rows
            if gl.max(here.to(gl.int32), 0) > 0:
                z = gl.sum(gl.where(cols[None, :] == column[:, None], acc, 0.0), 1) * scale
                gl.store(at + 3 * N, z, mask=here)
            d = acc * scale - m[:, None]
            p = gl.exp2(d)
            gl.store(at, m, mask=live)
            gl.store(at + N, gl.sum(p, 1), mask=live)
            gl.store(at + 2 * N, gl.sum(p * d, 1), mask=live)
            if out is not None:  # noqa: SIM102 (one is known to the compiler, the other is not)
                if col_tile < saved_tiles:
                    gl.store(saved_peaks_ptr + col_tile.to(gl.int64) * saved_rows + rows, m)
                    buffer = outbox.index(HALF)
                    tma.store_wait(0)
                    buffer.store(p.to(out.dtype))
                    fence_async_shared()
                    slab_row = (col_tile // slab_tiles) * saved_rows
                    tma_store(out, [slab_row + row0, (col_tile % slab_tiles) * BN], buffer)
    if out is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["N", "C", "K", "n_units", "saved_tiles", "slab_tiles", "saved_rows"])
def tiles_kernel(
    hidden,
    weight,
    out,
    target_ptr,
    tiles_ptr,
    saved_peaks_ptr,
    row_scale_ptr,
    col_scale_ptr,
    bias_ptr,
    lse_ptr,
    constant_ptr,
    slope_ptr,
    dz_target_ptr,
    N,
    C,
    K,
    n_units,
    saved_tiles,
    slab_tiles,
    saved_rows,
    factor,
    squeeze,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    GROUP: gl.constexpr,
    PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
    RUN: gl.constexpr,
    PARTS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    SOFTCAP: gl.constexpr,
    HAS_ENTROPY: gl.constexpr,
    BACKWARD: gl.constexpr,
):
    """Statistics of every tile, or its dz; `out` describes half tiles of dz, or of the exponentials to save, if any."""
    a_ring = gl.allocate_shared_memory(hidden.dtype, [STAGES, BM, BK], hidden.layout)
    b_ring = gl.allocate_shared_memory(weight.dtype, [STAGES, BN, BK], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    if out is not None:  # noqa: SIM108  (the two have different types)
        outbox = gl.allocate_shared_memory(out.dtype, [2, BM // 2, BN], out.layout)
    else:
        outbox = full
    n_row_tiles = gl.cdiv(N, BM)
    n_col_tiles = gl.cdiv(C, BN)
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    # fmt: off
    gl.warp_specialize([
        (_worker, (UPPER, a_ring, b_ring, full, empty, outbox, out, tiles_ptr, saved_peaks_ptr, row_scale_ptr,
                   col_scale_ptr, bias_ptr, target_ptr, lse_ptr, constant_ptr, slope_ptr, dz_target_ptr, N, C, K,
                   n_row_tiles, n_col_tiles, n_units, saved_tiles, slab_tiles, saved_rows, factor, squeeze, BM, BN, BK,
                   GROUP, PROGRAMS, STAGES, RUN, PARTS, HAS_BIAS, SOFTCAP, HAS_ENTROPY, BACKWARD)),
        (_worker, (LOWER, a_ring, b_ring, full, empty, outbox, out, tiles_ptr, saved_peaks_ptr, row_scale_ptr,
                   col_scale_ptr, bias_ptr, target_ptr, lse_ptr, constant_ptr, slope_ptr, dz_target_ptr, N, C, K,
                   n_row_tiles, n_col_tiles, n_units, saved_tiles, slab_tiles, saved_rows, factor, squeeze, BM, BN, BK,
                   GROUP, PROGRAMS, STAGES, RUN, PARTS, HAS_BIAS, SOFTCAP, HAS_ENTROPY, BACKWARD)),
        # a single warp: warps that wait for the same barriers at different speeds could miss a phase of one
        (_loader, (hidden, weight, a_ring, b_ring, full, empty, K, n_row_tiles, n_col_tiles, n_units, BM, BN, BK, GROUP,
                   PROGRAMS, STAGES, PARTS)),
    ], [4, 1], [240, 24])
    # fmt: on
