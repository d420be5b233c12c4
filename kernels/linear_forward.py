"""Token statistics straight from hidden states and head: the logits live in registers, tile by tile.

Each tile of 128 rows × 256 tokens leaves three numbers a row (base 2, d = z − max z):

    m = max z,   s = Σ 2^d,   e = Σ 2^d d,

and the logit of the target in the tile that holds it; a second launch merges the tiles of each row in a fixed
order. The first is a GEMM with nothing to write: 2 N D V operations against 12 N V / 256 bytes. A row's bits depend on
the head alone, not on the rows around it: tiles along the vocabulary and steps along the width are the same whatever
the number of rows.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from entropy_fast.kernels.device import LN2, LOWEST
from entropy_fast.kernels.launch import Variant, ceil_div, launch
from entropy_fast.kernels.linear_operands import (
    Operand,
    Tiling,
    filter_columns,
    hopper_variant,
    plain_options,
    program_count,
    slabs,
    tiling_for,
)
from entropy_fast.kernels.linear_slabs import Saved, saved_in
from entropy_fast.kernels.linear_tiles import base2_logits, product_tile, tile_of
from entropy_fast.reference.linear import LinearStats
from entropy_fast.reference.transform import Transform

MERGE_ROWS = 32
MERGE_TILES = 32


@triton.jit(do_not_specialize=["N", "n_units", "saved_tiles", "slab_tiles", "saved_rows", "saved_pitch"])
def linear_stats_kernel(
    hidden,
    weight,
    row_scale_ptr,
    col_scale_ptr,
    bias_ptr,
    target_ptr,
    tiles_ptr,
    saved_ptr,
    saved_peaks_ptr,
    N,
    C,
    K,
    hidden_stride,
    weight_stride,
    n_units,
    saved_tiles,
    slab_tiles,
    saved_rows,
    saved_pitch,
    factor,
    squeeze,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """m, s, e of every row in every tile, and the target's logit in the tile that holds it."""
    n_row_tiles = tl.cdiv(N, BM)
    n_col_tiles = tl.cdiv(C, BN)
    for unit in tl.range(tl.program_id(0), n_units, PROGRAMS):
        row_tile, col_tile = tile_of(unit, n_row_tiles, n_col_tiles, GROUP)
        row0 = row_tile * BM
        col0 = col_tile * BN
        acc = product_tile(hidden, weight, row0, col0, N, C, K, hidden_stride, weight_stride, BM, BN, BK, TMA, PARTS)
        rows = row0 + tl.arange(0, BM)
        live = rows < N
        row_scale = tl.load(row_scale_ptr + rows, mask=live, other=0.0) if PARTS else 1.0
        z, _ = base2_logits(
            acc, row_scale, col_scale_ptr, bias_ptr, col0, C, factor, squeeze, BN, PARTS, HAS_BIAS, SOFTCAP
        )
        m = tl.maximum(tl.max(z, 1), LOWEST)
        out = tiles_ptr + col_tile.to(tl.int64) * 4 * N + rows
        # the target's logit is wanted from one tile in hundreds: the others skip the search
        target = tl.load(target_ptr + rows, mask=live, other=-1)
        here = (target >= col0) & (target < min(col0 + BN, C))
        if tl.max(here.to(tl.int32), 0) > 0:
            column = (target - col0).to(tl.int32)
            found = tl.sum(tl.where(tl.arange(0, BN)[None, :] == column[:, None], z, 0.0), 1)
            tl.store(out + 3 * N, found, mask=here)
        d = z - m[:, None]
        p = tl.exp2(d)
        tl.store(out, m, mask=live)
        tl.store(out + N, tl.sum(p, 1), mask=live)
        tl.store(out + 2 * N, tl.sum(p * d, 1), mask=live)
        if saved_ptr is not None:  # noqa: SIM102 (one is known to the compiler, the other is not)
            if col_tile < saved_tiles:
                # a multiple of 8 already; said in a way that the compiler understands, so that it emits wide stores
                at = ((col_tile // slab_tiles) * saved_rows + rows).to(tl.int64) * (saved_pitch // 8 * 8)
                at += (col_tile % slab_tiles) * BN
                tl.store(saved_ptr + at[:, None] + tl.arange(0, BN)[None, :], p.to(tl.float16))
                tl.store(saved_peaks_ptr + col_tile.to(tl.int64) * saved_rows + rows, m)


@triton.jit(do_not_specialize=["N", "V", "n_tiles"])
def merge_kernel(
    tiles_ptr,
    target_ptr,
    logprob_ptr,
    entropy_ptr,
    peak_ptr,
    log_sum_ptr,
    N,
    V,
    n_tiles,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SHARD: tl.constexpr,
):
    """All tiles of a row into log-prob, entropy, maximum and log-sum, in nats."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    live = rows < N
    m = tl.full([TILES, ROWS], LOWEST, tl.float32)
    s = tl.zeros([TILES, ROWS], tl.float32)
    e = tl.zeros([TILES, ROWS], tl.float32)
    for first in range(0, n_tiles, TILES):
        tile = first + tl.arange(0, TILES)[:, None]
        inside = (tile < n_tiles) & live
        at = tiles_ptr + tile.to(tl.int64) * 4 * N + rows
        m_tile = tl.load(at, mask=inside, other=LOWEST)
        s_tile = tl.load(at + N, mask=inside, other=0.0)
        e_tile = tl.load(at + 2 * N, mask=inside, other=0.0)
        m_new = tl.maximum(m, m_tile)
        keep = tl.exp2(m - m_new)
        add = tl.exp2(m_tile - m_new)
        e = keep * (e + (m - m_new) * s) + add * (e_tile + (m_tile - m_new) * s_tile)
        s = keep * s + add * s_tile
        m = m_new
    M = tl.max(m, 0)
    scale = tl.exp2(m - M[None, :])
    E = tl.sum(scale * (e + (m - M[None, :]) * s), 0)
    S = tl.sum(scale * s, 0)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < N
    target = tl.load(target_ptr + rows, mask=live, other=-1).to(tl.int64)
    inside = (target >= 0) & (target < V)
    z = tl.load(tiles_ptr + ((target // BN) * 4 + 3) * N + rows, mask=inside, other=float("nan"))
    log_sum = tl.log2(S)
    # no logit above −inf, so no distribution; or a target outside the vocabulary: NaN throughout
    nothing = M < LOWEST * 1e-5
    log_sum = tl.where(nothing, float("nan"), log_sum)
    if not SHARD:
        log_sum = tl.where(z != z, float("nan"), log_sum)
    logprob = tl.where(z < LOWEST * 1e-5, -float("inf"), z - M) - log_sum
    tl.store(logprob_ptr + rows, logprob * LN2, mask=live)
    tl.store(entropy_ptr + rows, (log_sum - E / S) * LN2, mask=live)
    tl.store(peak_ptr + rows, tl.where(nothing, -float("inf"), M * LN2), mask=live)
    tl.store(log_sum_ptr + rows, log_sum * LN2, mask=live)


def tile_partials(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: Transform,
    tiling: Tiling,
    saved: Saved | None = None,
) -> torch.Tensor:
    """(column tiles, 4, rows): m, s, e, and the target's logit, written in the target's tile alone; base 2, float32.

    Shapes as in `linear_stats`; float32 operands are taken through their fp16 halves. `saved` is filled.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    tiles = torch.empty(ceil_div(vocab, tiling.BN), 4, rows, dtype=torch.float32, device=hidden.device)
    x = Operand.of(hidden)
    for slab in slabs(vocab, tiling, x.parts):
        columns = slab.stop - slab.start
        w = Operand.of(weight if columns == vocab else weight[slab])
        n_units = ceil_div(rows, tiling.BM) * ceil_div(columns, tiling.BN)
        # not fewer where there are fewer units: the number is compiled in, and an idle program costs nothing
        programs = program_count(hidden.device)
        out = tiles[slab.start // tiling.BN :] if slab.start else tiles
        local_bias = None if bias is None else bias[slab]
        local_targets = targets - slab.start if slab.start else targets
        scalars = (transform.factor, transform.squeeze or 1.0)
        softcap = transform.softcap is not None
        saving = (0, 0, 0) if saved is None else (saved.tiles, saved.columns // tiling.BN, saved.rows)
        peaks = None if saved is None else saved.peaks
        if tiling.specialized and x.tma and w.tma:
            from entropy_fast.kernels.linear_hopper import tiles_kernel

            # half a tile of exponentials for each half of the warps takes the fourth buffer's place in shared memory
            stages, box = tiling.num_stages, None
            if saved is not None:
                stages, box = 3, Operand(saved.flat, saved.flat.shape[1], None).gluon_source(tiling.BM // 2, tiling.BN)
            launch(
                tiles_kernel,
                programs,
                (local_targets, out, peaks, x.scale, w.scale, local_bias, *(None,) * 4),
                (rows, columns, x.width, n_units, *saving),
                scalars,
                hopper_variant(tiling, programs, stages, x.parts, bias is not None, softcap, False, False),
                descriptors=(x.gluon_source(tiling.BM, tiling.BK), w.gluon_source(tiling.BN, tiling.BK), box),
            )
            continue
        tma = tiling.tma and x.tma and w.tma
        linear_stats_kernel[(programs,)](
            x.source(tiling.BM, tiling.BK, tma),
            w.source(tiling.BN, tiling.BK, tma),
            x.scale,
            w.scale,
            local_bias,
            local_targets,
            out,
            None if saved is None else saved.exponentials,
            peaks,
            rows,
            columns,
            x.width,
            x.stride,
            w.stride,
            n_units,
            *saving,
            0 if saved is None else saved.exponentials.stride(1),
            *scalars,
            **plain_options(tiling, programs, tma, x.parts, bias is not None, softcap),
            num_stages=tiling.num_stages,
        )
    return tiles


def linear_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: Transform,
    shard: bool = False,
    filtered: bool = False,
    precision: str = "fast",
    memory: torch.Tensor | None = None,
) -> tuple[LinearStats, torch.Tensor | None]:
    """Statistics of every row, float32, nats; with `filtered`, also the log-sum-exp in each slab, (slabs, rows).

    Args:
        hidden: (rows, width), bf16, fp16 or float32; rows may be strided.
        weight: (vocab, width), hidden's dtype.
        targets: (rows,), integer; one outside the vocabulary makes its row NaN, or, of a shard, its log-prob alone.
        bias: (vocab,) or None.
        transform: what turns `x Wᵀ + bias` into the logits of the softmax.
        shard: the head is a part of a larger one (`reference.linear.combine_shards`).
        filtered: the backward will want to know where the mass is; slabs are `filter_columns` tokens wide.
        precision: of float32 operands, "accurate" or "fast".
        memory: of 16-bit operands and in their dtype, contiguous: to be filled with exponentials that the backward,
            given the same memory, need not compute. (vocab, width), where dWeight will be, or flat, to spare.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    tiling = tiling_for(rows, hidden.device, precision if hidden.dtype == torch.float32 else "fast")
    saved = None if memory is None else saved_in(memory, vocab, rows, tiling)
    tiles = tile_partials(hidden, weight, targets, bias, transform, tiling, saved)
    out = LinearStats(*(torch.empty(rows, dtype=torch.float32, device=hidden.device) for _ in range(4)))
    launch(
        merge_kernel,
        ceil_div(rows, MERGE_ROWS),
        (tiles, targets, *out),
        (rows, vocab, tiles.shape[0]),
        (),
        _merge(tiling.BN, shard),
    )
    return out, _slab_lse(tiles, filter_columns(hidden.device) // tiling.BN) if filtered else None


@cache
def _merge(columns: int, shard: bool) -> Variant:
    return Variant({"BN": columns, "ROWS": MERGE_ROWS, "TILES": MERGE_TILES, "SHARD": shard})


def _slab_lse(tiles: torch.Tensor, per_slab: int) -> torch.Tensor:
    """Log-sum-exp, in nats, of every `per_slab` tiles, (slabs, rows)."""
    lse = (tiles[:, 0] + tiles[:, 1].log2()) * LN2.value
    whole = len(lse) // per_slab * per_slab
    # all whole slabs at once: slab by slab the host would need longer than the device
    parts = [lse[:whole].unflatten(0, (-1, per_slab)).logsumexp(1)]
    return torch.cat([*parts, lse[whole:].logsumexp(0, keepdim=True)]) if whole < len(lse) else parts[0]
