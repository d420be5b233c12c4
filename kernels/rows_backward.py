"""Backward: the gradient of logprob, entropy and lse with respect to rows of logits, elementwise.

With z = k · w, p = softmax(z), H its entropy and g, gH, gl the incoming gradients:

    dw = k (g (1[y] − p) − gH p (log p + H) + gl p) = p (b₀ + b₁ t),  t = log₂ p = α (w − M) − λ
    b₀ = k (gl − g − gH H),  b₁ = −k gH log 2,  λ = log₂ s

The target's entry uses 1 − p = −expm1(logprob), which does not cancel. Bytes: the active rows once, the gradient once.
Writing over the logits is the same kernel: each program reads its elements before it writes them. Masked rows get 0
without being read.

At the rate of a copy a fast device leaves a program little time beside its loads and stores: an element takes 8
instructions, and what a program works out once, shared by few elements, counts as much. So the vocabulary is known to
the compiler, and what concerns the target is left to those programs that have it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from entropy_fast.kernels.device import LN2, LOG2E, LOWEST, gradient_at_target, gradient_or_zero
from entropy_fast.kernels.launch import Variant, ceil_div, launch
from entropy_fast.kernels.rows import TRITON_DTYPE
from entropy_fast.kernels.settings import (
    BackwardSettings,
    backward_settings,
    is_flat,
    packed_instructions,
    registers,
    vector_width,
)
from entropy_fast.kernels.tanh import tanh
from entropy_fast.reference.rows import RowGradients, RowStats, arithmetic_dtype, is_expanded
from entropy_fast.reference.transform import Transform

# Most registers of a thread where rows start anywhere: left alone, the compiler chooses 32 to 73 by what else the
# kernel says, and has lost up to a tenth by it.
ODD_REGISTERS = 40
# What 32 bits count, less a piece.
GAPLESS_ELEMENTS = 2**31 - 2**16


@triton.jit
def gradient(
    w, bias_ptr, place, row_begin, inside, has_target, target, at_target, peak, alpha, lam, b0, b1, squeeze,
    SOFTCAP: tl.constexpr, NVIDIA: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of logits w at some places of a row, in their dtype; `at_target` at the target, if it is here."""
    element: tl.constexpr = w.dtype
    w = w.to(peak.dtype)
    if bias_ptr is not None:
        w += tl.load(bias_ptr + (place - row_begin), mask=inside, other=0.0).to(peak.dtype)
    if SOFTCAP:
        w = tanh(w * squeeze, NVIDIA)
    t = (w - peak) * alpha - lam
    dw = tl.exp2(t) * (b0 + b1 * tl.maximum(t, LOWEST))
    if has_target:
        # constants beside one number for each vector: compared with places, each place would take a register
        item = place & (WIDTH - 1)
        dw = tl.where(item == row_begin + target - (place - item), at_target, dw)
    if SOFTCAP:
        dw *= (1.0 - w * w) * squeeze
    return dw.to(element)


