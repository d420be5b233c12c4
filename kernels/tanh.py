"""tanh to the precision of its argument: a polynomial near 0, an exponential elsewhere.

The exponential and the division after it are instructions that a GPU has few units for. On NVIDIA's GPUs a thread
passes them by where none of the arguments that it works out at a time is far from 0, as softcapped logits seldom are.
"""

import triton
import triton.language as tl

from entropy_fast.kernels.device import LOG2E

# up to here the polynomial holds
NEAR_ZERO = tl.constexpr(0.6)


@triton.constexpr_function
def tanh_term(i):
    """What the polynomial has before x^(2i + 3)."""
    return (-3.333333e-1, 1.3332924e-1, -5.387514e-2, 2.111621e-2, -6.27639e-3)[i]


@triton.jit
def tanh_near_zero(x):
    """tanh of float32 numbers below NEAR_ZERO in size: an odd polynomial, fitted, relative error 8e-8."""
    u = x * x
    poly = tanh_term(4) * u + tanh_term(3)
    poly = poly * u + tanh_term(2)
    poly = poly * u + tanh_term(1)
    poly = poly * u + tanh_term(0)
    return x + x * (u * poly)


@triton.jit
def tanh_far(x):
    """tanh by an exponential, without overflow at either end; near 0 with an absolute error of a rounding of 1."""
    size = 1.0 - 2.0 / (1.0 + tl.exp2(tl.abs(x) * (2.0 * LOG2E)))
    return tl.where(x < 0, -size, size)


@triton.constexpr_function
def assembly_of_tanh(results, arguments, lowest=-1.0):
    """PTX for tanh of registers that hold float32 numbers, into others; `lowest` in place of that of −inf.

    The label `done` has to end what it is in.
    """
    near, twice = NEAR_ZERO.value, 2 * LOG2E.value
    lines = [".reg .f32 size, most, u, poly; .reg .pred far, near, least; mov.f32 most, 0.0;"]
    for result, x in zip(results, arguments, strict=True):
        lines += [f"abs.f32 size, {x}; max.f32 most, most, size; mul.rn.f32 u, {x}, {x};"]
        lines += [f"mov.f32 poly, {tanh_term(4)};"]
        lines += [f"fma.rn.f32 poly, poly, u, {tanh_term(i)};" for i in (3, 2, 1, 0)]
        lines += [f"mul.rn.f32 poly, poly, u; fma.rn.f32 {result}, poly, {x}, {x};"]
    lines += [f"setp.ge.f32 far, most, {near};", "@!far bra done;"]
    for result, x in zip(results, arguments, strict=True):
        lines += [f"abs.f32 size, {x}; setp.lt.f32 near, size, {near};"]
        lines += [f"mul.rn.f32 size, size, {twice}; ex2.approx.ftz.f32 size, size; add.rn.f32 size, size, 1.0;"]
        lines += ["rcp.approx.ftz.f32 size, size; fma.rn.f32 size, size, -2.0, 1.0;"]
        lines += [f"copysign.f32 size, {x}, size; selp.f32 {result}, {result}, size, near;"]
        if lowest != -1.0:
            lines += [f"setp.eq.f32 least, {x}, 0fFF800000; selp.f32 {result}, {lowest}, {result}, least;"]
    return " ".join(lines)


@triton.constexpr_function
def four_at_once():
    """PTX for tanh of four float32 numbers."""
    return "{ " + assembly_of_tanh(["$0", "$1", "$2", "$3"], ["$4", "$5", "$6", "$7"]) + " done: }"


@triton.jit
def tanh(x, NVIDIA: tl.constexpr = False):
    """tanh of numbers, in assembly where they are float32 and the GPU is NVIDIA's; bits do not depend on the others."""
    if x.dtype == tl.float64:
        y = tanh_far(x)
    elif NVIDIA:
        y = tl.inline_asm_elementwise(four_at_once(), "=&f,=&f,=&f,=&f,f,f,f,f", [x], tl.float32, is_pure=True, pack=4)
    else:
        y = tl.where(tl.abs(x) < NEAR_ZERO, tanh_near_zero(x), tanh_far(x))
    return y
