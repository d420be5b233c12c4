"""16-bit logits in words of two: fewer instructions and registers an element than one by one.

A word is unpacked where its elements are added. Until then the two take one register, and are compared in words, two
elements an instruction. A block's words meet in a tournament: who loses is never the largest of the lane, and is added
to r and e; who wins all goes on to the next block. So without counting or looking for it, the peak is left out of r,
once, as `rows_sums` wants it. Others that are equal to it are in r, where each is 1 and no digit is lost.

PACKED is the major compute capability whose instructions for that there are; 0 where there are none, as with AMD's GPUs
and in the interpreter.
"""

import triton
import triton.language as tl

from entropy_fast.kernels.device import LOWEST
from entropy_fast.kernels.rows_sums import FLOOR, left_at, reference_of

# bfloat16 logits so small that α w is below FAR count as about FAR, so that none is −inf, whose product with 0 would
# need a guard. Beside a peak with |α m| up to NEAR they have no mass. Where a row's peak is farther from 0 than that,
# no other number has any, but for its equals, which ρ is too coarse for: they are counted (`log_of_peaks`).
FAR = tl.constexpr(-4194304.0)
NEAR = tl.constexpr(1048576.0)


def has_pairs(factor: float) -> bool:
    """Whether logits in words of two serve for z = factor · w; else the factor is out of all proportion."""
    return 2.0**-40 <= factor <= 2.0**60


@triton.jit
def far_pair(alpha):
    """A word of two bfloat16 numbers x, a power of two, with FAR ≥ α x > 2 FAR."""
    exponent = alpha.to(tl.int32, bitcast=True) >> 23
    half = (127 + 22 + 127 - exponent) << 7
    return half | (half << 16) | -0x7FFF8000


@triton.jit
def halves(words, element: tl.constexpr):
    """The two elements of each word, in float32."""
    if element == tl.bfloat16:
        first = (words << 16).to(tl.float32, bitcast=True)
        second = (words & -0x10000).to(tl.float32, bitcast=True)
    else:
        first = words.to(tl.int16).to(element, bitcast=True).to(tl.float32)
        second = (words >> 16).to(tl.int16).to(element, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def pair(first, second, element: tl.constexpr):
    """A word of two numbers in float32 that came from `element`."""
    if element == tl.bfloat16:
        low = (first.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
        high = second.to(tl.int32, bitcast=True) & -0x10000
    else:
        low = first.to(element).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high = second.to(element).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return low | high


@triton.jit
def larger(a, b, element: tl.constexpr, PACKED: tl.constexpr):
    """The larger element in each half; NaN where one is NaN."""
    if PACKED >= 8:
        name: tl.constexpr = "max.NaN.bf16x2" if element == tl.bfloat16 else "max.NaN.f16x2"
        words = tl.inline_asm_elementwise(name + " $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    else:
        first, second = halves(a, element)
        first2, second2 = halves(b, element)
        words = pair(larger_or_nan(first, first2), larger_or_nan(second, second2), element)
    return words


@triton.jit
def larger_or_nan(a, b):
    """The larger number; NaN where one is NaN."""
    return tl.where((a == a) & (b == b), tl.maximum(a, b), a + b)


@triton.jit
def smaller(a, b, far, element: tl.constexpr, PACKED: tl.constexpr):
    """The smaller element in each half, of a number and NaN the number; of bfloat16 `far` at least."""
    if PACKED >= 8:
        if element == tl.bfloat16:
            code: tl.constexpr = "{ .reg .b32 x; min.bf16x2 x, $1, $2; max.bf16x2 $0, x, $3; }"
        else:
            code: tl.constexpr = "min.f16x2 $0, $1, $2;"
        operands = [a, b, tl.broadcast_to(far, a.shape)]
        words = tl.inline_asm_elementwise(code, "=r,r,r,r", operands, tl.int32, is_pure=True, pack=1)
    else:
        first, second = halves(a, element)
        first2, second2 = halves(b, element)
        first, second = tl.minimum(first, first2), tl.minimum(second, second2)
        if element == tl.bfloat16:
            least, _ = halves(far, element)
            first, second = tl.maximum(first, least), tl.maximum(second, least)
        words = pair(first, second, element)
    return words


@triton.jit
def keep_first(words, left, element: tl.constexpr):
    """Words [UNROLL, LANES, WIDTH] with −inf in place of all elements but the first `left`."""
    infinity: tl.constexpr = 0xFF80 if element == tl.bfloat16 else 0xFC00
    left = left_at(left, words.shape, 2)
    first = tl.where(left > 0, words & 0xFFFF, infinity)
    second = tl.where(left > 1, (words >> 16) & 0xFFFF, infinity)
    return first | (second << 16)


@triton.jit
def words_of(block, LANES: tl.constexpr, N: tl.constexpr):
    """The N words of each lane of a block [UNROLL, LANES, WIDTH], as a tuple of vectors [LANES, 1], in some order."""
    parts = (tl.reshape(tl.permute(block, [1, 0, 2]), [LANES, N]),)
    for _ in tl.static_range(N - 1):
        first = parts[0]
        even, odd = tl.split(tl.reshape(first, [LANES, first.shape[1] // 2, 2]))
        parts = parts[1:] + (even, odd)  # noqa: RUF005 (no unpacking in a kernel)
    return parts


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
    element: tl.constexpr,
    PACKED: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Add a block of words [UNROLL, LANES, WIDTH] to what LANES lanes hold [LANES, 1]; that is nothing at FIRST.

    A lane holds its peaks, one of each half, the larger one's ρ, and r and e of all else.
    """
    LANES: tl.constexpr = block.shape[1]
    N: tl.constexpr = block.shape[0] * block.shape[2]
    OTHERS: tl.constexpr = N - FIRST
    words = words_of(block, LANES, N)
    if not FIRST:
        words = words + (peaks,)  # noqa: RUF005
    peaks, others = tournament(words, far, OTHERS + 1, element, PACKED)
    first, second = halves(peaks, element)
    before = reference
    reference = reference_of(tl.maximum(tl.maximum(first, second), FLOOR), alpha, least)
    r_block = tl.zeros(peaks.shape, tl.float32)
    e_block = r_block
    for i in tl.static_range(OTHERS):
        first, second = halves(others[i], element)
        r_block, e_block = add(first, -reference, r_block, e_block, alpha, element == tl.bfloat16)
        r_block, e_block = add(second, -reference, r_block, e_block, alpha, element == tl.bfloat16)
    if not FIRST:
        shift = tl.maximum(before - reference, LOWEST)
        c = tl.exp2(shift)
        r_block, e_block = tl.fma(r, c, r_block), tl.fma(c, tl.fma(shift, r, e), e_block)
    return peaks, reference, r_block, e_block


@triton.jit
def sets_of(peaks, reference, r, e, alpha, element: tl.constexpr):
    """What lanes hold, as sets (m, n, r, e) [LANES] of `rows_sums`, but that only one element counts for n."""
    first, second = halves(peaks, element)
    m = tl.maximum(tl.maximum(first, second), FLOOR)
    other = -larger_or_nan(-first, -second)
    r, e = add(other, -reference, r, e, alpha, False)
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
