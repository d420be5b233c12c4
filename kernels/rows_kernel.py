"""Forward: log-prob and entropy of rows of logits, each element read once.

For logits z = k · w (w: the row after bias and softcap; k: what is left of scale and temperature), peak M = max w and
d = w − M, in one pass with running rescaling (the online softmax):

    s = Σ e^(k d),  e = Σ e^(k d) d        logprob = k d_y − log s        entropy = log s − k e / s

Bytes: the active rows once, and 16 bytes out per row.

Each of LANES lanes keeps its own running sums over UNROLL × WIDTH elements a step, so the loop has no exchange between
threads, one exp2 an element and 16-byte loads; lanes merge once per segment. A row is cut into segments by its
vocabulary alone, and segments merge in order: in the one program that holds the row or, when rows are too few to fill
the device, in the last to finish of the programs that hold a segment each. Both are the same compiled code, so a row's
bits depend neither on the number of rows nor on its place.

One loop takes all blocks of a row, the last, partial one too. The next block's loads are issued before a block is
added, to registers: no thread waits for another in the loop, as it would with loads to shared memory. The target's
logit is requested behind the first blocks, so nothing waits for memory before them or after the loop. 16-bit logits
without bias or softcap stay in words of two until they are added (PAIRS, see `rows_pairs`). 16-bit rows that start on
any 2 bytes are read as aligned words of 4 bytes, each shifted into the next (WORDS, see `rows_loads`); that takes the
registers of the block ahead.
"""

import triton
import triton.language as tl

from entropy_fast.kernels.device import LOG2E, absorb, left_at, log_of_sum, merge, merge_lanes, tanh
from entropy_fast.kernels.plan import finish_sequence
from entropy_fast.kernels.rows_loads import load_block, load_up_to
from entropy_fast.kernels.rows_pairs import absorb_pairs, keep_first

# The peak of an empty set: no finite float32 lies below it.
FLOOR = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def empty_sets(LANES: tl.constexpr, ACC: tl.constexpr):
    """A vector of sets without elements."""
    zeros = tl.zeros([LANES], ACC)
    return tl.full([LANES], FLOOR, ACC), zeros, zeros, zeros


@triton.jit
def softcapped(x, squeeze, SOFTCAP: tl.constexpr):
    """w of x, which holds the bias already."""
    if SOFTCAP:
        x = tanh(x * squeeze)
    return x


