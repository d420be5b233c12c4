"""Device functions that the kernels share: forms that are exact near 0."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Far below any difference of logits, and finite: 0 · LOWEST is 0 where 0 · (−inf) would be NaN.
LOWEST = tl.constexpr(-1e30)
# Up to here tanh's polynomial holds.
TANH_NEAR_ZERO = tl.constexpr(0.6)


@triton.constexpr_function
def tanh_term(i):
    """What tanh's polynomial has before x^(2i + 3)."""
    return (-3.333333e-1, 1.3332924e-1, -5.387514e-2, 2.111621e-2, -6.27639e-3)[i]


@tl.core.extern
def assembly(code, constraints, operands, results, dtype, pure, _semantic=None):
    """`tl.inline_asm_elementwise` with any number of results, all of one dtype, which a kernel cannot say."""
    types = (dtype,) * int(results)
    return tl.inline_asm_elementwise(code, constraints, operands, types, is_pure=pure, pack=1, _semantic=_semantic)


@triton.jit
def log1p_below_half(x):
    """log(1 + x) for 0 ≤ x ≤ ½ without cancellation, as 2 artanh(t), t = x / (2 + x) ≤ 1/5, to the precision of x."""
    TERMS: tl.constexpr = 12 if x.dtype == tl.float64 else 6
    t = x / (2.0 + x)
    t2 = t * t
    series = tl.zeros_like(x) + 1.0 / (2.0 * TERMS + 1.0)
    for i in tl.static_range(1, TERMS + 1):
        series = tl.fma(series, t2, tl.zeros_like(x) + 1.0 / (2.0 * (TERMS - i) + 1.0))
    return 2.0 * t * series


@triton.jit
def one_minus_exp(x):
    """1 − e^x for x ≤ 0 without cancellation."""
    series = tl.zeros_like(x) + 1.0
    for i in tl.static_range(15):
        series = 1.0 + x * series / (16.0 - i)
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def gradient_or_zero(gradient_ptr, place, inside, ACC: tl.constexpr):
    """The incoming gradient at a place, or at the places that are `inside`; None is 0."""
    if gradient_ptr is None:  # noqa: SIM108 (the other branch does not compile)
        gradient = tl.full([], 0.0, ACC)
    else:
        gradient = tl.load(gradient_ptr + place, mask=inside).to(ACC)
    return gradient


@triton.jit
def gradient_at_target(logprob, entropy, g, g_entropy, g_lse):
    """d(g · log-prob + gH · entropy + gL · log-sum-exp) / d(the target's logit), with the digits of 1 − p as p → 1."""
    pull = tl.exp(logprob) * (g_lse - g_entropy * (tl.maximum(logprob, LOWEST) + entropy))
    return g * one_minus_exp(logprob) + pull


@triton.jit
def tanh_near_zero(x):
    """tanh of float32 numbers below TANH_NEAR_ZERO in size: an odd polynomial, fitted, relative error 8e-8."""
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


@triton.jit
def tanh(x):
    """tanh to the precision of x: the polynomial near 0, the exponential elsewhere."""
    if x.dtype == tl.float64:
        return tanh_far(x)
    return tl.where(tl.abs(x) < TANH_NEAR_ZERO, tanh_near_zero(x), tanh_far(x))
