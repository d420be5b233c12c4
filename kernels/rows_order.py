"""In which order programs take units of work: which group of rows, what of it, and far from which others."""

from __future__ import annotations

from functools import cache
from math import gcd

import triton
import triton.language as tl

# of all fractions the one whose multiples lie most evenly, however many are taken
GOLDEN = 0.618


@triton.jit
def unit_at(unit, groups, lag, ITEMS: tl.constexpr):
    """What a unit of work is: of which group of rows, and which of its ITEMS to read, or ITEMS: that the group ends.

    First `lag` groups are read, at most all. Then, with every group that is read, the one `lag` groups before it ends,
    whose sets are there by now; and at last those end that are left. Units are begun in order: whoever waits for a
    row's sets does so for units that others have begun.
    """
    STEP: tl.constexpr = ITEMS + 1
    later = unit - lag * ITEMS
    last = later - (groups - lag) * STEP
    group = later // STEP
    item = later - group * STEP
    group += tl.where(item < ITEMS, lag, 0)
    # before any ends, and after all are read
    group = tl.where(later < 0, unit // ITEMS, tl.where(last < 0, group, groups - lag + last))
    item = tl.where(later < 0, unit % ITEMS, tl.where(last < 0, item, ITEMS))
    return group, item


@cache
def spread(count: int, chunk: int) -> tuple[int, int]:
    """(step, inverse) for `spread_out`: for n = ⌊count / chunk⌋ a step without a common factor, and ⌊2³² / n⌋.

    Step · n stays below 2³². Few chunks need no spreading, and many have a step that is less than golden.
    """
    count //= chunk
    if count < 3:
        return 1, 0
    step = max(1, min(int(GOLDEN * count), (2**32 - 1) // count))
    while gcd(step, count) > 1:
        step -= 1
    return step, 2**32 // count


@triton.jit
def spread_out(place, count, step, inverse, CHUNK: tl.constexpr):
    """Every one of `count` places once, and those in a run far from each other; but CHUNK neighbours stay together.

    Chunk i goes to i · step mod their number; what is left of the last one stays. The quotient by the inverse is at
    most one too small, since the product is below 2³².
    """
    chunks = count // CHUNK
    product = (place // CHUNK).to(tl.uint32) * step.to(tl.uint32)
    quotient = ((product.to(tl.uint64) * inverse.to(tl.uint64)) >> 32).to(tl.uint32)
    rest = (product - quotient * chunks.to(tl.uint32)).to(tl.int32)
    rest = tl.where(rest >= chunks, rest - chunks, rest)
    return tl.where(place < chunks * CHUNK, rest * CHUNK + place % CHUNK, place)
