"""16-bit logits in words of two: fewer instructions and registers an element than one by one.

A word is unpacked where its elements are added. Until then the two take one register, and are compared in words, two
elements an instruction. A block's words meet in a tournament: who loses is never the largest of the lane, and is added
to r and e; who wins all goes on to the next block. So without counting or looking for it, the peak is left out of r,
once, as `rows_sums` wants it. Others that are equal to it are in r, where each is 1 and no digit is lost.
"""

import triton
import triton.language as tl

from entropy_fast.kernels.device import LOWEST
from entropy_fast.kernels.rows_softcap import ABSENT, capped
from entropy_fast.kernels.rows_sums import FLOOR, reference_of
from entropy_fast.kernels.rows_words import halves, larger, larger_or_nan, smaller, words_of

# bfloat16 logits so small that α w is below FAR count as about FAR, so that none is −inf, whose product with 0 would
# need a guard. Beside a peak with |α m| up to NEAR they have no mass. Where a row's peak is farther from 0 than that,
# no other number has any, but for its equals, which ρ is too coarse for: they are counted (`log_of_peaks`).
FAR = tl.constexpr(-4194304.0)
NEAR = tl.constexpr(1048576.0)


def has_pairs(factor: float, squeeze: float | None) -> bool:
    """Whether logits in words of two serve for z = factor · w; else the factor is out of all proportion.

    With a softcap, w = tanh(squeeze · x): no peak is far, the lowest number is −1, and none overflows.
    """
    if squeeze is None:
        return 2.0**-40 <= factor <= 2.0**60
    return 2.0**-40 <= factor <= 2.0**16 and 2.0**-12 <= squeeze <= 1.0


@triton.jit
def far_pair(alpha):
    """A word of two bfloat16 numbers x, a power of two, with FAR ≥ α x > 2 FAR."""
    exponent = alpha.to(tl.int32, bitcast=True) >> 23
    half = (127 + 22 + 127 - exponent) << 7
    return half | (half << 16) | -0x7FFF8000


@triton.jit
def tournament(words, far, N: tl.constexpr, element: tl.constexpr, PACKED: tl.constexpr):
    """Of N vectors of words the largest elements in each half, and the other N − 1, in some order."""
    losers = ()
    for _ in tl.static_range(N - 1):
        a = words[0]
        b = words[1]
        losers = losers + (smaller(a, b, far, element, PACKED),)  # noqa: RUF005
        words = words[2:] + (larger(a, b, element, PACKED),)  # noqa: RUF005
    return words[0], losers


@triton.jit
def values(words, squeeze, element: tl.constexpr, PACKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """w of the two elements of each of some words, as a tuple."""
    if SOFTCAP:
        w = capped(words, squeeze, element, PACKED)
    else:
        w = ()
        for i in tl.static_range(len(words)):
            first, second = halves(words[i], element)
            w = w + (first, second)  # noqa: RUF005
    return w


@triton.jit
def add(x, offset, r, e, alpha, CLAMPED: tl.constexpr):
    """One element more in every place, which is not the peak; −inf too, if not CLAMPED. The offset is −ρ."""
    t = tl.fma(x, alpha, offset)
    p = tl.exp2(t)
    if not CLAMPED:
        t = tl.maximum(t, LOWEST)
    return r + p, tl.fma(p, t, e)


@triton.jit
def absorb_pairs(
    block,
    peaks,
    reference,
    r,
    e,
    alpha,
    least,
    far,
    squeeze,
    element: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Add a block of words [UNROLL, LANES, WIDTH] to what LANES lanes hold [LANES, 1]; that is nothing at FIRST.

    A lane holds its peaks, one of each half, the larger one's ρ, and r and e of all else.
    """
    LANES: tl.constexpr = block.shape[1]
    N: tl.constexpr = block.shape[0] * block.shape[2]
    OTHERS: tl.constexpr = N - FIRST
    # as many words are worked out with one look for any far from 0
    AT_ONCE: tl.constexpr = 3 if SOFTCAP else 1
    CLAMPED: tl.constexpr = SOFTCAP or element == tl.bfloat16
    words = words_of(block, LANES, N)
    if not FIRST:
        words = words + (peaks,)  # noqa: RUF005
    peaks, others = tournament(words, far, OTHERS + 1, element, PACKED)
    first, second = values((peaks,), squeeze, element, PACKED, SOFTCAP)
    before = reference
    reference = reference_of(tl.maximum(tl.maximum(first, second), FLOOR), alpha, least)
    r_block = tl.zeros(peaks.shape, tl.float32)
    e_block = r_block
    for i in tl.static_range(0, OTHERS, AT_ONCE):
        w = values(others[i : i + AT_ONCE], squeeze, element, PACKED, SOFTCAP)
        for j in tl.static_range(len(w)):
            r_block, e_block = add(w[j], -reference, r_block, e_block, alpha, CLAMPED)
    if not FIRST:
        shift = tl.maximum(before - reference, LOWEST)
        c = tl.exp2(shift)
        r_block, e_block = tl.fma(r, c, r_block), tl.fma(c, tl.fma(shift, r, e), e_block)
    return peaks, reference, r_block, e_block


@triton.jit
def sets_of(
    peaks, reference, r, e, alpha, squeeze, element: tl.constexpr, PACKED: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    """What lanes hold, as sets (m, n, r, e) [LANES] of `rows_sums`, but that only one element counts for n."""
    first, second = values((peaks,), squeeze, element, PACKED, SOFTCAP)
    m = tl.maximum(tl.maximum(first, second), FLOOR)
    other = -larger_or_nan(-first, -second)
    r, e = add(other, -reference, r, e, alpha, False)
    if SOFTCAP:
        m = tl.where(m > ABSENT, m, FLOOR)
    n = tl.where(m > FLOOR, 1.0, 0.0)
    SHAPE: tl.constexpr = [peaks.shape[0]]
    return tl.reshape(m, SHAPE), tl.reshape(n, SHAPE), tl.reshape(r, SHAPE), tl.reshape(e, SHAPE)


@triton.jit
def log_of_peaks(row_ptr, m, VOCAB: tl.constexpr, LANES: tl.constexpr):
    """log Σ e^(z − k m) of a row whose peak m is beyond NEAR: of how many elements reach it; NaN of none or NaN."""
    lane = tl.arange(0, LANES)
    n = tl.zeros([LANES], tl.float32)
    # 0, which the compiler does not know: it would write the loop out, in as much code as all the rest is
    start = tl.program_id(1)
    while start < VOCAB:
        w = tl.load(row_ptr + start + lane, mask=start + lane < VOCAB, other=-float("inf")).to(tl.float32)
        n += tl.where(w == m, 1.0, tl.where(w == w, 0.0, w))
        start += LANES
    n = tl.sum(n, 0)
    return tl.where((n > 0) & (m < float("inf")), tl.log(n), float("nan"))
