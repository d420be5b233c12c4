"""Forward: log-prob and entropy of rows of logits, each element read once.

For logits z = k · w (w: the row after bias and softcap; k: what is left of scale and temperature) and m = max w:

    logprob = k (w_y − m) − log Σ e^(k (w − m))        entropy = log Σ e^(k (w − m)) − Σ p k (w − m)

by sums of exponentials in one pass with running rescaling (the online softmax), as in `rows_sums`. Bytes: the active
rows once, and 16 bytes out per row.

A program takes a row or, where rows are long, a segment: rows are cut into equal ones, by the vocabulary alone. Who has
read a segment leaves its sums and ends (`rows_exchange`); a program that starts later merges those of a group of rows,
a warp those of one, in order. So a row's bits depend neither on the number of rows nor on its place, few rows fill the
device too, programs that read do nothing else, and little is left to wait for when the last rows end.
"""

import triton
import triton.language as tl

from entropy_fast.kernels.device import LOG2E
from entropy_fast.kernels.plan import finish_sequence, write_zeros
from entropy_fast.kernels.rows_exchange import clear_words, leave_sets, take_sets
from entropy_fast.kernels.rows_order import spread_out, unit_at
from entropy_fast.kernels.rows_pairs import FAR, NEAR, log_of_peaks
from entropy_fast.kernels.rows_segments import read_segment, target_entry
from entropy_fast.kernels.rows_softcap import capped_logit
from entropy_fast.kernels.rows_sums import FLOOR, merge, moments
from entropy_fast.kernels.tanh import tanh


@triton.jit
def start_of(row, outer, logits_ptr, inner, stride_outer, stride_inner, FLAT: tl.constexpr, SEQUENCES: tl.constexpr):
    """Where a row's logits begin; `outer` is row // inner, or 0 where rows are a constant apart."""
    # the token in a column is scored by the logits of the column before it
    column = row - outer * inner - SEQUENCES
    row_ptr = logits_ptr + column.to(tl.int64) * stride_inner
    if not FLAT:
        row_ptr += outer.to(tl.int64) * stride_outer
    return row_ptr


@triton.jit
def target_w(
    logit,
    bias_ptr,
    target,
    wanted,
    squeeze,
    ACC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PAIRS: tl.constexpr,
    PACKED: tl.constexpr,
    VOCAB: tl.constexpr,
):
    """w of targets from their logits; and again, under a softcap in float64.

    What tanh's last digit is off by shows in the log-prob of the target, while that of all others evens out.
    """
    w = logit.to(ACC)
    if bias_ptr is not None:
        w += target_entry(bias_ptr, target, wanted, VOCAB).to(ACC)
    finer = w
    if SOFTCAP:
        finer = tanh(w.to(tl.float64) * squeeze)
        squeeze = squeeze.to(ACC)
        w = capped_logit(logit, squeeze, PACKED) if PAIRS else tanh(w * squeeze, PACKED > 0)
    return w, finer


@triton.jit
def write_results(place, here, m, log_sum, mean, k, w_target, finer, logprob_ptr, entropy_ptr, peak_ptr, log_sum_ptr):
    """Write the results of rows at their places, where they are `here`."""
    # a target that is no token: its logit is NaN
    log_sum = tl.where(w_target == w_target, log_sum, float("nan"))
    above = k * (finer - m)
    if finer.dtype != m.dtype:
        # nothing between the peak and itself
        above = tl.where(w_target == m, 0.0, above)
    tl.store(logprob_ptr + place, above - log_sum, mask=here)
    tl.store(entropy_ptr + place, log_sum - mean, mask=here)
    if peak_ptr is not None:
        tl.store(peak_ptr + place, m, mask=here)
        tl.store(log_sum_ptr + place, log_sum, mask=here)


