"""dz = d(log-prob, entropy, log-sum-exp) / d(logits) of a slab of the vocabulary, by a GEMM that makes the logits anew.

Tile by tile the logits turn, in registers, into

    dz = g (1[y] − p) − gH p (log p + H) + gL p,

which is stored once, in 16 bits; of float32 operands as high and low halves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from entropy_fast.kernels.device import LN2, LOG2E, gradient_at_target, gradient_or_zero
from entropy_fast.kernels.launch import Variant, ceil_div, launch
from entropy_fast.kernels.linear_tiles import base2_logits, product_tile, tile_of
from entropy_fast.reference.linear import LinearStats
from entropy_fast.reference.rows import RowGradients, is_expanded
from entropy_fast.reference.transform import Transform

# Of the kernel below, without and with a softcap.
COEFFICIENTS = [Variant({"BLOCK": 256, "SOFTCAP": softcap}, num_warps=4) for softcap in (False, True)]


class RowCoefficients(NamedTuple):
    """dz = −p (constant + slope · log2 p) times the softcap's slope, and `target` in the target's column.

    (rows,) float32 each; `lse` in base 2.
    """

    lse: torch.Tensor
    constant: torch.Tensor
    slope: torch.Tensor | None
    target: torch.Tensor


def row_coefficients(
    stats: LinearStats, grads: RowGradients, transform: Transform, gain: torch.Tensor | None = None
) -> RowCoefficients:
    """What dz needs of each row. `gain`, a scalar on the device, multiplies dz."""
    rows, device = len(stats.logprob), stats.logprob.device
    incoming = RowGradients(*(t if t is None or is_expanded(t) else t.contiguous() for t in grads))
    # each starts on 16 bytes
    pitch = ceil_div(rows, 4) * 4
    out = torch.empty(3 if grads.entropy is None else 4, pitch, dtype=torch.float32, device=device)
    variant = COEFFICIENTS[transform.softcap is not None]
    launch(
        coefficients_kernel,
        ceil_div(rows, variant.constants["BLOCK"]),
        (out, *stats, *incoming, gain),
        (rows, pitch, *(0 if t is None or is_expanded(t) else 1 for t in incoming)),
        (transform.factor * (transform.squeeze or 1.0), 1.0 / transform.factor),
        variant,
    )
    lse, constant, target, *slope = out[:, :rows]
    return RowCoefficients(lse, constant, slope[0] if slope else None, target)


@triton.jit(do_not_specialize=["N", "pitch", "step_logprob", "step_entropy", "step_lse"])
def coefficients_kernel(
    out_ptr,
    logprob_ptr,
    entropy_ptr,
    peak_ptr,
    log_sum_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    grad_lse_ptr,
    gain_ptr,
    N,
    pitch,
    step_logprob,
    step_entropy,
    step_lse,
    outer,
    uncap,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Rows of `out`: lse, constant, target and, where the entropy has a gradient, slope.

    A row without its target has no gradient to give, and is NaN.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = rows < N
    logprob = tl.load(logprob_ptr + rows, mask=live, other=0.0)
    entropy = tl.load(entropy_ptr + rows, mask=live, other=0.0)
    lse = tl.load(peak_ptr + rows, mask=live, other=0.0) + tl.load(log_sum_ptr + rows, mask=live, other=0.0)
    g = gradient_or_zero(grad_logprob_ptr, rows * step_logprob, live, tl.float32)
    g_entropy = gradient_or_zero(grad_entropy_ptr, rows * step_entropy, live, tl.float32)
    g_lse = gradient_or_zero(grad_lse_ptr, rows * step_lse, live, tl.float32)
    if gain_ptr is not None:
        outer *= tl.load(gain_ptr)
    constant = tl.where(logprob == logprob, g - g_lse + g_entropy * entropy, float("nan"))
    target = gradient_at_target(logprob, entropy, g, g_entropy, g_lse)
    if SOFTCAP:
        core = (logprob + lse) * uncap
        target *= 1.0 - core * core
    tl.store(out_ptr + rows, lse * LOG2E, mask=live)
    tl.store(out_ptr + pitch + rows, constant * outer, mask=live)
    tl.store(out_ptr + 2 * pitch + rows, target * outer, mask=live)
    if grad_entropy_ptr is not None:
        tl.store(out_ptr + 3 * pitch + rows, g_entropy * (LN2 * outer), mask=live)


@triton.jit(do_not_specialize=["N", "n_units"])
def dlogits_kernel(
    hidden,
    weight,
    dz,
    row_scale_ptr,
    col_scale_ptr,
    bias_ptr,
    target_ptr,
    lse_ptr,
    constant_ptr,
    slope_ptr,
    dz_target_ptr,
    N,
    C,
    K,
    hidden_stride,
    weight_stride,
    dz_stride,
    n_units,
    factor,
    squeeze,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):
    """dz of every tile, to (rows, columns) in 16 bits; with PARTS its low halves after all high ones."""
    n_row_tiles = tl.cdiv(N, BM)
    n_col_tiles = tl.cdiv(C, BN)
    for unit in tl.range(tl.program_id(0), n_units, PROGRAMS):
        row_tile, col_tile = tile_of(unit, n_row_tiles, n_col_tiles, GROUP)
        row0 = row_tile * BM
        col0 = col_tile * BN
        acc = product_tile(hidden, weight, row0, col0, N, C, K, hidden_stride, weight_stride, BM, BN, BK, TMA, PARTS)
        rows = row0 + tl.arange(0, BM)
        live = rows < N
        row_scale = tl.load(row_scale_ptr + rows, mask=live, other=0.0) if PARTS else 1.0
        z, core = base2_logits(
            acc, row_scale, col_scale_ptr, bias_ptr, col0, C, factor, squeeze, BN, PARTS, HAS_BIAS, SOFTCAP
        )
        lse = tl.load(lse_ptr + rows, mask=live, other=0.0)
        weight_of_p = tl.load(constant_ptr + rows, mask=live, other=0.0)[:, None]
        logp = z - lse[:, None]
        if HAS_ENTROPY:
            weight_of_p += tl.load(slope_ptr + rows, mask=live, other=0.0)[:, None] * logp
        d = -tl.exp2(logp) * weight_of_p
        if SOFTCAP:
            d *= 1.0 - core * core
        target = tl.load(target_ptr + rows, mask=live, other=-1)
        here = (target >= col0) & (target < col0 + BN)
        if tl.max(here.to(tl.int32), 0) > 0:
            column = (target - col0).to(tl.int32)
            at_target = tl.load(dz_target_ptr + rows, mask=live, other=0.0)
            d = tl.where(tl.arange(0, BN)[None, :] == column[:, None], at_target[:, None], d)
        _store_tile(dz, d, row0, col0, N, dz_stride, n_col_tiles * BN, BM, BN, TMA, PARTS)


@triton.jit
def _store_tile(
    dz,
    d,
    row0,
    col0,
    N,
    dz_stride,
    low_column,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
):
    """d in dz's 16 bits; with PARTS also what that rounding left, `low_column` columns further."""
    high = d.to(dz.dtype if TMA else dz.dtype.element_ty)
    if TMA:
        dz.store([row0, col0], high)
    else:
        rows = row0 + tl.arange(0, BM)[:, None]
        at = dz + rows.to(tl.int64) * dz_stride + col0 + tl.arange(0, BN)[None, :]
        tl.store(at, high, mask=rows < N)
    if PARTS:
        low = (d - high.to(tl.float32)).to(high.dtype)
        if TMA:
            dz.store([row0, low_column + col0], low)
        else:
            tl.store(at + low_column, low, mask=rows < N)
