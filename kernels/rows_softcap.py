"""Softcapped 16-bit logits in words of two: w = tanh(squeeze · x) of both elements, nearly all by a polynomial alone.

tanh is monotone, so words meet in their tournament as they are (`rows_pairs`), and each is worked out once. Far from 0
it takes an exponential and a reciprocal, which the GPU has a quarter of the units for that a multiply-add has: so a
thread passes them by where none of its words is as large as that.

−inf stands for what is no element, whose w is ABSENT; a logit of −inf has to be the lowest finite one before.
"""

import triton
import triton.language as tl

from entropy_fast.kernels.device import LOG2E, TANH_NEAR_ZERO, assembly, tanh, tanh_term
from entropy_fast.kernels.rows_words import finite, halves

# so far below any other w that 2^(α w) is 0
ABSENT = tl.constexpr(-1e30)


@triton.constexpr_function
def capping(count, bfloat16):
    """PTX for w of both elements of `count` words. Operands: 2 `count` results, the words, squeeze."""
    near, twice, absent, squeeze = TANH_NEAR_ZERO.value, 2 * LOG2E.value, ABSENT.value, f"${3 * count}"
    lines = [".reg .b16 low, high; .reg .f32 size, most, u, poly; .reg .pred far, near, none;"]
    lines += [f".reg .f32 y<{2 * count}>; mov.f32 most, 0.0;"]
    for i in range(count):
        word, first, second = f"${2 * count + i}", f"y{2 * i}", f"y{2 * i + 1}"
        if bfloat16:
            lines += [f"shl.b32 {first}, {word}, 16; and.b32 {second}, {word}, 0xFFFF0000;"]
        else:
            lines += [f"mov.b32 {{low, high}}, {word}; cvt.f32.f16 {first}, low; cvt.f32.f16 {second}, high;"]
    for i in range(2 * count):
        lines += [f"mul.rn.f32 y{i}, y{i}, {squeeze}; abs.f32 size, y{i}; max.f32 most, most, size;"]
        lines += [f"mul.rn.f32 u, y{i}, y{i}; mov.f32 poly, {tanh_term(4)};"]
        lines += [f"fma.rn.f32 poly, poly, u, {tanh_term(j)};" for j in (3, 2, 1, 0)]
        lines += [f"mul.rn.f32 poly, poly, u; fma.rn.f32 ${i}, poly, y{i}, y{i};"]
    lines += [f"setp.ge.f32 far, most, {near};", "@!far bra done;"]
    for i in range(2 * count):
        lines += [f"abs.f32 size, y{i}; setp.lt.f32 near, size, {near}; setp.eq.f32 none, y{i}, 0fFF800000;"]
        lines += [f"mul.rn.f32 size, size, {twice}; ex2.approx.ftz.f32 size, size; add.rn.f32 size, size, 1.0;"]
        lines += ["rcp.approx.ftz.f32 size, size; fma.rn.f32 size, size, -2.0, 1.0;"]
        lines += [
            f"copysign.f32 size, y{i}, size; selp.f32 ${i}, ${i}, size, near; selp.f32 ${i}, {absent}, ${i}, none;"
        ]
    return "{ " + " ".join(lines) + " done: }"


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
