"""16-bit numbers in words of two: what is done with both halves of a word.

PACKED is the major compute capability whose instructions for that there are; 0 where there are none, as with AMD's GPUs
and in the interpreter.
"""

import triton
import triton.language as tl

from entropy_fast.kernels.rows_sums import left_at


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
    """The smaller element in each half, of a number and NaN the number; those in `far`, if given, at least."""
    if PACKED >= 8:
        if far is None:
            code: tl.constexpr = "min.bf16x2 $0, $1, $2;" if element == tl.bfloat16 else "min.f16x2 $0, $1, $2;"
            words = tl.inline_asm_elementwise(code, "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
        else:
            code: tl.constexpr = "{ .reg .b32 x; min.bf16x2 x, $1, $2; max.bf16x2 $0, x, $3; }"
            operands = [a, b, tl.broadcast_to(far, a.shape)]
            words = tl.inline_asm_elementwise(code, "=r,r,r,r", operands, tl.int32, is_pure=True, pack=1)
    else:
        first, second = halves(a, element)
        first2, second2 = halves(b, element)
        first, second = tl.minimum(first, first2), tl.minimum(second, second2)
        if far is not None:
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
def finite(words, element: tl.constexpr, PACKED: tl.constexpr):
    """Words with the lowest finite number in place of −inf."""
    LEAST: tl.constexpr = (0xFF7FFF7F if element == tl.bfloat16 else 0xFBFFFBFF) - (1 << 32)
    return larger(words, tl.full(words.shape, LEAST, tl.int32), element, PACKED)


@triton.jit
def words_of(block, LANES: tl.constexpr, N: tl.constexpr):
    """The N words of each lane of a block [UNROLL, LANES, WIDTH], as a tuple of vectors [LANES, 1], in some order."""
    parts = (tl.reshape(tl.permute(block, [1, 0, 2]), [LANES, N]),)
    for _ in tl.static_range(N - 1):
        first = parts[0]
        even, odd = tl.split(tl.reshape(first, [LANES, first.shape[1] // 2, 2]))
        parts = parts[1:] + (even, odd)  # noqa: RUF005 (no unpacking in a kernel)
    return parts
