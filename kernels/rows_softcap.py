"""Softcapped 16-bit logits in words of two: w = tanh(squeeze · x) of both elements, nearly all by a polynomial alone.

tanh is monotone, so words meet in their tournament as they are (`rows_pairs`), and each is worked out once.

−inf stands for what is no element, whose w is ABSENT; a logit of −inf has to be the lowest finite one before.
"""

import triton
import triton.language as tl

from entropy_fast.kernels.device import assembly
from entropy_fast.kernels.rows_words import finite, halves
from entropy_fast.kernels.tanh import assembly_of_tanh, tanh

# so far below any other w that 2^(α w) is 0
ABSENT = tl.constexpr(-1e30)


@triton.constexpr_function
def capping(count, bfloat16):
    """PTX for w of both elements of `count` words. Operands: 2 `count` results, the words, squeeze."""
    squeeze, w, y = f"${3 * count}", [f"${i}" for i in range(2 * count)], [f"y{i}" for i in range(2 * count)]
    lines = [f".reg .b16 low, high; .reg .f32 y<{2 * count}>;"]
    for i in range(count):
        word, first, second = f"${2 * count + i}", y[2 * i], y[2 * i + 1]
        if bfloat16:
            lines += [f"shl.b32 {first}, {word}, 16; and.b32 {second}, {word}, 0xFFFF0000;"]
        else:
            lines += [f"mov.b32 {{low, high}}, {word}; cvt.f32.f16 {first}, low; cvt.f32.f16 {second}, high;"]
    lines += [f"mul.rn.f32 {x}, {x}, {squeeze};" for x in y]
    return "{ " + " ".join(lines) + assembly_of_tanh(w, y, ABSENT.value) + " done: }"


@triton.constexpr_function
def constraints(count):
    """Of the operands of `capping`: results are written before the others are read for the last time."""
    return "=&f," * (2 * count) + "r," * count + "f"


@triton.jit
def capped(words, squeeze, element: tl.constexpr, PACKED: tl.constexpr):
    """w of the two elements of each of some words, as a tuple."""
    COUNT: tl.constexpr = len(words)
    if PACKED:
        BFLOAT16: tl.constexpr = element == tl.bfloat16
        operands = words + (tl.broadcast_to(squeeze, words[0].shape),)  # noqa: RUF005 (no unpacking in a kernel)
        w = assembly(capping(COUNT, BFLOAT16), constraints(COUNT), operands, 2 * COUNT, tl.float32, True)
    else:
        w = ()
        for i in tl.static_range(COUNT):
            first, second = halves(words[i], element)
            w = w + (capped_or_absent(first, squeeze), capped_or_absent(second, squeeze))  # noqa: RUF005
    return w


@triton.jit
def capped_or_absent(x, squeeze):
    """w of elements, one by one."""
    return tl.where(x > -float("inf"), tanh(x * squeeze), tl.where(x == x, ABSENT, x))


@triton.jit
def capped_logit(logit, squeeze, PACKED: tl.constexpr):
    """w of logits in their dtype, bit for bit as in words."""
    word = logit.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return capped((finite(word, logit.dtype, PACKED),), squeeze, logit.dtype, PACKED)[0]
