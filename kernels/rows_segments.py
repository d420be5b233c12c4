"""Reading a segment of a row of logits: each element once, into sets of sums that every lane keeps for itself.

Each of LANES lanes keeps its own sums over UNROLL × WIDTH elements a block, so that no thread waits for another until
the segment ends. The blocks of a segment are written out one by one, with loads to registers DEPTH blocks ahead and
without masks but where the row may end. What takes many instructions an element (bias, float64, other softcaps than
those of words) is a loop instead, which waits for no memory anyway.

16-bit logits without bias stay in words of two until they are added (PAIRS, see `rows_pairs` and `rows_softcap`). Rows
of them that start on any 2 bytes are read as aligned words of 4 bytes, each shifted into the next (WORDS, see
`rows_loads`).
"""

import triton
import triton.language as tl

from entropy_fast.kernels.rows_loads import load_block
from entropy_fast.kernels.rows_pairs import absorb_pairs, far_pair, sets_of
from entropy_fast.kernels.rows_sums import absorb, empty_sets, left_at
from entropy_fast.kernels.rows_words import finite, keep_first
from entropy_fast.kernels.tanh import tanh


@triton.jit
def target_entry(row_ptr, target, wanted, VOCAB: tl.constexpr):
    """The targets' entries of rows, of logits or bias, where they are wanted; NaN where there is no such token."""
    return tl.load(row_ptr + target, mask=wanted & (target >= 0) & (target < VOCAB), other=float("nan"))


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
    """The lanes' sets of a segment of a row; with a target, its logit too, before bias and softcap."""
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
    raw_target = tl.zeros([], ELEMENT)
    m, n, r, e = empty_sets(LANES, ACC)
    if WRITTEN_OUT:
        far = far_pair(alpha) if PAIRS and tl.bfloat16 == ELEMENT and not SOFTCAP else None
        peaks = None
        reference = None
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
            if i == DEPTH and target is not None:
                # Requested behind the first blocks, which so need not wait for it, nor anything for it at the end.
                # NVIDIA's assembler puts off what is needed late, the target's id and then its logit, until all sums
                # are done, but nothing beyond a barrier.
                tl.debug_barrier()
                raw_target = target_entry(row_ptr, target, True, VOCAB)
                tl.debug_barrier()
            if i >= DEPTH:
                left = length - (i - DEPTH) * BLOCK
                w = tl.reshape(ahead[0], [ahead[0].shape[0] // (LANES * ITEMS), LANES, ITEMS])
                ahead = ahead[1:]
                may_end = LAST - (i - DEPTH) * BLOCK < w.shape[0] * LANES * WIDTH
                if PAIRS:
                    if SOFTCAP:
                        w = finite(w, ELEMENT, PACKED)
                    if may_end and (SOFTCAP or WORDS or VOCAB % WIDTH != 0):
                        w = keep_first(w, left, ELEMENT)
                    peaks, reference, r, e = absorb_pairs(
                        w, peaks, reference, r, e, alpha, least, far, squeeze, ELEMENT, PACKED, SOFTCAP, i == DEPTH
                    )
                else:
                    w = w.to(ACC)
                    if may_end:
                        w = tl.where(left_at(left, w.shape, 1) > 0, w, -float("inf"))
                    m, n, r, e = absorb(w, m, n, r, e, alpha, least, i == DEPTH)
        if PAIRS:
            m, n, r, e = sets_of(peaks, reference, r, e, alpha, squeeze, ELEMENT, PACKED, SOFTCAP)
    else:
        if target is not None:
            raw_target = target_entry(row_ptr, target, True, VOCAB)
        for i in tl.range(BLOCKS):
            left = length - i * BLOCK
            w = load_block(row_ptr, words_ptr, phase, begin + i * BLOCK, left, 0, BLOCK, WIDTH, PAIRS, WORDS).to(ACC)
            if bias_ptr is not None:
                place = tl.arange(0, BLOCK)
                w += tl.load(bias_ptr + begin + i * BLOCK + place, mask=place < left, other=0).to(ACC)
            if SOFTCAP:
                w = tanh(w * squeeze, PACKED > 0)
            w = tl.reshape(w, [UNROLL, LANES, WIDTH])
            w = tl.where(left_at(left, w.shape, 1) > 0, w, -float("inf"))
            m, n, r, e = absorb(w, m, n, r, e, alpha, least, False)
    return m, n, r, e, raw_target
