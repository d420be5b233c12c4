"""Blocks of a row of logits: wide loads where rows allow them, and words for rows that start on any 2 bytes.

Words are of 4 bytes, aligned; each is shifted into the next by where the row starts. An element that is loaded by
itself would hold a register while in flight, in words of two it holds half of one.
"""

import triton
import triton.language as tl

from entropy_fast.kernels.rows_words import halves


@triton.jit
def load_word(words_ptr, word, skip, phase, left):
    """Words `word + skip` of a row; where `left` is not None, those alone that hold one of so many elements."""
    pointer = (words_ptr + skip) + word
    if left is None:
        value = tl.load(pointer, eviction_policy="evict_first")
    else:
        inside = 2 * word < left + phase - 2 * skip
        value = tl.load(pointer, mask=inside, other=0, eviction_policy="evict_first")
    return value


@triton.jit
def shifted(low, high, phase):
    """The 16-bit elements `phase` and `phase` + 1 of the four in two words, as a word."""
    both = low.to(tl.uint32, bitcast=True).to(tl.uint64) | (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)
    # one funnel shift
    return (both >> (16 * phase).to(tl.uint64)).to(tl.int32)


@triton.jit
def load_words(words_ptr, phase, left, BLOCK: tl.constexpr):
    """16-bit elements [BLOCK] of a row in words of two, at `phase` (0 or 1) elements after `words_ptr`.

    A lane takes eight elements. Their pairs may lie across two words. The fifth word is loaded at `phase` words after
    the fourth, so where the row starts on 4 bytes it is the same one, and no word is read that holds nothing of the
    row; words of memory begin and end where allocations do.
    """
    # With a second dimension: the compiler gives one layout to all vectors of a length that it loads or stores, which
    # is not this one where others are contiguous, and exchanges what is loaded by it through shared memory.
    word = tl.arange(0, BLOCK // 8)[None, :] * 4
    a = load_word(words_ptr, word, 0, phase, left)
    b = load_word(words_ptr, word, 1, phase, left)
    c = load_word(words_ptr, word, 2, phase, left)
    d = load_word(words_ptr, word, 3, phase, left)
    last = load_word(words_ptr, word, 3 + phase, phase, left)
    even = tl.join(shifted(a, b, phase), shifted(c, d, phase))
    odd = tl.join(shifted(b, c, phase), shifted(d, last, phase))
    return tl.reshape(tl.join(even, odd), [BLOCK // 2])


@triton.jit
def elements(words, element: tl.constexpr):
    """The 16-bit elements of words [N] in float32, [2 N]."""
    first, second = halves(words, element)
    return tl.reshape(tl.join(first, second), [2 * words.shape[0]])


@triton.jit
def load_block(
    row_ptr,
    words_ptr,
    phase,
    begin,
    left,
    SURE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Elements [BLOCK] of a row from `begin` on, with PAIRS as words [BLOCK // 2] of two.

    The first `left` are there, and the compiler knows of SURE of them, for which it needs no mask. Loads of WIDTH
    elements of which none is there are left out, and give −inf; the last one may read past the end, within the 16 bytes
    that hold the last element. (Words that are left out give 0.) Of one dimension, so that a vector stays in one
    thread, whatever layout the compiler likes for three.
    """
    if WORDS:
        if SURE >= BLOCK:
            w = load_words(words_ptr + begin // 2, phase, None, BLOCK)
        else:
            w = load_words(words_ptr + begin // 2, phase, left, BLOCK)
        if not PAIRS:
            w = elements(w, row_ptr.dtype.element_ty)
    else:
        if PAIRS:
            pointer = words_ptr + begin // 2
            SIZE: tl.constexpr = 2
            NONE: tl.constexpr = (0xFF80FF80 if row_ptr.dtype.element_ty == tl.bfloat16 else 0xFC00FC00) - (1 << 32)
        else:
            pointer = row_ptr + begin
            SIZE: tl.constexpr = 1
            NONE: tl.constexpr = -float("inf")
        place = tl.arange(0, BLOCK // SIZE)
        if SURE >= BLOCK:
            w = tl.load(pointer + place, eviction_policy="evict_first")
        else:
            inside = (place < SURE // SIZE) | (place < tl.cdiv(left, WIDTH) * (WIDTH // SIZE))
            w = tl.load(pointer + place, mask=inside, other=NONE, eviction_policy="evict_first")
    return w
