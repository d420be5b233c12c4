"""16-bit logits in words of two: fewer instructions and registers an element than one by one.

A word is unpacked where its elements are added. Until then the two take one register, and what concerns a block's
largest is found in words, two elements an instruction (three words, for the maximum).

PACKED is the major compute capability whose instructions for that there are; 0 where there are none, as with AMD's GPUs
and in the interpreter.
"""

import triton
import triton.language as tl

from entropy_fast.kernels.device import LOWEST
from entropy_fast.kernels.rows_sums import FLOOR, add3, left_at, moved, reference_of

# bfloat16 logits count as −2⁶⁴ at least, so that none is −inf, whose product with 0 would need a guard. That changes
# nothing as long as 2⁶⁴ α is finite and 2⁵⁷ α a lot (`has_pairs`): beside anything more, such a logit has no mass, and
# where a peak is that far from 0, neither has the bfloat16 number next to it (`peak_alone`).
FAR = tl.constexpr(-18446744073709551616.0)
FAR_PAIR = tl.constexpr(0xDF80DF80 - (1 << 32))
LOWEST_FLOAT16 = tl.constexpr(-65504.0)


def has_pairs(factor: float) -> bool:
    """Whether logits in words of two serve for z = factor · w; else the factor is out of all proportion."""
    return 2.0**-40 <= factor <= 2.0**60


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
    """The larger element in each half; of a number and NaN the number."""
    if PACKED >= 8:
        name: tl.constexpr = "max.bf16x2" if element == tl.bfloat16 else "max.f16x2"
        words = tl.inline_asm_elementwise(name + " $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    else:
        first, second = halves(a, element)
        first2, second2 = halves(b, element)
        words = pair(tl.maximum(first, first2), tl.maximum(second, second2), element)
    return words


@triton.jit
def no_less_than_far(words, PACKED: tl.constexpr):
    """bfloat16 elements, or FAR where that is more; NaN stays."""
    if PACKED >= 8:
        far = tl.full(words.shape, FAR_PAIR, tl.int32)
        words = tl.inline_asm_elementwise(
            "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [words, far], tl.int32, is_pure=True, pack=1
        )
    else:
        first, second = halves(words, tl.bfloat16)
        words = pair(tl.where(first < FAR, FAR, first), tl.where(second < FAR, FAR, second), tl.bfloat16)
    return words


@triton.jit
def equal(a, b, element: tl.constexpr, PACKED: tl.constexpr):
    """All bits of the halves in which two words are equal; NaN equals nothing."""
    if PACKED >= 9 or (PACKED >= 8 and element == tl.float16):
        name: tl.constexpr = "set.eq.u32.bf16x2" if element == tl.bfloat16 else "set.eq.u32.f16x2"
        found = tl.inline_asm_elementwise(name + " $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    else:
        first, second = halves(a, element)
        first2, second2 = halves(b, element)
        found = tl.where(first == first2, 0xFFFF, 0) | tl.where(second == second2, -0x10000, 0)
    return found


@triton.jit
def peak_alone(m, r, e):
    """r and e of sets of bfloat16 numbers: where the peak is far from 0, the next number has no mass beside it."""
    far = tl.abs(m) > -FAR
    return tl.where(far & (r == r), 0.0, r), tl.where(far, 0.0, e)


@triton.jit
def keep_first(words, left, element: tl.constexpr):
    """Words [UNROLL, LANES, WIDTH] with −inf in place of all elements but the first `left`."""
    infinity: tl.constexpr = 0xFF80 if element == tl.bfloat16 else 0xFC00
    left = left_at(left, words.shape, 2)
    first = tl.where(left > 0, words & 0xFFFF, infinity)
    second = tl.where(left > 1, (words >> 16) & 0xFFFF, infinity)
    return first | (second << 16)


@triton.jit
def chunks(words, LANES: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr):
    """Words [LANES, N] as a tuple of N / SIZE tensors [LANES, SIZE], in some order."""
    parts = (words,)
    for _ in tl.static_range(N // SIZE - 1):
        first = parts[0]
        even, odd = tl.split(tl.reshape(first, [LANES, first.shape[1] // 2, 2]))
        parts = parts[1:] + (even, odd)  # noqa: RUF005 (no unpacking in a kernel)
    return parts


@triton.jit
def add(x, offset, r, e, alpha, CLAMPED: tl.constexpr):
    """One element more in every place, which does not reach the peak; the offset is −ρ."""
    t = tl.fma(x, alpha, offset)
    p = tl.exp2(t)
    if not CLAMPED:
        t = tl.maximum(t, LOWEST)
    return r + p, tl.fma(p, t, e)


@triton.jit
def absorb_pairs(
    words,
    m,
    n,
    r,
    e,
    alpha,
    least,
    element: tl.constexpr,
    PACKED: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
):
    """`rows_sums.absorb` for words [UNROLL, LANES, WIDTH].

    SIZE words of a lane are added at once: with 1 the code is the fastest, with 4 it is compiled in less than half the
    time, which grows with the square of the operations.
    """
    LANES: tl.constexpr = words.shape[1]
    N: tl.constexpr = words.shape[0] * words.shape[2]
    CLAMPED: tl.constexpr = element == tl.bfloat16
    # what takes the place of those that reach the peak: its power of two is 0
    NONE: tl.constexpr = FAR_PAIR if CLAMPED else 0xFC00FC00 - (1 << 32)
    parts = chunks(tl.reshape(tl.permute(words, [1, 0, 2]), [LANES, N]), LANES, N, SIZE)
    largest = parts[0]
    for i in tl.static_range(1, N // SIZE):
        largest = larger(largest, parts[i], element, PACKED)
    first, second = halves(largest, element)
    top = tl.maximum(tl.max(tl.maximum(first, second), 1), FLOOR)
    if not FIRST:
        top = tl.maximum(top, m)
    reference = reference_of(top, alpha, least)
    offset = -reference[:, None]
    finite = tl.maximum(top, LOWEST_FLOAT16) if element == tl.float16 else top
    tops = tl.broadcast_to(pair(finite, finite, element)[:, None], parts[0].shape)
    reached = tl.zeros_like(tops)
    r_block = tl.zeros_like(first)
    e_block = r_block
    for i in tl.static_range(N // SIZE):
        word = parts[i]
        reaches = equal(word, tops, element, PACKED)
        reached -= reaches
        if CLAMPED:
            word = no_less_than_far(word, PACKED)
        # NONE where it reaches the peak, in as few operations as the compiler's passes may go through
        first, second = halves(word ^ ((word ^ NONE) & reaches), element)
        r_block, e_block = add(first, offset, r_block, e_block, alpha, CLAMPED)
        r_block, e_block = add(second, offset, r_block, e_block, alpha, CLAMPED)
    reached, r_block, e_block = tl.reduce((reached, r_block, e_block), 1, add3)
    # each half counts its own, but for what the lower one borrows from the upper one: 1 for each of its own
    n_block = ((reached >> 16) + 2 * (reached & 0xFFFF)).to(tl.float32)
    if FIRST:
        return top, n_block, r_block, e_block
    else:
        n, r, e = moved(m, n, r, e, top, reference, alpha, least)
        return top, n + n_block, r + r_block, e + e_block
