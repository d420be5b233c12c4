"""Backward: the gradient of logprob, entropy and lse with respect to rows of logits, elementwise.

With z = k · w, p = softmax(z), H its entropy and g, gH, gl the incoming gradients:

    dz = g (1[y] − p) − gH p (log p + H) + gl p = p (b₀ + b₁ d),  d = w − M
    b₀ = gl − g − gH (H − log s),  b₁ = −k gH

The target's entry uses 1 − p = −expm1(logprob), which does not cancel. Bytes: the active rows once, the gradient once.
Writing over the logits is the same kernel: each program reads its elements before it writes them. Masked rows get 0
without being read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from entropy_fast.kernels.device import LOG2E, LOWEST, one_minus_exp, tanh
from entropy_fast.kernels.rows import TRITON_DTYPE
from entropy_fast.kernels.settings import BackwardSettings, backward_settings, vector_width
from entropy_fast.reference.rows import RowGradients, RowStats, arithmetic_dtype
from entropy_fast.reference.transform import Transform


@triton.jit
def gradient_or_zero(gradient_ptr, row, ACC: tl.constexpr):
    """The incoming gradient of a row; None is 0."""
    if gradient_ptr is None:
        gradient = tl.full([], 0.0, ACC)
    else:
        gradient = tl.load(gradient_ptr + row).to(ACC)
    return gradient


@triton.jit(do_not_specialize=["inner", "vocab", "stride_outer", "stride_inner", "out_outer", "out_inner", "pieces"])
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
    factor: tl.float64,
    squeeze: tl.float64,
    ACC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    k = tl.full([], factor, ACC)
    squeeze = tl.full([], squeeze, ACC)
    # multiples of WIDTH already; said in a way that the compiler understands, so that it emits wide accesses
    stride_outer = stride_outer // WIDTH * WIDTH
    stride_inner = stride_inner // WIDTH * WIDTH
    out_outer = out_outer // WIDTH * WIDTH
    out_inner = out_inner // WIDTH * WIDTH
    if EVEN:
        vocab = vocab // WIDTH * WIDTH
    row = (tl.program_id(0) // pieces).to(tl.int64)
    first = tl.program_id(0) % pieces * (BLOCK * STEPS)
    row_ptr = logits_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner
    out_ptr += (row // inner) * out_outer + (row % inner) * out_inner
    active = True
    if mask_ptr is not None:
        active = tl.load(mask_ptr + row).to(tl.int1)
    if active:
        target = tl.load(targets_ptr + row)
        logprob = tl.load(logprob_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        peak = tl.load(peak_ptr + row)
        log_sum = tl.load(log_sum_ptr + row)
        g = gradient_or_zero(grad_logprob_ptr, row, ACC)
        g_entropy = gradient_or_zero(grad_entropy_ptr, row, ACC)
        g_lse = gradient_or_zero(grad_lse_ptr, row, ACC)
        b0 = k * (g_lse - g - g_entropy * (entropy - log_sum))
        b1 = -k * k * g_entropy
        p_target = tl.exp(logprob)
        pull = p_target * (g_lse - g_entropy * (tl.maximum(logprob, LOWEST) + entropy))
        at_target = k * (g * one_minus_exp(logprob) + pull)
        alpha = k * LOG2E
        offset = log_sum * LOG2E
        for step in tl.static_range(STEPS):
            start = first + step * BLOCK
            cols = tl.arange(0, BLOCK)
            inside = cols < vocab - start
            w = tl.load(row_ptr + start + cols, mask=inside, other=0.0, eviction_policy="evict_first").to(ACC)
            if bias_ptr is not None:
                w += tl.load(bias_ptr + start + cols, mask=inside, other=0.0).to(ACC)
            if SOFTCAP:
                w = tanh(w * squeeze)
            d = w - peak
            p = tl.exp2(d * alpha - offset)
            dw = p * (b0 + b1 * tl.maximum(d, LOWEST))
            dw = tl.where(cols == target - start, at_target, dw)
            if SOFTCAP:
                dw *= (1.0 - w * w) * squeeze
            tl.store(out_ptr + start + cols, dw.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        for step in tl.static_range(STEPS):
            cols = tl.arange(0, BLOCK)
            start = first + step * BLOCK
            zeros = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
            tl.store(out_ptr + start + cols, zeros, mask=cols < vocab - start)


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
        targets: (outer, inner), contiguous, and so are all of `stats` and `gradients`.
        mask: (outer, inner), bool, contiguous, or None.
        bias: (vocab,), contiguous, or None.
        transform: as in the forward.
        stats: what the forward returned.
        gradients: incoming; None is 0.
        out: (outer, inner, vocab), in the logits' dtype; may be `logits`.
        settings: launch settings; from the table by default.
    """
    _, inner, vocab = logits.shape
    width = min(vector_width(logits), vector_width(out))
    settings = settings or backward_settings(vocab, logits.element_size(), width)
    if targets.numel() == 0:
        return
    pieces = triton.cdiv(vocab, settings.block * settings.steps)
    row_stats_backward_kernel[(targets.numel() * pieces,)](
        out,
        logits,
        bias,
        targets,
        mask,
        *stats,
        *gradients,
        inner,
        vocab,
        logits.stride(0),
        logits.stride(1),
        out.stride(0),
        out.stride(1),
        pieces,
        transform.factor,
        transform.squeeze or 0.0,
        ACC=TRITON_DTYPE[arithmetic_dtype(logits.dtype)],
        SOFTCAP=transform.softcap is not None,
        EVEN=vocab % width == 0,
        BLOCK=settings.block,
        WIDTH=width,
        STEPS=settings.steps,
        num_warps=settings.warps,
    )
