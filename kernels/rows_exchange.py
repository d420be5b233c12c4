"""Numbers that pass from program to program of a launch, in words that are their own flags.

A program that reads a segment of a row leaves its sets of sums, one for each warp, and ends; another takes all those of
the row. No counter says when they are there and no fence orders them: each number is a word that is 0 until it is
stored, and who takes it puts the 0 back, for the next launch. So leaving sets waits for no answer from memory, which
takes microseconds where memory is busy. Nobody reads a word before it is stored, but who waits for it.

Words hold the complement of a number's bits. That is 0 for one NaN alone, in place of which another is stored.

Taking words only reads them, for the compiler may do it twice, in other threads; `clear_words` comes once all have.

Who waits does so for programs that started before (`rows_order.unit_at`), as the look-back of prefix sums does
(Merrill and Garland, Single-pass Parallel Prefix Scan with Decoupled Look-back, 2016).
"""

import triton
import triton.language as tl

from entropy_fast.kernels.device import assembly
from entropy_fast.kernels.rows_sums import FLOOR, merge


@triton.jit
def store_words(pointer, words, mask, NVIDIA: tl.constexpr):
    """Store words so that programs elsewhere see them."""
    if NVIDIA:
        tl.store(pointer, words, mask=mask)
    else:
        # a plain store may stay in the cache of one of a GPU's dies
        tl.atomic_xchg(pointer, words, mask=mask, sem="relaxed")


@triton.constexpr_function
def taking(count):
    """PTX that waits for words, each thread for its own, with nothing but loads.

    Operands: 4 words of each of `count` sets; where the first set is; and `left`, see `take_words`.
    """
    words = [[f"${4 * i + j}" for j in range(4)] for i in range(count)]
    fours = ["{" + ", ".join(four) + "}" for four in words]
    place, left = f"${4 * count}", f"${4 * count + 1}"
    lines = [".reg .pred absent, missing;", f".reg .pred {', '.join(f'wanted{i}' for i in range(count))};"]
    lines += [f"mov.b32 {word}, 0;" for four in words for word in four]
    lines += [f"setp.gt.s32 wanted{i}, {left}, {32 * i};" for i in range(count)]
    lines += ["@!wanted0 bra done;", "again:"]
    lines += [f"@wanted{i} ld.relaxed.gpu.global.v4.b32 {fours[i]}, [{place} + {512 * i}];" for i in range(count)]
    for i in range(count):
        lines += [f"setp.eq.b32 absent, {words[i][0]}, 0;"]
        lines += [f"setp.eq.or.b32 absent, {word}, 0, absent;" for word in words[i][1:]]
        lines += [f"and.pred absent, absent, wanted{i};", f"or.pred missing, absent, {'missing' if i else 'absent'};"]
    lines += ["@missing bra again;"]
    return "{ " + " ".join(lines) + " done: }"


@triton.constexpr_function
def constraints(count):
    """Of the operands of `taking`: words are written before the others are read for the last time."""
    return "=&r," * (4 * count) + "l,r"


@triton.jit
def load_four(pointer, wanted):
    """Four words from each pointer on, as they are now; 0 where they are not wanted."""
    a = tl.load(pointer, mask=wanted, other=0, volatile=True)
    b = tl.load(pointer + 1, mask=wanted, other=0, volatile=True)
    c = tl.load(pointer + 2, mask=wanted, other=0, volatile=True)
    d = tl.load(pointer + 3, mask=wanted, other=0, volatile=True)
    return a, b, c, d


@triton.jit
def take_words(place, left, COUNT: tl.constexpr, NVIDIA: tl.constexpr):
    """Words of up to COUNT sets for each place, 32 sets apart, once they are there: of the sets i with 32 i < left.

    The others are anything.
    """
    if NVIDIA and place.dtype.element_ty == tl.int32:
        words = assembly(taking(COUNT), constraints(COUNT), [place, left], 4 * COUNT, tl.int32, False)
    else:
        words = ()
        for i in tl.static_range(COUNT):
            wanted = left > 32 * i
            a, b, c, d = load_four(place + 128 * i, wanted)
            while tl.max((wanted & ((a == 0) | (b == 0) | (c == 0) | (d == 0))).to(tl.int32)) > 0:
                a, b, c, d = load_four(place + 128 * i, wanted)
            words = words + (a, b, c, d)  # noqa: RUF005 (no unpacking in a kernel)
    return words


