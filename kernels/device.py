"""Device functions that the kernels share: forms that are exact near 0."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Far below any difference of logits, and finite: 0 · LOWEST is 0 where 0 · (−inf) would be NaN.
LOWEST = tl.constexpr(-1e30)


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