@triton.jit(do_not_specialize=["rows", "inner", "vocab", "stride_outer", "stride_inner", "split_below", "sequences"])
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
    partials_ptr,
    pending_ptr,
    eos_column_ptr,
    sums_ptr,
    rows,
    inner,
    vocab,
    stride_outer,
    stride_inner,
    split_below,
    sequences,
    factor: tl.float64,
    squeeze: tl.float64,
    ACC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    FLAT: tl.constexpr,
    PAIRS: tl.constexpr,
    PACKED: tl.constexpr,
    SEQUENCES: tl.constexpr,
    INCLUDE_EOS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """One program a row, or a segment of a row where rows are few.

    With a list, whoever is free takes the next row; with a mask, a program whose row is masked ends at once.
    """
    BLOCK: tl.constexpr = UNROLL * LANES * WIDTH
    STEPS: tl.constexpr = 1 if WORDS else 2
    k = tl.full([], factor, ACC)
    squeeze = tl.full([], squeeze, ACC)
    alpha = tl.full([], factor * LOG2E, ACC)
    if not WORDS:
        # multiples of WIDTH already; said in a way that the compiler understands, so that it emits wide loads
        stride_outer = stride_outer // WIDTH * WIDTH
        stride_inner = stride_inner // WIDTH * WIDTH
    if EVEN:
        vocab = vocab // WIDTH * WIDTH
    blocks = tl.cdiv(vocab, BLOCK)
    per_segment = tl.cdiv(blocks, SEGMENTS * STEPS) * STEPS
    if active_ptr is not None:
        rows = tl.load(counters_ptr)
    parts = tl.where(rows < split_below, SEGMENTS, 1)
    units = rows * parts
    unit = tl.program_id(0)
    if mask_ptr is not None:
        is_active = tl.load(mask_ptr + unit) != 0
        tl.store(logprob_ptr + unit, 0.0, mask=is_active == 0)
        tl.store(entropy_ptr + unit, 0.0, mask=is_active == 0)
        if peak_ptr is not None:
            tl.store(peak_ptr + unit, 0.0, mask=is_active == 0)
            tl.store(log_sum_ptr + unit, 0.0, mask=is_active == 0)
        units = tl.where(is_active, units, 0)
    while unit < units:
        # divisions by what the compiler knows: a program's first loads wait for all of this
        index = tl.where(parts == 1, unit, unit // SEGMENTS)
        part = unit - index * parts
        row = index
        if active_ptr is not None:
            row = tl.load(active_ptr + index)
        outer = 0 if FLAT else row // inner
        # the token in a column is scored by the logits of the column before it
        column = row - outer * inner - SEQUENCES
        row_ptr = logits_ptr + column.to(tl.int64) * stride_inner
        if not FLAT:
            row_ptr += outer.to(tl.int64) * stride_outer
        words_ptr = None
        phase = 0
        if WORDS:
            address = row_ptr.to(tl.int64)
            phase = (address % 4 // 2).to(tl.int32)
            words_ptr = (address // 4 * 4).to(tl.pointer_type(tl.int32))
        elif PAIRS:
            words_ptr = row_ptr.to(tl.pointer_type(tl.int32))

        m_row, s_row, r_row, e_row = empty_sets(LANES, ACC)
        first = part * per_segment
        last = tl.where(parts == 1, blocks, min(first + per_segment, blocks))
        end = min(last * BLOCK, vocab)
        if not WORDS:
            ahead = load_block(row_ptr, words_ptr, phase, first * BLOCK, end, BLOCK, WIDTH, PAIRS, WORDS)
        # Requested behind the loads of the first two blocks, so that neither waits for it; a segment has one step at
        # least, even behind the row's end. The logit is NaN where there is no such token, and until it is read.
        target = tl.full([], -1, targets_ptr.dtype.element_ty)
        raw_target = tl.full([], float("nan"), logits_ptr.dtype.element_ty)
        for segment in tl.range(part, part + tl.where(parts == 1, SEGMENTS, 1), num_stages=1):
            m, s, r, e = empty_sets(LANES, ACC)
            segment_first = segment * per_segment
            segment_last = max(min(segment_first + per_segment, last), first + 1)
            for step in tl.range(segment_first, segment_last, STEPS, num_stages=1):
                # two blocks a step, because the registers of one are loaded while those of the other are added; the
                # second may lie behind the end, and adds nothing
                for i in tl.static_range(STEPS):
                    start = (step + i) * BLOCK
                    if WORDS:
                        w = load_block(row_ptr, words_ptr, phase, start, end, BLOCK, WIDTH, PAIRS, WORDS)
                    else:
                        w = ahead
                        ahead = load_block(row_ptr, words_ptr, phase, start + BLOCK, end, BLOCK, WIDTH, PAIRS, WORDS)
                    if step == first:
                        if i == 0:
                            target = tl.load(targets_ptr + row)
                        if i == STEPS - 1:
                            known = (target >= 0) & (target < vocab)
                            raw_target = tl.load(row_ptr + target, mask=known, other=float("nan"))
                    left = end - start
                    if PAIRS:
                        w = tl.reshape(w, [UNROLL, LANES, WIDTH // 2])
                        if left < BLOCK:
                            w = keep_first(w, left, row_ptr.dtype.element_ty)
                        m, s, r, e = absorb_pairs(w, m, s, r, e, alpha, row_ptr.dtype.element_ty, PACKED)
                    else:
                        w = w.to(ACC)
                        if bias_ptr is not None:
                            w += load_up_to(bias_ptr + start, left, BLOCK, EVEN, "").to(ACC)
                        w = tl.reshape(softcapped(w, squeeze, SOFTCAP), [UNROLL, LANES, WIDTH])
                        # absorbed in either branch: before a common one the compiler makes the first a select an
                        # element
                        if left < BLOCK:
                            w = tl.where(left_at(left, w.shape, 1) > 0, w, -float("inf"))
                            m, s, r, e = absorb(w, m, s, r, e, alpha)
                        else:
                            m, s, r, e = absorb(w, m, s, r, e, alpha)
            if segment == part:
                m_row, s_row, r_row, e_row = m, s, r, e
            else:
                m_row, s_row, r_row, e_row = merge(m_row, s_row, r_row, e_row, m, s, r, e, alpha)

        w_target = raw_target.to(ACC)
        if bias_ptr is not None:
            known = (target >= 0) & (target < vocab)
            w_target += tl.load(bias_ptr + target, mask=known, other=float("nan")).to(ACC)
        w_target = softcapped(w_target, squeeze, SOFTCAP)
        complete = parts == 1
        if SEGMENTS > 1:  # noqa: SIM102 (one is known to the compiler, the other is not)
            if parts > 1:
                partial_ptr = partials_ptr + index * (4 * SEGMENTS * LANES) + tl.arange(0, LANES)
                own_ptr = partial_ptr + part * (4 * LANES)
                tl.store(own_ptr, m_row)
                tl.store(own_ptr + LANES, s_row)
                tl.store(own_ptr + 2 * LANES, r_row)
                tl.store(own_ptr + 3 * LANES, e_row)
                tl.debug_barrier()
                complete = tl.atomic_add(counters_ptr + 2 + index, 1, sem="acq_rel") == parts - 1
                if complete:
                    m_row, s_row, r_row, e_row = empty_sets(LANES, ACC)
                    for segment in range(SEGMENTS):
                        # other multiprocessors wrote these: read them past this one's own cache
                        own_ptr = partial_ptr + segment * (4 * LANES)
                        m = tl.load(own_ptr, cache_modifier=".cg")
                        s = tl.load(own_ptr + LANES, cache_modifier=".cg")
                        r = tl.load(own_ptr + 2 * LANES, cache_modifier=".cg")
                        e = tl.load(own_ptr + 3 * LANES, cache_modifier=".cg")
                        m_row, s_row, r_row, e_row = merge(m_row, s_row, r_row, e_row, m, s, r, e, alpha)
        if complete:
            peak, s_all, r_all, e_all = merge_lanes(m_row, s_row, r_row, e_row, alpha)
            # no finite logit: s is 0; NaN or +inf among them: s is NaN; a target that is no token: its logit is NaN
            s_all = tl.where((s_all > 0) & (w_target == w_target), s_all, float("nan"))
            log_sum = log_of_sum(s_all, r_all)
            tl.store(logprob_ptr + row, k * (w_target - peak) - log_sum)
            tl.store(entropy_ptr + row, log_sum - k * e_all / s_all)
            if peak_ptr is not None:
                tl.store(peak_ptr + row, peak)
                tl.store(log_sum_ptr + row, log_sum)
            if SEQUENCES:
                tl.debug_barrier()
                done = tl.atomic_add(counters_ptr + 2 + split_below + outer, 1, sem="acq_rel") + 1
                if done == tl.load(pending_ptr + outer):
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
            unit += tl.num_programs(0)
