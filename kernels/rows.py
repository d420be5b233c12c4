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

One loop takes all blocks of a row, the last, partial one too, and requests the target's logit with the first: nothing
waits for memory after it. 16-bit logits without bias or softcap stay in words of two until they are added (PAIRS, see
`rows_pairs`). 16-bit rows that start on any 2 bytes are read as aligned words of 4 bytes, each shifted into the next
(WORDS, see `load_words`): each element that is loaded by itself would hold a register while in flight.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from entropy_fast.kernels.device import LOG2E, absorb, left_at, log_of_sum, merge, merge_lanes, tanh
from entropy_fast.kernels.launch import Repeated, Variant, empties
from entropy_fast.kernels.plan import (
    BLOCK,
    ActiveRows,
    Sequences,
    finish_sequence,
    list_active,
    list_launch,
    plan_sequences,
)
from entropy_fast.kernels.rows_pairs import absorb_pairs, halves, keep_first
from entropy_fast.kernels.settings import (
    Settings,
    forward_settings,
    multiprocessors,
    registers,
    takes_pairs,
    vector_width,
)
from entropy_fast.reference.rows import RowStats, arithmetic_dtype
from entropy_fast.reference.transform import Transform

# The peak of an empty set: no finite float32 lies below it.
FLOOR = tl.constexpr(-3.4028234663852886e38)
TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def empty_sets(LANES: tl.constexpr, ACC: tl.constexpr):
    """A vector of sets without elements."""
    zeros = tl.zeros([LANES], ACC)
    return tl.full([LANES], FLOOR, ACC), zeros, zeros, zeros


@triton.jit
def load_up_to(pointer, left, BLOCK: tl.constexpr, PIPELINED: tl.constexpr, POLICY: tl.constexpr):
    """Elements [BLOCK], the first `left` of them read.

    Loads in branches are not pipelined, so those that shall be have a mask in every block. Where each element has a
    load of its own, and so a mask, only the last block has them.
    """
    place = tl.arange(0, BLOCK)
    if PIPELINED:
        x = tl.load(pointer + place, mask=place < left, other=0, eviction_policy=POLICY)
    elif left >= BLOCK:
        x = tl.load(pointer + place, eviction_policy=POLICY)
    else:
        x = tl.load(pointer + place, mask=place < left, other=0, eviction_policy=POLICY)
    return x


@triton.jit
def softcapped(x, squeeze, SOFTCAP: tl.constexpr):
    """w of x, which holds the bias already."""
    if SOFTCAP:
        x = tanh(x * squeeze)
    return x


@triton.jit
def load_word(words_ptr, word, skip, phase, left):
    """Words `word + skip` of a row; where `left` is not None, those alone that hold one of so many elements."""
    pointer = (words_ptr + skip) + word
    if left is None:
        value = tl.load(pointer, eviction_policy="evict_first")
    else:
        inside = 2 * word < left + phase - 2 * skip
        value = tl.load(pointer, mask=inside, other=0, eviction_policy="evict_first")
    return value


@triton.jit
def shifted(low, high, phase):
    """The 16-bit elements `phase` and `phase` + 1 of the four in two words, as a word."""
    both = low.to(tl.uint32, bitcast=True).to(tl.uint64) | (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)
    # one funnel shift
    return (both >> (16 * phase).to(tl.uint64)).to(tl.int32)


