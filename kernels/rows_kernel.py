"""Forward: log-prob and entropy of rows of logits, each element read once.

For logits z = k · w (w: the row after bias and softcap; k: what is left of scale and temperature) and m = max w:

    logprob = k (w_y − m) − log Σ e^(k (w − m))        entropy = log Σ e^(k (w − m)) − Σ p k (w − m)

by sums of exponentials in one pass with running rescaling (the online softmax), as in `rows_sums`. Bytes: the active
rows once, and 16 bytes out per row.

A program takes a row or, where rows are long, a segment: rows are cut into equal ones, by the vocabulary alone, and the
last to finish of a row's programs merges what all have found, in order. So a row's bits depend neither on the number of
rows nor on its place, few rows fill the device too, and little is left to wait for when the last rows end.

Each of LANES lanes keeps its own sums over UNROLL × WIDTH elements a block, so that no thread waits for another until
the segment ends; then a warp's lanes are merged, and warps by whoever merges the segments. The blocks of a segment are
written out one by one, with loads to registers DEPTH blocks ahead and without masks but where the row may end. What
takes many instructions an element (softcap, bias, float64) is a loop instead, which waits for no memory anyway.

16-bit logits without bias or softcap stay in words of two until they are added (PAIRS, see `rows_pairs`). 16-bit rows
that start on any 2 bytes are read as aligned words of 4 bytes, each shifted into the next (WORDS, see `rows_loads`).
"""

import triton
import triton.language as tl

from entropy_fast.kernels.device import LOG2E, tanh
from entropy_fast.kernels.plan import finish_sequence, write_zeros
from entropy_fast.kernels.rows_loads import load_block
from entropy_fast.kernels.rows_pairs import FAR, absorb_pairs, keep_first, peak_alone
from entropy_fast.kernels.rows_sums import FLOOR, absorb, empty_sets, left_at, merge, moments


@triton.jit
def softcapped(x, squeeze, SOFTCAP: tl.constexpr):
    """w of x, which holds the bias already."""
    if SOFTCAP:
        x = tanh(x * squeeze)
    return x


