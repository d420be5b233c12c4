"""16-bit logits in words of two: fewer instructions and registers an element than one by one.

A word is unpacked where its elements are added. Until then the two take one register, and the maximum of a block is
found in words, two elements an instruction.
"""

import triton
import triton.language as tl

from entropy_fast.kernels.device import LOWEST, left_at


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
def bits(x, element: tl.constexpr):
    """The bits of x, float32 that came from `element`, in the lower half of a word; zeros above."""
    if element == tl.bfloat16:
        found = (x.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    else:
        found = x.to(element).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return found


@triton.jit
def larger(a, b, element: tl.constexpr, PACKED: tl.constexpr):
    """The larger element in each half; of a number and NaN the number. PACKED: by NVIDIA's instruction for that."""
    if PACKED:
        name: tl.constexpr = "max.bf16x2" if element == tl.bfloat16 else "max.f16x2"
        words = tl.inline_asm_elementwise(name + " $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    else:
        first, second = halves(a, element)
        first2, second2 = halves(b, element)
        words = bits(tl.maximum(first, first2), element) | (bits(tl.maximum(second, second2), element) << 16)
    return words


@triton.jit
def each(words, LANES: tl.constexpr, N: tl.constexpr):
    """Words [LANES, N] as a tuple of N vectors, in some order."""
    vectors = (words,)
    for _ in tl.static_range(N - 1):
        first = vectors[0]
        even, odd = tl.split(tl.reshape(first, [LANES, first.shape[1] // 2, 2]))
        vectors = vectors[1:] + (even, odd)  # noqa: RUF005 (no unpacking in a kernel)
    for _ in tl.static_range(N):
        vectors = vectors[1:] + (tl.reshape(vectors[0], [LANES]),)  # noqa: RUF005
    return vectors


@triton.jit
def keep_first(words, left, element: tl.constexpr):
    """Words [UNROLL, LANES, WIDTH] with −inf in place of all elements but the first `left`."""
    infinity: tl.constexpr = 0xFF80 if element == tl.bfloat16 else 0xFC00
    left = left_at(left, words.shape, 2)
    first = tl.where(left > 0, words & 0xFFFF, infinity)
    second = tl.where(left > 1, (words >> 16) & 0xFFFF, infinity)
    return first | (second << 16)


@triton.jit
def add(x, top, s, r, e, alpha):
    """One element more in every lane; none is larger than `top`."""
    d = x - top
    p = tl.exp2(d * alpha)
    return s + p, tl.where(d < 0, r + p, r), tl.fma(p, tl.maximum(d, LOWEST), e)


@triton.jit
def absorb_pairs(words, m, s, r, e, alpha, element: tl.constexpr, PACKED: tl.constexpr):
    """`device.absorb` for words [UNROLL, LANES, WIDTH].

    NaN is never the maximum, unless all is NaN: its difference from that is NaN, and with it s.
    """
    LANES: tl.constexpr = words.shape[1]
    N: tl.constexpr = words.shape[0] * words.shape[2]
    vectors = each(tl.reshape(tl.permute(words, [1, 0, 2]), [LANES, N]), LANES, N)
    largest = vectors[0]
    for i in tl.static_range(1, N):
        largest = larger(largest, vectors[i], element, PACKED)
    first, second = halves(largest, element)
    top = tl.maximum(m, tl.maximum(first, second))
    s_block = tl.zeros_like(s)
    r_block = s_block
    e_block = s_block
    for i in tl.static_range(N):
        first, second = halves(vectors[i], element)
        s_block, r_block, e_block = add(first, top, s_block, r_block, e_block, alpha)
        s_block, r_block, e_block = add(second, top, s_block, r_block, e_block, alpha)
    move = tl.maximum(m - top, LOWEST)
    c = tl.exp2(move * alpha)
    r = tl.where(m < top, s * c, r) + r_block
    e = tl.fma(c, tl.fma(move, s, e), e_block)
    return top, tl.fma(s, c, s_block), r, e