@triton.jit
def load_words(words_ptr, phase, left, BLOCK: tl.constexpr):
    """16-bit elements [BLOCK] of a row in words of two, at `phase` (0 or 1) elements after `words_ptr`.

    A lane takes eight elements. Their pairs may lie across two words. The fifth word is loaded at `phase` words after
    the fourth, so where the row starts on 4 bytes it is the same one, and no word is read that holds nothing of the
    row; words of memory begin and end where allocations do.
    """
    word = tl.arange(0, BLOCK // 8) * 4
    a = load_word(words_ptr, word, 0, phase, left)
    b = load_word(words_ptr, word, 1, phase, left)
    c = load_word(words_ptr, word, 2, phase, left)
    d = load_word(words_ptr, word, 3, phase, left)
    last = load_word(words_ptr, word, 3 + phase, phase, left)
    even = tl.join(shifted(a, b, phase), shifted(c, d, phase))
    odd = tl.join(shifted(b, c, phase), shifted(d, last, phase))
    return tl.reshape(tl.join(even, odd), [BLOCK // 2])


@triton.jit
def elements(words, element: tl.constexpr):
    """The 16-bit elements of words [N] in float32, [2 N]."""
    first, second = halves(words, element)
    return tl.reshape(tl.join(first, second), [2 * words.shape[0]])


@triton.jit
def load_block(
    row_ptr,
    words_ptr,
    phase,
    start,
    left,
    loaded,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    WORDS: tl.constexpr,
    PIPELINED: tl.constexpr,
):
    """Elements [BLOCK] of a row from `start` on, of which `left` exist; with PAIRS as words [BLOCK // 2] of two.

    `loaded` is `left` rounded up to whole loads: as many elements may be read. Of one dimension, so that a vector stays
    in one thread, whatever layout the compiler likes for three.
    """
    if WORDS:
        if left < BLOCK:
            w = load_words(words_ptr + start // 2, phase, left, BLOCK)
        else:
            w = load_words(words_ptr + start // 2, phase, None, BLOCK)
        if not PAIRS:
            w = elements(w, row_ptr.dtype.element_ty)
    elif PAIRS:
        w = load_up_to(words_ptr + start // 2, loaded // 2, BLOCK // 2, PIPELINED, "evict_first")
    else:
        w = load_up_to(row_ptr + start, loaded, BLOCK, PIPELINED, "evict_first")
    return w


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
    PAIRS: tl.constexpr,
    PACKED: tl.constexpr,
    SEQUENCES: tl.constexpr,
    INCLUDE_EOS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
    STAGES: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """One program a row, or a segment of a row where rows are few.

    With a list, whoever is free takes the next row; with a mask, a program whose row is masked ends at once.
    """
    BLOCK: tl.constexpr = UNROLL * LANES * WIDTH
    k = tl.full([], factor, ACC)
    squeeze = tl.full([], squeeze, ACC)
    alpha = tl.full([], factor * LOG2E, ACC)
    if not WORDS:
        # multiples of WIDTH already; said in a way that the compiler understands, so that it emits wide loads
        stride_outer = stride_outer // WIDTH * WIDTH
        stride_inner = stride_inner // WIDTH * WIDTH
    if EVEN:
        vocab = vocab // WIDTH * WIDTH
    # what may be read of a row: whole loads, which end within the 16 bytes that hold its last element
    loaded = tl.cdiv(vocab, WIDTH) * WIDTH
    blocks = tl.cdiv(vocab, BLOCK)
    per_segment = tl.cdiv(blocks, SEGMENTS)
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
        index = unit // parts
        part = unit % parts
        row = index
        if active_ptr is not None:
            row = tl.load(active_ptr + index)
        target = tl.load(targets_ptr + row)
        outer = row // inner
        # the token in a column is scored by the logits of the column before it
        column = row - outer * inner - SEQUENCES
        row_ptr = logits_ptr + outer.to(tl.int64) * stride_outer + column.to(tl.int64) * stride_inner
        words_ptr = None
        phase = 0
        if WORDS:
            address = row_ptr.to(tl.int64)
            phase = (address % 4 // 2).to(tl.int32)
            words_ptr = (address // 4 * 4).to(tl.pointer_type(tl.int32))
        elif PAIRS:
            words_ptr = row_ptr.to(tl.pointer_type(tl.int32))

        # sums of the segment at hand and, where there are several, of those that are finished
        m, s, r, e = empty_sets(LANES, ACC)
        m_row, s_row, r_row, e_row = empty_sets(LANES, ACC)
        known = (target >= 0) & (target < vocab)
        # NaN where it is no token's, and until it is read
        raw_target = tl.full([], float("nan"), logits_ptr.dtype.element_ty)
        first = part * per_segment
        last = tl.where(parts == 1, blocks, min(first + per_segment, blocks))
        to_merge = per_segment
        # one block at least, even behind the row's end: with the first the target's logit is requested
        for block in tl.range(first, max(last, first + 1), num_stages=STAGES):
            start = block * BLOCK
            left = vocab - start
            w = load_block(row_ptr, words_ptr, phase, start, left, loaded - start, BLOCK, PAIRS, WORDS, STAGES > 1)
            if block == first:
                raw_target = tl.load(row_ptr + target, mask=known, other=float("nan"))
            if PAIRS:
                w = tl.reshape(w, [UNROLL, LANES, WIDTH // 2])
                if left < BLOCK:
                    w = keep_first(w, left, row_ptr.dtype.element_ty)
                m, s, r, e = absorb_pairs(w, m, s, r, e, alpha, row_ptr.dtype.element_ty, PACKED)
            else:
                w = w.to(ACC)
                if bias_ptr is not None:
                    w += load_up_to(bias_ptr + start, left, BLOCK, EVEN and STAGES > 1, "").to(ACC)
                w = tl.reshape(softcapped(w, squeeze, SOFTCAP), [UNROLL, LANES, WIDTH])
                # absorbed in either branch: before a common one the compiler makes the first a select an element
                if left < BLOCK:
                    w = tl.where(left_at(left, w.shape, 1) > 0, w, -float("inf"))
                    m, s, r, e = absorb(w, m, s, r, e, alpha)
                else:
                    m, s, r, e = absorb(w, m, s, r, e, alpha)
            if SEGMENTS > 1:
                to_merge -= 1
                if to_merge == 0:
                    to_merge = per_segment
                    m_row, s_row, r_row, e_row = merge(m_row, s_row, r_row, e_row, m, s, r, e, alpha)
                    m, s, r, e = empty_sets(LANES, ACC)
        m_row, s_row, r_row, e_row = merge(m_row, s_row, r_row, e_row, m, s, r, e, alpha)

        w_target = raw_target.to(ACC)
        if bias_ptr is not None:
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


def row_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    transform: Transform,
    settings: Settings | None = None,
    for_backward: bool = True,
) -> RowStats:
    """Log-prob of the target and entropy of every row; the contract of `reference.rows.row_stats`.

    Args:
        logits: (outer, inner, vocab), the last dimension contiguous, any other strides.
        targets: (outer, inner), int32 or int64, contiguous.
        mask: (outer, inner), bool, contiguous, or None.
        bias: (vocab,), contiguous, or None.
        transform: what turns `logits + bias` into the logits of the softmax.
        settings: launch settings; from the table by default.
        for_backward: whether peak and log_sum are wanted; without, they are None.
    """
    forward = Forward(logits, targets, mask, bias, transform, settings, for_backward)
    return forward(logits, targets, mask, bias)


def sequence_stats(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor,
    prompt_lens: torch.Tensor,
    eos_token_ids: torch.Tensor,
    include_eos: bool,
    stop_at_eos: bool,
    bias: torch.Tensor | None,
    transform: Transform,
    settings: Settings | None = None,
) -> tuple[RowStats, Sequences]:
    """Statistics of the token in every column, and their sums over each sequence.

    Args:
        logits: (N, T, vocab), the last dimension contiguous; the token in column j is scored by column j − 1.
        tokens: (N, T), and so on: see `plan.plan_sequences`.
        attention_mask: see there.
        prompt_lens: see there.
        eos_token_ids: see there.
        include_eos: see there.
        stop_at_eos: see there.
        bias: (vocab,), contiguous, or None.
        transform: what turns `logits + bias` into the logits of the softmax.
        settings: launch settings; from the table by default.
    """
    settings = settings or forward_settings(logits)
    with torch.cuda.device_of(logits):
        forward = Forward(logits, tokens, None, bias, transform, settings, include_eos=include_eos, sequences=True)
        out = forward.empty_stats()
        counters = torch.zeros(
            counter_count(settings, logits.device) + len(tokens), dtype=torch.int32, device=logits.device
        )
        active, sequences = plan_sequences(
            tokens, attention_mask, prompt_lens, eos_token_ids, include_eos, stop_at_eos, out, counters
        )
        if tokens.numel() > 0:
            forward.launch(logits, tokens, None, bias, out, active, sequences)
    return out, sequences


def is_plain(bias: torch.Tensor | None, transform: Transform) -> bool:
    """Whether neither bias nor softcap comes before the softmax."""
    return bias is None and transform.softcap is None


@cache
def split_below(settings: Settings, device: torch.device) -> int:
    """With fewer active rows than this, programs share rows."""
    return int(multiprocessors(device) * settings.split) if settings.segments > 1 else 0


def counter_count(settings: Settings, device: torch.device) -> int:
    """Counters of a launch: active rows, the next row to take, arrivals at each row that is split.

    Those of arrivals at each sequence follow.
    """
    return 2 + split_below(settings, device)


class Forward:
    """`row_stats`, or the kernel of `sequence_stats`, with all that does not depend on where tensors lie worked out.

    It is called with tensors that have the shapes, strides, dtypes, device and starts modulo 16 bytes of those it is
    made for, and holds none of them. The arguments are those of `row_stats`.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        mask: torch.Tensor | None,
        bias: torch.Tensor | None,
        transform: Transform,
        settings: Settings | None = None,
        for_backward: bool = True,
        include_eos: bool = True,
        sequences: bool = False,
    ) -> None:
        plain = is_plain(bias, transform)
        settings = settings or forward_settings(logits)
        self._device = device = logits.device
        self._rows = rows = targets.numel()
        self._for_backward = for_backward
        dtype = arithmetic_dtype(logits.dtype)
        self._empty = empties(targets.shape, dtype, device)
        outer, inner, vocab = logits.shape
        few = split_below(settings, device)
        self._segments = segments = settings.segments
        # where rows may be shared, how depends on the number of active ones, which a list counts
        listed = sequences or (mask is not None and segments > 1)
        # rows that programs share; with a list at most so many
        split = min(rows, few) if listed or rows < few else 0
        counters = counter_count(settings, device)
        self._counters = empties((counters,), torch.int32, device)
        self._listing = list_launch(rows, counters) if listed and not sequences else None
        self._partials = None
        if segments > 1 and split > 0:
            self._partials = empties((split, segments, 4, settings.lanes), dtype, device)
        if listed:
            # resident programs walk a list whose length is known on the device alone
            programs = min(rows * segments, multiprocessors(device) * settings.resident)
        else:
            # the hardware hands out the rows
            programs = rows + split * (segments - 1)
        self._kernel = Repeated(
            row_stats_kernel,
            programs,
            (rows, inner, vocab, logits.stride(0), logits.stride(1), few, outer if sequences else 0),
            (transform.factor, transform.squeeze or 0.0),
            _variant(
                settings,
                dtype,
                logits.element_size(),
                vector_width(logits),
                vocab,
                takes_pairs(logits, plain),
                bias is not None,
                transform.softcap is not None,
                sequences,
                include_eos,
                device,
            ),
        )

    def __call__(
        self, logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None, bias: torch.Tensor | None
    ) -> RowStats:
        """Statistics of every row."""
        device = self._device
        if device.index is not None and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(logits, targets, mask, bias)
        out = self.empty_stats()
        if self._rows == 0:
            return out
        active = None
        if self._listing is not None:
            active = list_active(mask, out, self._counters(), self._listing)
        self.launch(logits, targets, mask, bias, out, active)
        return out

    def empty_stats(self) -> RowStats:
        """Room for the results, on the current device."""
        new = self._empty
        return RowStats(new(), new(), new(), new()) if self._for_backward else RowStats(new(), new(), None, None)

    def launch(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        mask: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: RowStats,
        active: ActiveRows | None,
        sequences: Sequences | None = None,
    ) -> None:
        """Fill `out`, on the current device."""
        partials = None
        counters = None if active is None else active.counters
        if self._segments > 1:
            # split or not, the kernel is the same one, and so are the types of what it is given
            partials = out.logprob if self._partials is None else self._partials()
            if active is None:
                counters = partials.view(torch.int32) if self._partials is None else self._counters().zero_()
        self._kernel(
            logits,
            bias,
            targets,
            mask if active is None else None,
            *out,
            None if active is None else active.rows,
            counters,
            partials,
            *((None,) * 3 if sequences is None else (sequences.pending, sequences.eos_column, sequences.sums)),
        )


@cache
def _variant(
    settings: Settings,
    dtype: torch.dtype,
    itemsize: int,
    width: int,
    vocab: int,
    pairs: bool,
    has_bias: bool,
    softcap: bool,
    sequences: bool,
    include_eos: bool,
    device: torch.device,
) -> Variant:
    narrow = width * itemsize < 8
    words = settings.words and narrow and itemsize == 2
    width = 8 if words else width
    # what does not fit into the limit would spill
    crowded = itemsize == 8 or ((narrow or settings.warps < 8) and (has_bias or softcap or sequences))
    return Variant(
        {
            "ACC": TRITON_DTYPE[dtype],
            "SOFTCAP": softcap,
            "EVEN": not words and vocab % width == 0,
            "PAIRS": pairs and (words or width > 1),
            "PACKED": device.type == "cuda" and torch.version.hip is None,
            "SEQUENCES": sequences,
            "INCLUDE_EOS": include_eos,
            "SEGMENTS": settings.segments,
            "UNROLL": settings.unroll * (16 // itemsize) // width,
            "LANES": settings.lanes,
            "WIDTH": width,
            "WORDS": words,
            "STAGES": settings.stages,
            "SUM_BLOCK": min(BLOCK, 128 * settings.warps),
        },
        num_warps=settings.warps,
        **registers(None if crowded else settings.registers, device),
    )
