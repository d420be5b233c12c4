"""Sums of exponentials of many numbers, which can be merged: exact where one number has nearly all the mass.

A set of numbers w is held as (m, n, r, e), for logits z = k · w and α = k · log₂e:

    m = max w        n = how many w reach it        r = Σ 2^t        e = Σ 2^t t        over w < m, with t = α w − ρ

ρ is α m, rounded (`reference_of`): so t takes one multiply-add, rounded once, and α m − ρ, which another gives exactly,
is made up for at the end (`moments`). Counting what reaches m apart keeps the digits of the rows that matter most: when
one token has nearly all the mass, logprob and entropy are made of r, far below the resolution of 1 + r. It is
enough to count one: `rows_pairs` leaves others that are equal to m in r, whose digits then do not matter.

No product feeds a sum but by an explicit fma, and the compiler fuses none by itself (`rows._variant`): ρ is rounded for
good, and bits depend on no compiler's choice.
"""

import triton
import triton.language as tl

from entropy_fast.kernels.device import LN2, LOWEST, log1p_below_half

# The peak of an empty set: no finite float32 lies below it.
FLOOR = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def empty_sets(LANES: tl.constexpr, ACC: tl.constexpr):
    """A vector of sets without elements."""
    zeros = tl.zeros([LANES], ACC)
    return tl.full([LANES], FLOOR, ACC), zeros, zeros, zeros


@triton.jit
def reference_of(m, alpha, least):
    """ρ of sets with peaks m; at least `least`, which is finite."""
    return tl.maximum(m * alpha, least)


@triton.jit
def moved(m, n, r, e, top, reference, alpha, least):
    """(n, r, e) of sets once they get a peak `top` ≥ m with its ρ: what reached m joins the others if top is more."""
    rises = m < top
    t = tl.maximum(tl.fma(m, alpha, -reference), LOWEST)
    q = tl.where(rises, n * tl.exp2(t), 0.0)
    shift = tl.maximum(reference_of(m, alpha, least) - reference, LOWEST)
    c = tl.exp2(shift)
    return tl.where(rises, 0.0, n), tl.fma(r, c, q), tl.fma(c, tl.fma(shift, r, e), q * t)


@triton.jit
def add3(a, b, c, a2, b2, c2):
    """Three sums at once: one exchange between warps in place of three."""
    return a + a2, b + b2, c + c2


@triton.jit
def largest(m, AXIS: tl.constexpr, INTEGERS: tl.constexpr):
    """The largest of numbers along an axis, none of them NaN.

    INTEGERS: of float32 as integers in the same order, a warp's largest of which is one instruction of NVIDIA's GPUs.
    """
    if INTEGERS and m.dtype == tl.float32:
        bits = m.to(tl.int32, bitcast=True)
        top = tl.max(bits ^ ((bits >> 31) & 0x7FFFFFFF), AXIS)
        top = (top ^ ((top >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        top = tl.max(m, AXIS)
    return top


@triton.jit
def merge(m, n, r, e, alpha, least, INTEGERS: tl.constexpr = True):
    """The union of all sets; of a matrix, those of its rows. m, n, r and e are tuples: some sets in each place."""
    COUNT: tl.constexpr = len(m)
    AXIS: tl.constexpr = len(m[0].shape) - 1
    top = m[0]
    for i in tl.static_range(1, COUNT):
        top = tl.maximum(top, m[i])
    top = largest(top, AXIS, INTEGERS)
    reference = reference_of(top, alpha, least)
    top_here = top if AXIS == 0 else top[:, None]
    reference_here = reference if AXIS == 0 else reference[:, None]
    n_all, r_all, e_all = moved(m[0], n[0], r[0], e[0], top_here, reference_here, alpha, least)
    for i in tl.static_range(1, COUNT):
        n_more, r_more, e_more = moved(m[i], n[i], r[i], e[i], top_here, reference_here, alpha, least)
        n_all, r_all, e_all = add3(n_all, r_all, e_all, n_more, r_more, e_more)
    n_all, r_all, e_all = tl.reduce((n_all, r_all, e_all), AXIS, add3)
    return top, n_all, r_all, e_all


@triton.jit
def absorb(x, m, n, r, e, alpha, least, FIRST: tl.constexpr):
    """Add a block x [UNROLL, LANES, WIDTH] to the sets of LANES lanes, which are empty at FIRST.

    No lane looks at another. NaN is never the peak, unless all is NaN, and r becomes NaN with it.
    """
    top = tl.maximum(tl.max(tl.max(x, 2), 0), FLOOR)
    if not FIRST:
        top = tl.maximum(top, m)
    reference = reference_of(top, alpha, least)
    reaches = x == top[None, :, None]
    t = tl.where(reaches, -float("inf"), tl.fma(x, alpha, -reference[None, :, None]))
    p = tl.exp2(t)
    n_block = tl.sum(tl.sum(tl.where(reaches, 1.0, 0.0).to(x.dtype), 2), 0)
    r_block = tl.sum(tl.sum(p, 2), 0)
    e_block = tl.sum(tl.sum(p * tl.maximum(t, LOWEST), 2), 0)
    if FIRST:
        return top, n_block, r_block, e_block
    else:
        n, r, e = moved(m, n, r, e, top, reference, alpha, least)
        return top, n + n_block, r + r_block, e + e_block


@triton.jit
def moments(m, n, r, e, alpha, least):
    """Of a set in scalars, with z − k m ≤ 0 for its logits: log Σ e^(z − k m), and the mean of z − k m.

    NaN for a set without finite numbers, or with +inf or NaN among them.
    """
    # what is left of α m by rounding; more than that only where all others are too far below to count
    rest = tl.minimum(tl.maximum(tl.fma(m, alpha, -reference_of(m, alpha, least)), -1.0), 1.0)
    back = tl.exp2(-rest)
    e = back * tl.fma(-rest, r, e)
    r = back * r
    s = tl.where((n + r > 0) & (m < float("inf")), n + r, float("nan"))
    alone = (n < 1.5) & (r < 0.5) & (s == s)
    log_sum = tl.where(alone, log1p_below_half(r), tl.log(s))
    return log_sum, LN2 * e / s


@triton.jit
def left_at(left, SHAPE: tl.constexpr, SIZE: tl.constexpr):
    """Of `left` elements of a block, how many are left where each of its items [UNROLL, LANES, WIDTH] begins.

    An item is SIZE elements. A lane's items differ by constants, so none takes a register outside the block that asks.
    """
    lanes = left - tl.arange(0, SHAPE[1]) * (SHAPE[2] * SIZE)
    steps = tl.arange(0, SHAPE[0]) * (SHAPE[1] * SHAPE[2] * SIZE)
    items = tl.arange(0, SHAPE[2]) * SIZE
    return lanes[None, :, None] - steps[:, None, None] - items[None, None, :]