@triton.jit
def ends(row_begin, row_end, begin, size, WIDTH: tl.constexpr):
    """Places in a row's first vector and its last, [2 WIDTH], and which of them are to be written one by one.

    Those are the row's, each once, in a vector of this piece that is not the row's alone.
    """
    in_head = tl.arange(0, 2 * WIDTH) < WIDTH
    vector = tl.where(in_head, row_begin // WIDTH * WIDTH, row_end // WIDTH * WIDTH)
    place = vector + tl.arange(0, 2 * WIDTH) % WIDTH
    inside = (place >= row_begin) & (place < row_end) & (in_head | (vector >= row_begin))
    inside &= (vector < row_begin) | (vector + WIDTH > row_end)
    return place, inside & (vector >= begin) & (vector < begin + size)


@triton.jit
def piece_of_row(
    row, row_begin, begin, size,
    gradient_ptr, source_ptr, bias_ptr, targets_ptr, mask_ptr, logprob_ptr, entropy_ptr, peak_ptr, log_sum_ptr,
    grad_logprob_ptr, grad_entropy_ptr, grad_lse_ptr, step_logprob, step_entropy, step_lse, k, alpha, squeeze,
    ACC: tl.constexpr, SOFTCAP: tl.constexpr, NVIDIA: tl.constexpr, VOCAB: tl.constexpr, ENDS: tl.constexpr,
    CUT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write what of a row lies in a piece. ENDS: rows may start anywhere; CUT: pieces may be smaller than BLOCK."""
    place = begin + tl.arange(0, BLOCK)
    vector = place // WIDTH * WIDTH
    row_end = row_begin + VOCAB
    whole = (vector >= row_begin) & (vector + WIDTH <= row_end)
    if CUT:
        whole &= vector < begin + size
    active = True
    read = whole
    if mask_ptr is not None:
        active = tl.load(mask_ptr + row) != 0
        read &= vector < tl.where(active, row_end, row_begin)
    # requested before the row's numbers
    w = tl.load(source_ptr + place, mask=read, other=0.0)
    has_ends = (row_begin >= begin) | (row_end < begin + size)
    if active:
        target = tl.load(targets_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        peak = tl.load(peak_ptr + row)
        log_sum = tl.load(log_sum_ptr + row)
        g = gradient_or_zero(grad_logprob_ptr, row * step_logprob, None, ACC)
        g_entropy = gradient_or_zero(grad_entropy_ptr, row * step_entropy, None, ACC)
        g_lse = gradient_or_zero(grad_lse_ptr, row * step_lse, None, ACC)
        lam = log_sum * LOG2E
        b0 = k * (g_lse - g - g_entropy * entropy)
        b1 = -k * LN2 * g_entropy
        first = begin - row_begin
        has_target = (target >= first) & (target < first + BLOCK)
        target = target.to(tl.int32)
        at_target = tl.full([], 0.0, ACC)
        # before the gradient, not within: so the target is requested first, not when all else is done
        if has_target:
            at_target = k * gradient_at_target(tl.load(logprob_ptr + row), entropy, g, g_entropy, g_lse)
        dw = gradient(
            w, bias_ptr, place, row_begin, whole, has_target, target, at_target, peak, alpha, lam, b0, b1,
            squeeze, SOFTCAP, NVIDIA, WIDTH,
        )  # fmt: skip
        tl.store(gradient_ptr + place, dw, mask=whole)
        if ENDS:  # noqa: SIM102 (one is known to the compiler, the other is not)
            if has_ends:
                end_place, in_end = ends(row_begin, row_end, begin, size, WIDTH)
                w_end = tl.load(source_ptr + end_place, mask=in_end, other=0.0)
                dw_end = gradient(
                    w_end, bias_ptr, end_place, row_begin, in_end, has_target, target, at_target, peak, alpha,
                    lam, b0, b1, squeeze, SOFTCAP, NVIDIA, WIDTH,
                )  # fmt: skip
                tl.store(gradient_ptr + end_place, dw_end, mask=in_end)
    else:
        tl.store(gradient_ptr + place, tl.zeros([BLOCK], gradient_ptr.dtype.element_ty), mask=whole)
        if ENDS:  # noqa: SIM102
            if has_ends:
                end_place, in_end = ends(row_begin, row_end, begin, size, WIDTH)
                zeros = tl.zeros([2 * WIDTH], gradient_ptr.dtype.element_ty)
                tl.store(gradient_ptr + end_place, zeros, mask=in_end)


@triton.jit(
    do_not_specialize=[
        *("rows", "inner", "stride_outer", "stride_inner", "out_outer", "out_inner"),
        *("step_logprob", "step_entropy", "step_lse"),
    ]
)
def row_stats_backward_kernel(
    out_ptr,
    logits_ptr,
    bias_ptr,
    targets_ptr,
    mask_ptr,
    logprob_ptr,
    entropy_ptr,
    peak_ptr,
    log_sum_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    grad_lse_ptr,
    rows,
    inner,
    stride_outer,
    stride_inner,
    out_outer,
    out_inner,
    step_logprob,
    step_entropy,
    step_lse,
    factor: tl.float64,
    squeeze: tl.float64,
    ACC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NVIDIA: tl.constexpr,
    VOCAB: tl.constexpr,
    PIECES: tl.constexpr,
    SIZE: tl.constexpr,
    EVEN: tl.constexpr,
    FLAT: tl.constexpr,
    GAPLESS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a piece of SIZE elements, at most BLOCK: of a row, or of all rows if no gaps are between them.

    So it is if GAPLESS; such a piece holds the end of one row and the beginning of the next at most. FLAT: rows are a
    constant apart. "Places" count from the vector in which the row, or the first row, begins. Vectors start at
    multiples of WIDTH elements, rows may start anywhere unless EVEN: vectors that lie in one row are accessed whole,
    what is left at a row's two ends element by element. Source and gradient are alike in this (see the launcher).
    """
    k = tl.full([], factor, ACC)
    alpha = tl.full([], factor * LOG2E, ACC)
    squeeze = tl.full([], squeeze, ACC)
    if EVEN:
        # multiples already; said in a way that the compiler understands, so that it emits wide accesses
        stride_outer, stride_inner = stride_outer // WIDTH * WIDTH, stride_inner // WIDTH * WIDTH
        out_outer, out_inner = out_outer // WIDTH * WIDTH, out_inner // WIDTH * WIDTH
    if GAPLESS:
        begin = tl.program_id(0) * BLOCK
        row = (begin.to(tl.uint32) // VOCAB).to(tl.int32)
        row_begin = row * VOCAB
        source_ptr = logits_ptr
        gradient_ptr = out_ptr
    else:
        row = tl.program_id(0) // PIECES
        begin = (tl.program_id(0) - row * PIECES) * SIZE
        # without signs, which take a third longer to divide
        outer = 0 if FLAT else (row.to(tl.uint32) // inner.to(tl.uint32)).to(tl.int32)
        column = (row - outer * inner).to(tl.int64)
        start = column * stride_inner
        out_start = column * out_inner
        if not FLAT:
            start += outer.to(tl.int64) * stride_outer
            out_start += outer.to(tl.int64) * out_outer
        row_begin = 0
        if not EVEN:
            row_begin = (start % WIDTH).to(tl.int32)
            start = start // WIDTH * WIDTH
            out_start = out_start // WIDTH * WIDTH
        source_ptr = logits_ptr + start
        gradient_ptr = out_ptr + out_start
    piece_of_row(
        row, row_begin, begin, SIZE,
        gradient_ptr, source_ptr, bias_ptr, targets_ptr, mask_ptr, logprob_ptr, entropy_ptr, peak_ptr, log_sum_ptr,
        grad_logprob_ptr, grad_entropy_ptr, grad_lse_ptr, step_logprob, step_entropy, step_lse, k, alpha,
        squeeze, ACC, SOFTCAP, NVIDIA, VOCAB, not EVEN, SIZE < BLOCK, BLOCK, WIDTH,
    )  # fmt: skip
    if GAPLESS:  # noqa: SIM102 (one is known to the compiler, the other is not)
        if (row_begin + VOCAB < begin + BLOCK) & (row + 1 < rows):
            piece_of_row(
                row + 1, row_begin + VOCAB, begin, SIZE,
                gradient_ptr, source_ptr, bias_ptr, targets_ptr, mask_ptr, logprob_ptr, entropy_ptr, peak_ptr,
                log_sum_ptr, grad_logprob_ptr, grad_entropy_ptr, grad_lse_ptr, step_logprob, step_entropy,
                step_lse, k, alpha, squeeze, ACC, SOFTCAP, NVIDIA, VOCAB, True, False, BLOCK, WIDTH,
            )  # fmt: skip


def row_stats_backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    transform: Transform,
    stats: RowStats,
    gradients: RowGradients,
    out: torch.Tensor,
    settings: BackwardSettings | None = None,
) -> None:
    """Write the gradient of Σ (g · logprob + gH · entropy + gl · lse) with respect to the logits.

    Args:
        logits: (outer, inner, vocab), the last dimension contiguous, any other strides.
        targets: (outer, inner), contiguous, and so are all of `stats`.
        mask: (outer, inner), bool, contiguous, or None.
        bias: (vocab,), contiguous, or None.
        transform: as in the forward.
        stats: what the forward returned.
        gradients: incoming, contiguous or one number expanded; None is 0.
        out: (outer, inner, vocab), in the logits' dtype; may be `logits`.
        settings: launch settings; from the table by default.
    """
    if targets.numel() == 0:
        return
    _, inner, vocab = logits.shape
    width = common_width(logits, out)
    settings = settings or backward_settings(logits.element_size())
    even = vocab % width == 0 and not any(n % width for n in logits.stride()[:2])
    rows = targets.numel()
    gapless = not even and vocab >= settings.block and without_gaps(logits, out)
    variant = _variant(
        settings,
        arithmetic_dtype(logits.dtype),
        logits.element_size(),
        transform.softcap is not None,
        vocab,
        even,
        is_flat(logits) and is_flat(out),
        gapless,
        width,
        bias is not None,
        logits.device,
        packed_instructions(logits.device) > 0,
    )
    launch(
        row_stats_backward_kernel,
        ceil_div(logits.numel(), settings.block) if gapless else rows * variant.constants["PIECES"],
        (out, logits, bias, targets, mask, *stats, *gradients),
        (
            *(rows, inner, logits.stride(0), logits.stride(1), out.stride(0), out.stride(1)),
            *(0 if g is None or is_expanded(g) else 1 for g in gradients),
        ),
        (transform.factor, transform.squeeze or 0.0),
        variant,
    )


@cache
def _variant(
    settings: BackwardSettings,
    dtype: torch.dtype,
    itemsize: int,
    softcap: bool,
    vocab: int,
    even: bool,
    flat: bool,
    gapless: bool,
    width: int,
    has_bias: bool,
    device: torch.device,
    nvidia: bool,
) -> Variant:
    pieces, size = 1, settings.block
    if not gapless:
        pieces = ceil_div(vocab if even else vocab + width - 1, settings.block)
        if not even:
            # pieces alike, in whole lines of 128 bytes: of 50257 elements a last one of 4096 would be nearly empty
            line = 128 // itemsize
            size = ceil_div(vocab + width - 1, pieces * line) * line
    constants = {"ACC": TRITON_DTYPE[dtype], "SOFTCAP": softcap, "NVIDIA": nvidia, "VOCAB": vocab, "PIECES": pieces}
    constants |= {"SIZE": size, "EVEN": even, "FLAT": flat, "GAPLESS": gapless, "BLOCK": settings.block, "WIDTH": width}
    # what does not fit into the limit would spill
    crowded = even or softcap or has_bias or dtype == torch.float64
    return Variant(constants, num_warps=settings.warps, **registers(None if crowded else ODD_REGISTERS, device))


def common_width(a: torch.Tensor, b: torch.Tensor) -> int:
    """Elements of the widest access that suits both tensors, 16 bytes where their rows start alike."""
    widest = 16 // a.element_size()
    if a.data_ptr() % 16 == 0 and b.data_ptr() % 16 == 0:
        apart = [(x - y) % widest for x, y in zip(a.stride()[:2], b.stride()[:2], strict=True)]
        if not any(apart):
            return widest
    return min(vector_width(a), vector_width(b))


def without_gaps(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both tensors' rows lie next to each other, from a multiple of 16 bytes on; 32 bits count the elements."""
    together = a.is_contiguous() and b.is_contiguous() and a.numel() < GAPLESS_ELEMENTS
    return together and a.data_ptr() % 16 == 0 and b.data_ptr() % 16 == 0