@triton.jit
def clear_words(words_ptr, wanted, WORDS: tl.constexpr):
    """Put 0 in place of the rows' words, for the next launch, once all threads of the program have taken theirs."""
    tl.debug_barrier()
    word = tl.arange(0, triton.next_power_of_2(WORDS))[None, :]
    place = words_ptr + word
    zeros = tl.zeros(place.shape, words_ptr.dtype.element_ty)
    tl.store(place, zeros, mask=wanted & (word < WORDS))


@triton.jit
def leave_sets(m, n, r, e, words_ptr, part, alpha, least, NVIDIA: tl.constexpr):
    """Leave what the lanes [LANES] have found in a segment of the row whose words begin at `words_ptr`."""
    WARPS: tl.constexpr = m.shape[0] // 32
    SHAPE: tl.constexpr = (WARPS, 32)
    NAN: tl.constexpr = 0x7FF8000000000000 if m.dtype == tl.float64 else 0x7FC00000
    m, n, r, e = (tl.reshape(m, SHAPE), tl.reshape(n, SHAPE), tl.reshape(r, SHAPE), tl.reshape(e, SHAPE))
    m, n, r, e = merge((m,), (n,), (r,), (e,), alpha, least)
    # side by side, from four lanes of each warp: nothing has to change its thread
    column = tl.arange(0, 32)[None, :]
    warp = tl.arange(0, WARPS)[:, None]
    found = tl.where(column == 0, m[:, None], tl.where(column == 1, n[:, None], e[:, None]))
    found = tl.where(column == 2, r[:, None], found)
    words = ~tl.where(found == found, found.to(words_ptr.dtype.element_ty, bitcast=True), NAN)
    store_words(words_ptr + (part * WARPS + warp) * 4 + column, words, (column < 4) & (warp >= 0), NVIDIA)


@triton.jit
def take_sets(words_ptr, lane, wanted, alpha, least, ACC: tl.constexpr, SETS: tl.constexpr, NVIDIA: tl.constexpr):
    """The unions of rows' SETS sets, once they are there, each in the first lane of its warp; elsewhere an empty set.

    `words_ptr` [WARPS, 32] says where each warp's row begins, if it is wanted: so no warp has to wait for another.
    """
    COUNT: tl.constexpr = (SETS + 31) // 32
    left = tl.where(wanted, SETS - lane, 0)
    words = take_words(words_ptr + 4 * lane, left, COUNT, NVIDIA)
    m = ()
    n = ()
    r = ()
    e = ()
    for i in tl.static_range(COUNT):
        there = left > 32 * i
        m = m + (tl.where(there, (~words[4 * i]).to(ACC, bitcast=True), FLOOR),)  # noqa: RUF005
        n = n + (tl.where(there, (~words[4 * i + 1]).to(ACC, bitcast=True), 0.0),)  # noqa: RUF005
        r = r + (tl.where(there, (~words[4 * i + 2]).to(ACC, bitcast=True), 0.0),)  # noqa: RUF005
        e = e + (tl.where(there, (~words[4 * i + 3]).to(ACC, bitcast=True), 0.0),)  # noqa: RUF005
    m, n, r, e = merge(m, n, r, e, alpha, least)
    # kept a matrix, which the compiler leaves where it is; a vector it would spread over all threads, through memory
    first = lane == 0
    m = tl.where(first, m[:, None], FLOOR)
    n, r, e = tl.where(first, n[:, None], 0.0), tl.where(first, r[:, None], 0.0), tl.where(first, e[:, None], 0.0)
    return m, n, r, e
