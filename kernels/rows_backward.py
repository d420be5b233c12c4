"""Backward: the gradient of logprob, entropy and lse with respect to rows of logits, elementwise.

With z = k · w, p = softmax(z), H its entropy and g, gH, gl the incoming gradients:

    dz = g (1[y] − p) − gH p (log p + H) + gl p = p (b₀ + b₁ d),  d = w − M
    b₀ = gl − g − gH (H − log s),  b₁ = −k gH

The target's entry uses 1 − p = −expm1(logprob), which does not cancel. Bytes: the active rows once, the gradient once.
Writing over the logits is the same kernel: each program reads its elements before it writes them. Masked rows get 0
without being read.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from entropy_fast.kernels.device import LOG2E, LOWEST, gradient_at_target, gradient_or_zero, tanh
from entropy_fast.kernels.launch import Variant, ceil_div, launch
from entropy_fast.kernels.rows import TRITON_DTYPE
from entropy_fast.kernels.settings import BackwardSettings, backward_settings, registers, vector_width
from entropy_fast.reference.rows import RowGradients, RowStats, arithmetic_dtype, is_expanded
from entropy_fast.reference.transform import Transform

# Most registers of a thread where rows start anywhere: left alone, the compiler chooses between 32 and 40 by what else
# the kernel says, and has lost up to a tenth by it.
ODD_REGISTERS = 40


@triton.jit
def gradient_block(
    source_ptr, out_ptr, bias_ptr, cols, inside, target, at_target, peak, alpha, offset, b0, b1, squeeze,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Read some elements of one row and write their gradient."""
    w = tl.load(source_ptr, mask=inside, other=0.0, eviction_policy="evict_first").to(peak.dtype)
    if bias_ptr is not None:
        w += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(peak.dtype)
    if SOFTCAP:
        w = tanh(w * squeeze)
    d = w - peak
    dw = tl.exp2(d * alpha - offset) * (b0 + b1 * tl.maximum(d, LOWEST))
    dw = tl.where(cols == target, at_target, dw)
    if SOFTCAP:
        dw *= (1.0 - w * w) * squeeze
    tl.store(out_ptr, dw.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        *("inner", "vocab", "stride_outer", "stride_inner", "out_outer", "out_inner", "pieces"),
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
    inner,
    vocab,
    stride_outer,
    stride_inner,
    out_outer,
    out_inner,
    pieces,
    step_logprob,
    step_entropy,
    step_lse,
    factor: tl.float64,
    squeeze: tl.float64,
    ACC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a piece of BLOCK elements of a row."""
    k = tl.full([], factor, ACC)
    alpha = tl.full([], factor * LOG2E, ACC)
    squeeze = tl.full([], squeeze, ACC)
    row = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    outer = row // inner
    column = (row - outer * inner).to(tl.int64)
    outer = outer.to(tl.int64)
    row_start = outer * stride_outer + column * stride_inner
    # Rows may start anywhere, but vectors start at multiples of WIDTH; `phase` elements of a row's first vector belong
    # to the row before it. Source and gradient are alike in this (see the launcher). Vectors that lie in the row whole
    # are accessed whole; what is left at its two ends goes element by element.
    if EVEN:
        phase = 0
        vocab = vocab // WIDTH * WIDTH
    else:
        phase = (row_start % WIDTH).to(tl.int32)
    source_ptr = logits_ptr + row_start // WIDTH * WIDTH
    gradient_ptr = out_ptr + (outer * out_outer + column * out_inner) // WIDTH * WIDTH
    place = piece * BLOCK + tl.arange(0, BLOCK)
    vector = place // WIDTH * WIDTH - phase
    whole = (vector >= 0) & (vector + WIDTH <= vocab)
    # the ends: the first vector and the last
    end_vector = tl.where(tl.arange(0, 2 * WIDTH) < WIDTH, 0, (vocab + phase) // WIDTH * WIDTH)
    end_place = end_vector + tl.arange(0, 2 * WIDTH) % WIDTH
    in_end = (end_place >= phase) & (end_place - phase < vocab)
    in_end &= ((end_vector < phase) | (end_vector + WIDTH > vocab + phase)) & (
        (end_vector > 0) | (tl.arange(0, 2 * WIDTH) < WIDTH)
    )
    active = True
    if mask_ptr is not None:
        active = tl.load(mask_ptr + row).to(tl.int1)
    if active:
        target = tl.load(targets_ptr + row)
        logprob = tl.load(logprob_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        peak = tl.load(peak_ptr + row)
        log_sum = tl.load(log_sum_ptr + row)
        g = gradient_or_zero(grad_logprob_ptr, row * step_logprob, None, ACC)
        g_entropy = gradient_or_zero(grad_entropy_ptr, row * step_entropy, None, ACC)
        g_lse = gradient_or_zero(grad_lse_ptr, row * step_lse, None, ACC)
        b0 = k * (g_lse - g - g_entropy * (entropy - log_sum))
        b1 = -k * k * g_entropy
        at_target = k * gradient_at_target(logprob, entropy, g, g_entropy, g_lse)
        offset = log_sum * LOG2E
        gradient_block(
            source_ptr + place, gradient_ptr + place, bias_ptr, place - phase, whole,
            target, at_target, peak, alpha, offset, b0, b1, squeeze, SOFTCAP,
        )  # fmt: skip
        if not EVEN:  # noqa: SIM102 (one is known to the compiler, the other is not)
            if piece == 0:
                gradient_block(
                    source_ptr + end_place, gradient_ptr + end_place, bias_ptr, end_place - phase, in_end,
                    target, at_target, peak, alpha, offset, b0, b1, squeeze, SOFTCAP,
                )  # fmt: skip
    else:
        tl.store(gradient_ptr + place, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=whole)
        if not EVEN:  # noqa: SIM102
            if piece == 0:
                zeros = tl.zeros([2 * WIDTH], out_ptr.dtype.element_ty)
                tl.store(gradient_ptr + end_place, zeros, mask=in_end)


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
    pieces = ceil_div(vocab + width - 1, settings.block)
    launch(
        row_stats_backward_kernel,
        targets.numel() * pieces,
        (out, logits, bias, targets, mask, *stats, *gradients),
        (
            *(inner, vocab, logits.stride(0), logits.stride(1), out.stride(0), out.stride(1), pieces),
            *(0 if g is None or is_expanded(g) else 1 for g in gradients),
        ),
        (transform.factor, transform.squeeze or 0.0),
        _variant(
            settings,
            arithmetic_dtype(logits.dtype),
            transform.softcap is not None,
            vocab % width == 0 and not any(n % width for n in logits.stride()[:2]),
            width,
            bias is not None,
            logits.device,
        ),
    )


@cache
def _variant(
    settings: BackwardSettings,
    dtype: torch.dtype,
    softcap: bool,
    even: bool,
    width: int,
    has_bias: bool,
    device: torch.device,
) -> Variant:
    constants = {"ACC": TRITON_DTYPE[dtype], "SOFTCAP": softcap, "EVEN": even, "BLOCK": settings.block, "WIDTH": width}
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
