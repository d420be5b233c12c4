"""Device functions that the kernels share: exact forms near 0, and sums of exponentials that can be merged.

A set of numbers w is held as (m, s, r, e), with d = w − m and α = k · log₂e for logits z = k · w:

    m = max w        s = Σ 2^(α d)        r = the part of s that comes from w < m        e = Σ 2^(α d) d

Two sets merge by rescaling to the larger m. r exists for the rows that matter most: when one token has nearly all the
mass, s is 1 + r with r far below float32's resolution at 1, and logprob and entropy are made of r's digits.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Far below any difference of logits, and finite: 0 · LOWEST is 0 where 0 · (−inf) would be NaN.
LOWEST = tl.constexpr(-1e30)
# Up to here tanh's polynomial holds.
TANH_NEAR_ZERO = tl.constexpr(0.6)


@triton.jit
def log1p_below_half(x):
    """log(1 + x) for 0 ≤ x ≤ ½ without cancellation, as 2 artanh(x / (2 + x)); 12 terms serve float64 too."""
    t = x / (2.0 + x)
    t2 = t * t
    series = tl.zeros_like(x) + 1.0 / 25.0
    for i in tl.static_range(12):
        series = series * t2 + 1.0 / (23.0 - 2.0 * i)
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
    poly = -6.27639e-3
    poly = poly * u + 2.111621e-2
    poly = poly * u - 5.387514e-2
    poly = poly * u + 1.3332924e-1
    poly = poly * u - 3.333333e-1
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


@triton.jit
def log_of_sum(s, r):
    """log s for s = (how many reach the peak) + r; exact in r when one does."""
    alone = (s - r < 1.5) & (r < 0.5)
    return tl.where(alone, log1p_below_half(r), tl.log(s))


@triton.jit
def merge(m, s, r, e, m2, s2, r2, e2, alpha):
    """The union of two sets. Every product feeds an explicit fma, so that no compiler choice changes the bits."""
    top = tl.maximum(m, m2)
    move = tl.maximum(m - top, LOWEST)
    move2 = tl.maximum(m2 - top, LOWEST)
    c = tl.exp2(move * alpha)
    c2 = tl.exp2(move2 * alpha)
    kept = tl.where(m < top, s * c, r)
    kept2 = tl.where(m2 < top, s2 * c2, r2)
    e = c * tl.fma(move, s, e)
    return top, tl.fma(s2, c2, s * c), kept + kept2, tl.fma(c2, tl.fma(move2, s2, e2), e)


@triton.jit
def add3(a, b, c, a2, b2, c2):
    """Three sums at once: one exchange between warps in place of three."""
    return a + a2, b + b2, c + c2


@triton.jit
def merge_lanes(m, s, r, e, alpha):
    """The union of the sets that a vector of lanes holds, as scalars."""
    top = tl.max(m, 0)
    move = tl.maximum(m - top, LOWEST)
    c = tl.exp2(move * alpha)
    kept = tl.where(m < top, s * c, r)
    s, r, e = tl.reduce((s * c, kept, c * tl.fma(move, s, e)), 0, add3)
    return top, s, r, e


@triton.jit
def absorb(x, m, s, r, e, alpha):
    """Add a block x [UNROLL, LANES, WIDTH] to the sets of LANES lanes; no lane looks at another."""
    top = tl.maximum(m, tl.max(tl.max(x, 2), 0))
    move = tl.maximum(m - top, LOWEST)
    c = tl.exp2(move * alpha)
    d = x - top[None, :, None]
    p = tl.exp2(d * alpha)
    below = tl.where(d < 0, p, 0.0)
    weighted = p * tl.maximum(d, LOWEST)
    r = tl.where(m < top, s * c, r) + tl.sum(tl.sum(below, 2), 0)
    e = c * tl.fma(move, s, e) + tl.sum(tl.sum(weighted, 2), 0)
    s = s * c + tl.sum(tl.sum(p, 2), 0)
    return top, s, r, e


@triton.jit
def left_at(left, SHAPE: tl.constexpr, SIZE: tl.constexpr):
    """Of `left` elements of a block, how many are left where each of its items [UNROLL, LANES, WIDTH] begins.

    An item is SIZE elements. A lane's items differ by constants, so none takes a register outside the block that asks.
    """
    lanes = left - tl.arange(0, SHAPE[1]) * (SHAPE[2] * SIZE)
    steps = tl.arange(0, SHAPE[0]) * (SHAPE[1] * SHAPE[2] * SIZE)
    items = tl.arange(0, SHAPE[2]) * SIZE
    return lanes[None, :, None] - steps[:, None, None] - items[None, None, :]
