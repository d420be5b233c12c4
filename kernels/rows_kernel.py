"""Forward: log-prob and entropy of rows of logits, each element read once.

For logits z = k · w (w: the row after bias and softcap; k: what is left of scale and temperature) and m = max w:

    logprob = k (w_y − m) − log Σ e^(k (w − m))        entropy = log Σ e^(k (w − m)) − Σ p k (w − m)

by sums of exponentials in one pass with running rescaling (the online softmax), as in `rows_sums`. Bytes: the active
rows once, and 16 bytes out per row.

A program takes a row or, where rows are long, a segment: rows are cut into equal ones, by the vocabulary alone. Who has
read a segment leaves its sums and ends (`rows_exchange`); a program that starts later merges those of a row, in order.
So a row's bits depend neither on the number of rows nor on its place, few rows fill the device too, programs that read
do nothing else, and little is left to wait for when the last rows end.
"""

import triton
import triton.language as tl

from entropy_fast.kernels.device import LOG2E
from entropy_fast.kernels.plan import finish_sequence, write_zeros
from entropy_fast.kernels.rows_exchange import leave_sets, take_sets
from entropy_fast.kernels.rows_pairs import FAR, NEAR, peaks_alone
from entropy_fast.kernels.rows_segments import read_segment, softcapped, target_entry
from entropy_fast.kernels.rows_sums import FLOOR, merge, moments


@triton.jit
def unit_at(unit, places, lag, SEGMENTS: tl.constexpr):
    """What a unit of work is: which row, and which segment of it to read, or with part SEGMENTS that the row ends.

    First `lag` rows are read, at most all. Then, with every row that is read, the one `lag` rows before it ends, whose
    sets are there by now; and at last those rows end that are left. Units are begun in order: whoever waits for a row's
    sets does so for units that others have begun.
    """
    STEP: tl.constexpr = SEGMENTS + 1
    later = unit - lag * SEGMENTS
    last = later - (places - lag) * STEP
    place = later // STEP
    part = later - place * STEP
    place += tl.where(part < SEGMENTS, lag, 0)
    # before any ends, and after all are read
    place = tl.where(later < 0, unit // SEGMENTS, tl.where(last < 0, place, places - lag + last))
    part = tl.where(later < 0, unit % SEGMENTS, tl.where(last < 0, part, SEGMENTS))
    return place, part


@triton.jit
def start_of(row, logits_ptr, inner, stride_outer, stride_inner, FLAT: tl.constexpr, SEQUENCES: tl.constexpr):
    """The outer index of a row, and where its logits begin."""
    outer = 0 if FLAT else row // inner
    # the token in a column is scored by the logits of the column before it
    column = row - outer * inner - SEQUENCES
    row_ptr = logits_ptr + column.to(tl.int64) * stride_inner
    if not FLAT:
        row_ptr += outer.to(tl.int64) * stride_outer
    return outer, row_ptr


@triton.jit(do_not_specialize=["rows", "inner", "stride_outer", "stride_inner", "sequences", "lag"])
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
    """One program a unit of work: a row or, of rows that are cut, a segment or the end of a row.

    With a list, whoever is free takes the next unit; with a mask, programs whose row is masked end at once.
    """
    ROW_WORDS: tl.constexpr = 4 * SEGMENTS * (LANES // 32)
    END: tl.constexpr = SEGMENTS if SEGMENTS > 1 else 0
    k = tl.full([], factor, ACC)
    squeeze = tl.full([], squeeze, ACC)
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
    units = places * (SEGMENTS + (SEGMENTS > 1))
    while unit < units:
        row = unit
        part = 0
        if SEGMENTS > 1:
            row, part = unit_at(unit, places, tl.minimum(lag, places), SEGMENTS)
        if active_ptr is not None:
            row = tl.load(active_ptr + row)
        is_active = row >= 0
        if mask_ptr is not None:
            is_active = tl.load(mask_ptr + row) != 0
            write_zeros(row, (is_active == 0) & (part == END), logprob_ptr, entropy_ptr, peak_ptr, log_sum_ptr)
        if is_active:
            outer, row_ptr = start_of(row, logits_ptr, inner, stride_outer, stride_inner, FLAT, SEQUENCES)
            row_sets_ptr = None if SEGMENTS == 1 else sets_ptr + row.to(tl.int64) * ROW_WORDS
            # a row of one segment ends where it is read, and the target's logit comes along
            early_target = tl.load(targets_ptr + row) if SEGMENTS == 1 else None
            if SEGMENTS == 1 or part < SEGMENTS:
                m, n, r, e, logit = read_segment(
                    row_ptr,
                    bias_ptr,
                    early_target,
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
                if SEGMENTS == 1:
                    m, n, r, e = merge(m, n, r, e, alpha, least, 0)
                else:
                    leave_sets(m, n, r, e, row_sets_ptr, part, alpha, least, PACKED > 0)
            if part == END:
                target = tl.load(targets_ptr + row) if SEGMENTS > 1 else early_target
                if SEGMENTS > 1:
                    logit = target_entry(row_ptr, target, VOCAB)
                    SETS: tl.constexpr = SEGMENTS * (LANES // 32)
                    m, n, r, e = take_sets(row_sets_ptr, alpha, least, ACC, SETS, LANES, PACKED > 0)
                w_target = logit.to(ACC)
                if bias_ptr is not None:
                    w_target += target_entry(bias_ptr, target, VOCAB).to(ACC)
                w_target = softcapped(w_target, squeeze, SOFTCAP)
                if PAIRS and tl.abs(m * alpha) > NEAR:
                    n, r, e = peaks_alone(row_ptr, m, VOCAB, LANES)
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
        # without a list no more than one turn, said so that the compiler sees it
        unit = units if active_ptr is None else tl.atomic_add(counters_ptr + 1, 1, sem="relaxed")