@triton.jit
def write_far_rows(
    first_row,
    is_far,
    m,
    k,
    w_target,
    logits_ptr,
    logprob_ptr,
    entropy_ptr,
    peak_ptr,
    log_sum_ptr,
    inner,
    stride_outer,
    stride_inner,
    FLAT: tl.constexpr,
    SEQUENCES: tl.constexpr,
    VOCAB: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write again the results of those rows of a group, a warp's each, whose peaks are beyond NEAR: one by one."""
    warp = tl.arange(0, LANES // 32)[:, None]
    for i in tl.range(GROUP):
        this = is_far & (warp == i)
        if tl.max(this.to(tl.int32)) > 0:
            row = first_row + i
            outer = 0 if FLAT else row // inner
            row_ptr = start_of(row, outer, logits_ptr, inner, stride_outer, stride_inner, FLAT, SEQUENCES)
            peak = tl.max(tl.where(this, m, FLOOR))
            w = tl.sum(tl.where(this, w_target, 0.0))
            log_sum = log_of_peaks(row_ptr, peak, VOCAB, LANES)
            write_results(row, True, peak, log_sum, 0.0, k, w, w, logprob_ptr, entropy_ptr, peak_ptr, log_sum_ptr)


@triton.jit(do_not_specialize=["rows", "inner", "stride_outer", "stride_inner", "sequences", "lag", "step", "inverse"])
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
    sets_ptr,
    arrivals_ptr,
    pending_ptr,
    eos_column_ptr,
    sums_ptr,
    rows,
    inner,
    stride_outer,
    stride_inner,
    sequences,
    lag,
    step,
    inverse,
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
    GROUP: tl.constexpr,
    LENGTH: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    WORDS: tl.constexpr,
    TOGETHER: tl.constexpr,
    CHUNK: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """One program a unit of work: a row or, of rows that are cut, a segment or the end of GROUP rows.

    With a list, whoever is free takes the next unit. With a mask, programs whose row is masked end at once; or each has
    TOGETHER rows, and reads those that are not.
    """
    SETS: tl.constexpr = SEGMENTS * (LANES // 32)
    ROW_WORDS: tl.constexpr = 4 * SETS
    ITEMS: tl.constexpr = SEGMENTS * GROUP
    ELEMENT: tl.constexpr = logits_ptr.dtype.element_ty
    k = tl.full([], factor, ACC)
    squeeze = tl.full([], squeeze, tl.float64)
    alpha = tl.full([], factor * LOG2E, ACC)
    least = tl.full([], FAR if PAIRS else FLOOR, ACC)
    if not WORDS:
        # multiples of WIDTH already; said in a way that the compiler understands, so that it emits wide loads
        stride_outer = stride_outer // WIDTH * WIDTH
        stride_inner = stride_inner // WIDTH * WIDTH
    places = rows
    unit = tl.program_id(0)
    if active_ptr is not None:
        places = tl.load(counters_ptr)
        # in order, so that whoever waits does so for units that others have begun
        unit = tl.atomic_add(counters_ptr + 1, 1, sem="relaxed")
    groups = tl.cdiv(places, GROUP)
    units = groups * (ITEMS + (SEGMENTS > 1))
    wanted = 0
    if TOGETHER > 1:
        unit *= TOGETHER
        units = tl.minimum(unit + TOGETHER, units)
        index = tl.arange(0, TOGETHER)
        is_here = unit + index < units
        is_read = is_here & (tl.load(mask_ptr + unit + index, mask=is_here, other=0) != 0)
        write_zeros(unit + index, is_here & (is_read == 0), logprob_ptr, entropy_ptr, peak_ptr, log_sum_ptr)
        wanted = tl.sum(is_read.to(tl.int32) << index, 0)
    while unit < units:
        group = unit
        item = 0
        if SEGMENTS > 1:
            group, item = unit_at(unit, groups, tl.minimum(lag, groups), ITEMS)
        if mask_ptr is not None and TOGETHER == 1:
            # masked rows come in runs, in which whole multiprocessors would have nothing to read
            group = spread_out(group, groups, step, inverse, CHUNK)
        first_row = group * GROUP
        ends = False
        if SEGMENTS == 1 or item < ITEMS:
            row = first_row + item // SEGMENTS
            is_active = GROUP == 1 or row < places
            if active_ptr is not None:
                row = tl.load(active_ptr + row)
                if SEGMENTS == 1:
                    # always so; with the branch sequences of 32000 tokens take 1.5% less
                    is_active = row >= 0
            if mask_ptr is not None:
                if TOGETHER > 1:
                    is_active = wanted % 2 != 0
                    wanted //= 2
                else:
                    is_active &= tl.load(mask_ptr + row, mask=is_active, other=0) != 0
                if SEGMENTS == 1 and TOGETHER == 1:
                    write_zeros(row, is_active == 0, logprob_ptr, entropy_ptr, peak_ptr, log_sum_ptr)
            # before the row is read: a division takes long
            outer = 0 if FLAT else row // inner
            if is_active:
                row_ptr = start_of(row, outer, logits_ptr, inner, stride_outer, stride_inner, FLAT, SEQUENCES)
                part = item % SEGMENTS
                # a row of one segment ends where it is read, and the target's logit comes along
                target = tl.load(targets_ptr + row) if SEGMENTS == 1 else None
                m, n, r, e, logit = read_segment(
                    row_ptr,
                    bias_ptr,
                    target,
                    part,
                    alpha,
                    least,
                    squeeze.to(ACC),
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
                if SEGMENTS > 1:
                    leave_sets(m, n, r, e, sets_ptr + row.to(tl.int64) * ROW_WORDS, part, alpha, least, PACKED > 0)
                else:
                    w_target, finer = target_w(
                        logit, bias_ptr, target, True, squeeze, ACC, SOFTCAP, PAIRS, PACKED, VOCAB
                    )
                    # which of the two is faster here, only a clock tells (bench/NOTES.md)
                    INTEGERS: tl.constexpr = not (SEQUENCES or tl.float16 == ELEMENT)
                    m, n, r, e = merge((m,), (n,), (r,), (e,), alpha, least, INTEGERS)
                    log_sum, mean = moments(m, n, r, e, alpha, least)
                    write_results(
                        row, True, m, log_sum, mean, k, w_target, finer, logprob_ptr, entropy_ptr, peak_ptr, log_sum_ptr
                    )
                    if PAIRS and not SOFTCAP and tl.abs(m * alpha) > NEAR:
                        log_sum = log_of_peaks(row_ptr, m, VOCAB, LANES)
                        write_results(
                            row,
                            True,
                            m,
                            log_sum,
                            0.0,
                            k,
                            w_target,
                            finer,
                            logprob_ptr,
                            entropy_ptr,
                            peak_ptr,
                            log_sum_ptr,
                        )
                    ends = True
        else:
            row = first_row
            if active_ptr is not None:
                row = tl.load(active_ptr + row)
            outer = 0 if FLAT else row // inner
            # A warp for each row. Addresses are those of places side by side, of which the first is wanted: so the
            # compiler leaves all numbers in the threads that have them.
            lane = tl.arange(0, 32)[None, :]
            warps = tl.arange(0, LANES // 32)
            rows_here = row + warps
            row_is_here = (warps < GROUP) & (first_row + warps < places)
            row_is_read = row_is_here
            if mask_ptr is not None:
                row_is_read &= tl.load(mask_ptr + rows_here, mask=row_is_here, other=0) != 0
            target = tl.load(targets_ptr + rows_here, mask=row_is_read, other=0)[:, None] + lane
            place = rows_here[:, None] + lane
            here = row_is_here[:, None] & (lane == 0)
            is_read = row_is_read[:, None] & (lane == 0)
            outers_here = 0 if FLAT else rows_here // inner
            row_ptr = start_of(rows_here, outers_here, logits_ptr, inner, stride_outer, stride_inner, FLAT, SEQUENCES)
            row_ptr = row_ptr[:, None]
            logit = target_entry(row_ptr, target, is_read, VOCAB)
            words_ptr = sets_ptr + rows_here[:, None].to(tl.int64) * ROW_WORDS
            m, n, r, e = take_sets(words_ptr, lane, row_is_read[:, None], alpha, least, ACC, SETS, PACKED > 0)
            w_target, finer = target_w(logit, bias_ptr, target, is_read, squeeze, ACC, SOFTCAP, PAIRS, PACKED, VOCAB)
            log_sum, mean = moments(m, n, r, e, alpha, least)
            write_results(
                place, is_read, m, log_sum, mean, k, w_target, finer, logprob_ptr, entropy_ptr, peak_ptr, log_sum_ptr
            )
            clear_words(words_ptr, row_is_read[:, None], ROW_WORDS)
            if mask_ptr is not None:
                write_zeros(place, here & (is_read == 0), logprob_ptr, entropy_ptr, peak_ptr, log_sum_ptr)
            if PAIRS and not SOFTCAP:
                is_far = is_read & (tl.abs(m * alpha) > NEAR)
                if tl.max(is_far.to(tl.int32)) > 0:
                    write_far_rows(
                        row,
                        is_far,
                        m,
                        k,
                        w_target,
                        logits_ptr,
                        logprob_ptr,
                        entropy_ptr,
                        peak_ptr,
                        log_sum_ptr,
                        inner,
                        stride_outer,
                        stride_inner,
                        FLAT,
                        SEQUENCES,
                        VOCAB,
                        LANES,
                        GROUP,
                    )
            ends = True
        if SEQUENCES and ends:
            tl.debug_barrier()
            done = tl.atomic_add(arrivals_ptr + outer, 1, sem="acq_rel") + 1
            if done == tl.load(pending_ptr + outer):
                tl.store(arrivals_ptr + outer, 0)
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
            unit = tl.atomic_add(counters_ptr + 1, 1, sem="relaxed")
        elif TOGETHER > 1:
            unit += 1
        else:
            # no more than one turn, said so that the compiler sees it
            unit = units
