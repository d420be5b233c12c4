"""Sets of sums that pass from program to program of a launch, in words that are their own flags.

A program that reads a segment of a row leaves its sets, one for each warp, and ends; another takes all those of the
row. No counter says when they are there and no fence orders them: each number is a word that is 0 until it is stored,
and who takes it puts the 0 back, for the next launch. So leaving sets waits for no answer from memory, which takes
microseconds where memory is busy. Nobody reads a word before it is stored, but who waits for it.

Words hold the complement of a number's bits. That is 0 for one NaN alone, in place of which another is stored.

Who waits does so for programs that started before (`rows_kernel.unit_at`), as the look-back of prefix sums does
(Merrill and Garland, Single-pass Parallel Prefix Scan with Decoupled Look-back, 2016).
"""

import triton
import triton.language as tl

from entropy_fast.kernels.rows_sums import FLOOR, merge


@triton.jit
def store_words(pointer, words, mask, NVIDIA: tl.constexpr):
    """Store words so that programs elsewhere see them."""
    if NVIDIA:
        tl.store(pointer, words, mask=mask)
    else:
        # a plain store may stay in the cache of one of a GPU's dies
        tl.atomic_xchg(pointer, words, mask=mask, sem="relaxed")


@triton.jit
def load_four(pointer, wanted):
    """Four words from each pointer on, as they are now; 0 where they are not wanted."""
    a = tl.load(pointer, mask=wanted, other=0, volatile=True)
    b = tl.load(pointer + 1, mask=wanted, other=0, volatile=True)
    c = tl.load(pointer + 2, mask=wanted, other=0, volatile=True)
    d = tl.load(pointer + 3, mask=wanted, other=0, volatile=True)
    return a, b, c, d


@triton.jit
def await_four(pointer, wanted, NVIDIA: tl.constexpr):
    """Four words from each pointer on, once they are there; anything where they are not wanted."""
    if NVIDIA and pointer.dtype.element_ty == tl.int32:
        # each thread waits for its own, with nothing but loads
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .pred wanted, missing;
            mov.b32 $0, 0;
            mov.b32 $1, 0;
            mov.b32 $2, 0;
            mov.b32 $3, 0;
            setp.ne.b32 wanted, $5, 0;
            @!wanted bra done;
            again:
            ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [$4];
            setp.eq.b32 missing, $0, 0;
            setp.eq.or.b32 missing, $1, 0, missing;
            setp.eq.or.b32 missing, $2, 0, missing;
            setp.eq.or.b32 missing, $3, 0, missing;
            @missing bra again;
            done:
            }
            """,
            "=&r,=&r,=&r,=&r,l,r",
            [pointer, wanted.to(tl.int32)],
            (tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    else:
        a, b, c, d = load_four(pointer, wanted)
        while tl.max((wanted & ((a == 0) | (b == 0) | (c == 0) | (d == 0))).to(tl.int32), 0) > 0:
            a, b, c, d = load_four(pointer, wanted)
    return a, b, c, d


@triton.jit
def leave_sets(m, n, r, e, sets_ptr, part, alpha, least, NVIDIA: tl.constexpr):
    """Leave what the lanes [LANES] have found in a segment of the row whose sets begin at `sets_ptr`."""
    WARPS: tl.constexpr = m.shape[0] // 32
    SHAPE: tl.constexpr = (WARPS, 32)
    NAN: tl.constexpr = 0x7FF8000000000000 if m.dtype == tl.float64 else 0x7FC00000
    m, n, r, e = (tl.reshape(m, SHAPE), tl.reshape(n, SHAPE), tl.reshape(r, SHAPE), tl.reshape(e, SHAPE))
    m, n, r, e = merge(m, n, r, e, alpha, least, 1)
    # side by side, from four lanes of each warp: nothing has to change its thread
    column = tl.arange(0, 32)[None, :]
    warp = tl.arange(0, WARPS)[:, None]
    found = tl.where(column == 0, m[:, None], tl.where(column == 1, n[:, None], e[:, None]))
    found = tl.where(column == 2, r[:, None], found)
    words = ~tl.where(found == found, found.to(sets_ptr.dtype.element_ty, bitcast=True), NAN)
    store_words(sets_ptr + (part * WARPS + warp) * 4 + column, words, (column < 4) & (warp >= 0), NVIDIA)


@triton.jit
def take_sets(sets_ptr, alpha, least, ACC: tl.constexpr, SETS: tl.constexpr, LANES: tl.constexpr, NVIDIA: tl.constexpr):
    """The union of a row's SETS sets, once they are there.

    A place for each of LANES at least, so that none is waited for by many threads.
    """
    PLACES: tl.constexpr = max(triton.next_power_of_2(SETS), LANES)
    place = tl.arange(0, PLACES)
    wanted = place < SETS
    m, n, r, e = await_four(sets_ptr + place * 4, wanted, NVIDIA)
    m = tl.where(wanted, (~m).to(ACC, bitcast=True), FLOOR)
    n = tl.where(wanted, (~n).to(ACC, bitcast=True), 0.0)
    r = tl.where(wanted, (~r).to(ACC, bitcast=True), 0.0)
    e = tl.where(wanted, (~e).to(ACC, bitcast=True), 0.0)
    m, n, r, e = merge(m, n, r, e, alpha, least, 0)
    # other warps may wait for the same words still
    tl.debug_barrier()
    word = tl.arange(0, 4 * PLACES)
    tl.store(sets_ptr + word, tl.zeros(word.shape, sets_ptr.dtype.element_ty), mask=word < 4 * SETS)
    return m, n, r, e
