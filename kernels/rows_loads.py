"""Blocks of a row of logits: wide loads where rows allow them, and words for rows that start on any 2 bytes.

Words are of 4 bytes, aligned; each is shifted into the next by where the row starts. An element that is loaded by
itself would hold a register while in flight, in words of two it holds half of one.
"""

import triton
import triton.language as tl

from entropy_fast.kernels.rows_pairs import halves


@triton.jit
def load_up_to(pointer, left, BLOCK: tl.constexpr, WIDE: tl.constexpr, POLICY: tl.constexpr):
    """Elements [BLOCK], the first `left` of them read.

    WIDE: several by a load, with one mask, which is cheaper than a branch. Where each element has a load of its own,
    and so a mask, only the last block has them.
    """
    place = tl.arange(0, BLOCK)
    if WIDE:
        x = tl.load(pointer + place, mask=place < left, other=0, eviction_policy=POLICY)
    elif left >= BLOCK:
        x = tl.load(pointer + place, eviction_policy=POLICY)
    else:
        x = tl.load(pointer + place, mask=place < left, other=0, eviction_policy=POLICY)
    return x


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
    word = tl.arange(0, BLOCK // 8) * 4
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
    start,
    end,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Elements [BLOCK] of a row from `start` on, those before `end`; with PAIRS as words [BLOCK // 2] of two.

    Whole loads of WIDTH elements may read past the end, within the 16 bytes that hold the last element. Of one
    dimension, so that a vector stays in one thread, whatever layout the compiler likes for three.
    """
    left = end - start
    loaded = tl.cdiv(left, WIDTH) * WIDTH
    if WORDS:
        if left < BLOCK:
            w = load_words(words_ptr + start // 2, phase, left, BLOCK)
        else:
            w = load_words(words_ptr + start // 2, phase, None, BLOCK)
        if not PAIRS:
            w = elements(w, row_ptr.dtype.element_ty)
    elif PAIRS:
        w = load_up_to(words_ptr + start // 2, loaded // 2, BLOCK // 2, True, "evict_first")
    else:
        w = load_up_to(row_ptr + start, loaded, BLOCK, WIDTH > 1, "evict_first")
    return w