@triton.jit
def read_segment(
    row_ptr,
    bias_ptr,
    target,
    part,
    alpha,
    least,
    squeeze,
    ACC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PAIRS: tl.constexpr,
    PACKED: tl.constexpr,
    WRITTEN_OUT: tl.constexpr,
    VOCAB: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LENGTH: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The lanes' sets of a segment of a row, and the target's logit: NaN where there is no such token."""
    BLOCK: tl.constexpr = UNROLL * LANES * WIDTH
    LAST: tl.constexpr = VOCAB - (SEGMENTS - 1) * LENGTH
    BLOCKS: tl.constexpr = (LENGTH + BLOCK - 1) // BLOCK
    ITEMS: tl.constexpr = WIDTH // 2 if PAIRS else WIDTH
    # the last block, where blocks are written out: only as long as it has to be
    TAIL_STEPS: tl.constexpr = -(-(LENGTH - (BLOCKS - 1) * BLOCK) // (LANES * WIDTH))
    TAIL_UNROLL: tl.constexpr = triton.next_power_of_2(TAIL_STEPS)
    ELEMENT: tl.constexpr = row_ptr.dtype.element_ty
    begin = part * LENGTH
    length = LENGTH if LENGTH == LAST else tl.where(part == SEGMENTS - 1, LAST, LENGTH)
    words_ptr = None
    phase = 0
    if WORDS:
        address = row_ptr.to(tl.int64)
        phase = (address % 4 // 2).to(tl.int32)
        words_ptr = (address // 4 * 4).to(tl.pointer_type(tl.int32))
    elif PAIRS:
        words_ptr = row_ptr.to(tl.pointer_type(tl.int32))
    known = (target >= 0) & (target < VOCAB)
    m, n, r, e = empty_sets(LANES, ACC)
    if WRITTEN_OUT:
        ahead = ()
        for i in tl.static_range(BLOCKS + DEPTH):
            if i < BLOCKS:
                ahead = ahead + (  # noqa: RUF005 (no unpacking in a kernel)
                    load_block(
                        row_ptr,
                        words_ptr,
                        phase,
                        begin + i * BLOCK,
                        length - i * BLOCK,
                        LAST - i * BLOCK,
                        BLOCK if i < BLOCKS - 1 else TAIL_UNROLL * LANES * WIDTH,
                        WIDTH,
                        PAIRS,
                        WORDS,
                    ),
                )
            if i >= DEPTH:
                if i == DEPTH:
                    tl.debug_barrier()  # see below
                left = length - (i - DEPTH) * BLOCK
                w = tl.reshape(ahead[0], [ahead[0].shape[0] // (LANES * ITEMS), LANES, ITEMS])
                ahead = ahead[1:]
                if PAIRS:
                    if LAST - (i - DEPTH) * BLOCK < w.shape[0] * LANES * WIDTH and (WORDS or VOCAB % WIDTH != 0):
                        w = keep_first(w, left, ELEMENT)
                    m, n, r, e = absorb_pairs(
                        w, m, n, r, e, alpha, least, ELEMENT, PACKED, i == DEPTH, 4 if WORDS else 1
                    )
                else:
                    w = w.to(ACC)
                    if LAST - (i - DEPTH) * BLOCK < w.shape[0] * LANES * WIDTH:
                        w = tl.where(left_at(left, w.shape, 1) > 0, w, -float("inf"))
                    m, n, r, e = absorb(w, m, n, r, e, alpha, least, i == DEPTH)
                if i == DEPTH:
                    # Requested behind the first blocks, which so need not wait for it, nor anything for it at the end.
                    # NVIDIA's assembler puts off what is needed late, the target's id and then its logit, until all
                    # sums are done, but nothing beyond a barrier.
                    raw_target = tl.load(row_ptr + target, mask=known, other=float("nan"))
                    tl.debug_barrier()
    else:
        raw_target = tl.load(row_ptr + target, mask=known, other=float("nan"))
        for i in tl.range(BLOCKS):
            left = length - i * BLOCK
            w = load_block(row_ptr, words_ptr, phase, begin + i * BLOCK, left, 0, BLOCK, WIDTH, PAIRS, WORDS).to(ACC)
            if bias_ptr is not None:
                place = tl.arange(0, BLOCK)
                w += tl.load(bias_ptr + begin + i * BLOCK + place, mask=place < left, other=0).to(ACC)
            w = tl.reshape(softcapped(w, squeeze, SOFTCAP), [UNROLL, LANES, WIDTH])
            w = tl.where(left_at(left, w.shape, 1) > 0, w, -float("inf"))
            m, n, r, e = absorb(w, m, n, r, e, alpha, least, False)
    w_target = raw_target.to(ACC)
    if bias_ptr is not None:
        w_target += tl.load(bias_ptr + target, mask=known, other=float("nan")).to(ACC)
    return m, n, r, e, softcapped(w_target, squeeze, SOFTCAP)


@triton.jit
def merge_segments(
    m,
    n,
    r,
    e,
    row,
    part,
    arrivals_ptr,
    partials_ptr,
    alpha,
    least,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Whether this program is the last one of its row, and then the row's set, of those of the lanes of all."""
    WARPS: tl.constexpr = LANES // 32
    SETS: tl.constexpr = SEGMENTS * WARPS
    SHAPE: tl.constexpr = (WARPS, 32)
    m, n, r, e = (tl.reshape(m, SHAPE), tl.reshape(n, SHAPE), tl.reshape(r, SHAPE), tl.reshape(e, SHAPE))
    m, n, r, e = merge(m, n, r, e, alpha, least, 1)
    if SEGMENTS == 1:
        m, n, r, e = merge(m, n, r, e, alpha, least, 0)
        complete = True
    else:
        row_ptr = partials_ptr + row.to(tl.int64) * (4 * SETS)
        # side by side, from four lanes of each warp: nothing has to change its thread
        column = tl.arange(0, 32)[None, :]
        warp = tl.arange(0, WARPS)[:, None]
        found = tl.where(column == 0, m[:, None], tl.where(column == 1, n[:, None], e[:, None]))
        found = tl.where(column == 2, r[:, None], found)
        tl.store(row_ptr + (part * WARPS + warp) * 4 + column, found, mask=column < 4)
        tl.debug_barrier()
        complete = tl.atomic_add(arrivals_ptr + row, 1, sem="acq_rel") == SEGMENTS - 1
        zero = tl.full([], 0.0, m.dtype)
        m, n, r, e = (zero, zero, zero, zero)
        if complete:
            tl.store(arrivals_ptr + row, 0)
            place = tl.arange(0, triton.next_power_of_2(SETS))
            there = place < SETS
            # other multiprocessors wrote these: read them past this one's own cache
            m_each = tl.load(row_ptr + place * 4, mask=there, other=FLOOR, cache_modifier=".cg")
            n_each = tl.load(row_ptr + place * 4 + 1, mask=there, other=0.0, cache_modifier=".cg")
            r_each = tl.load(row_ptr + place * 4 + 2, mask=there, other=0.0, cache_modifier=".cg")
            e_each = tl.load(row_ptr + place * 4 + 3, mask=there, other=0.0, cache_modifier=".cg")
            m, n, r, e = merge(m_each, n_each, r_each, e_each, alpha, least, 0)
    return complete, m, n, r, e


@triton.jit(do_not_specialize=["rows", "inner", "stride_outer", "stride_inner", "sequences"])
def row_stats_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    mask_ptr,
    logprob_ptr,
    entropy_ptr,
    peak_ptr,
    log_sum_ptr,
    active_ptr,
    counters_ptr,
    arrivals_ptr,
    partials_ptr,
    pending_ptr,
    eos_column_ptr,
    sums_ptr,
    rows,
    inner,
    stride_outer,
    stride_inner,
    sequences,
    factor: tl.float64,
    squeeze: tl.float64,
    ACC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FLAT: tl.constexpr,
    PAIRS: tl.constexpr,
    PACKED: tl.constexpr,
    WRITTEN_OUT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    INCLUDE_EOS: tl.constexpr,
    VOCAB: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LENGTH: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    WORDS: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """One program a segment of a row.

    With a list, whoever is free takes the next segment; with a mask, programs whose row is masked end at once.
    """
    CLAMPED: tl.constexpr = PAIRS and logits_ptr.dtype.element_ty == tl.bfloat16
    k = tl.full([], factor, ACC)
    squeeze = tl.full([], squeeze, ACC)
    alpha = tl.full([], factor * LOG2E, ACC)
    least = FAR * alpha if CLAMPED else FLOOR
    if not WORDS:
        # multiples of WIDTH already; said in a way that the compiler understands, so that it emits wide loads
        stride_outer = stride_outer // WIDTH * WIDTH
        stride_inner = stride_inner // WIDTH * WIDTH
    unit = tl.program_id(0)
    units = (rows if active_ptr is None else tl.load(counters_ptr)) * SEGMENTS
    if mask_ptr is not None:
        row = unit // SEGMENTS
        is_active = tl.load(mask_ptr + row) != 0
        write_zeros(row, is_active == 0, logprob_ptr, entropy_ptr, peak_ptr, log_sum_ptr)
        units = tl.where(is_active, units, 0)
    while unit < units:
        row = unit // SEGMENTS
        part = unit - row * SEGMENTS
        if active_ptr is not None:
            row = tl.load(active_ptr + row)
        outer = 0 if FLAT else row // inner
        # the token in a column is scored by the logits of the column before it
        column = row - outer * inner - SEQUENCES
        row_ptr = logits_ptr + column.to(tl.int64) * stride_inner
        if not FLAT:
            row_ptr += outer.to(tl.int64) * stride_outer
        target = tl.load(targets_ptr + row)
        m, n, r, e, w_target = read_segment(
            row_ptr,
            bias_ptr,
            target,
            part,
            alpha,
            least,
            squeeze,
            ACC,
            SOFTCAP,
            PAIRS,
            PACKED,
            WRITTEN_OUT,
            VOCAB,
            SEGMENTS,
            LENGTH,
            UNROLL,
            LANES,
            WIDTH,
            DEPTH,
            WORDS,
        )
        complete, m, n, r, e = merge_segments(
            m, n, r, e, row, part, arrivals_ptr, partials_ptr, alpha, least, SEGMENTS, LANES
        )
        if complete:
            if CLAMPED:
                r, e = peak_alone(m, r, e)
            log_sum, mean = moments(m, n, r, e, alpha, least)
            # a target that is no token: its logit is NaN
            log_sum = tl.where(w_target == w_target, log_sum, float("nan"))
            tl.store(logprob_ptr + row, k * (w_target - m) - log_sum)
            tl.store(entropy_ptr + row, log_sum - mean)
            if peak_ptr is not None:
                tl.store(peak_ptr + row, m)
                tl.store(log_sum_ptr + row, log_sum)
            if SEQUENCES:
                tl.debug_barrier()
                done = tl.atomic_add(arrivals_ptr + rows + outer, 1, sem="acq_rel") + 1
                if done == tl.load(pending_ptr + outer):
                    tl.store(arrivals_ptr + rows + outer, 0)
                    finish_sequence(
                        outer,
                        sequences,
                        inner,
                        eos_column_ptr,
                        sums_ptr,
                        logprob_ptr,
                        entropy_ptr,
                        INCLUDE_EOS,
                        SUM_BLOCK,
                    )
        if active_ptr is not None:
            unit = tl.num_programs(0) + tl.atomic_add(counters_ptr + 1, 1, sem="relaxed")
        else:
            # no more than one turn: said so that the compiler sees it
            unit = units
