"""Device functions that the fused-linear kernels share: the order of tiles, a tile of products, its logits.

A tile is (BM rows of hidden states) × (BN rows of the head). Its products x Wᵀ live in float32 registers, and nothing
of the size of a tile of logits is written in the forward.

Operands come through TMA descriptors where the GPU has them and the strides allow it, else through pointers; `TMA`
says which of the two `hidden` and `weight` are. With `PARTS`, each row holds a float32 row split in two fp16 halves,
[low | high], each `K` long: three products along one accumulation, the small ones first, so that they are not rounded
against a large sum: low·high + high·low + high·high.
"""

import triton
import triton.language as tl

from entropy_fast.kernels.device import LOG2E, LOWEST
from entropy_fast.kernels.tanh import tanh


@triton.jit
def tile_of(unit, n_row_tiles, n_col_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a unit of work: GROUP row tiles share each column tile while it is in the L2 cache."""
    per_group = GROUP * n_col_tiles
    first = (unit // per_group) * GROUP
    rows_in_group = min(n_row_tiles - first, GROUP)
    return first + (unit % per_group) % rows_in_group, (unit % per_group) // rows_in_group


@triton.jit
def _load(source, row0, k0, rows, K, stride, BLOCK: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        tile = source.load([row0, k0])
    else:
        r = row0 + tl.arange(0, BLOCK)
        k = k0 + tl.arange(0, BK)
        pointers = source + r[:, None].to(tl.int64) * stride + k[None, :]
        tile = tl.load(pointers, mask=(r[:, None] < rows) & (k[None, :] < K), other=0.0)
    return tile


@triton.jit
def product_tile(
    hidden,
    weight,
    row0,
    col0,
    N,
    C,
    K,
    hidden_stride,
    weight_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
):
    """hidden[row0 : row0 + BM] @ weight[col0 : col0 + BN].T in float32; rows past N and columns past C give 0."""
    acc = tl.zeros([BM, BN], tl.float32)
    if PARTS:
        # K is a multiple of BK here: the split pads it
        for k in tl.range(0, 3 * K, BK):
            k_hidden = tl.where(k < 2 * K, k, k - K)
            k_weight = tl.where(k < K, k + K, k - K)
            a = _load(hidden, row0, k_hidden, N, 2 * K, hidden_stride, BM, BK, TMA)
            b = _load(weight, col0, k_weight, C, 2 * K, weight_stride, BN, BK, TMA)
            acc = tl.dot(a, b.T, acc)
    else:
        for k in tl.range(0, K, BK):
            a = _load(hidden, row0, k, N, K, hidden_stride, BM, BK, TMA)
            b = _load(weight, col0, k, C, K, weight_stride, BN, BK, TMA)
            acc = tl.dot(a, b.T, acc)
    return acc


@triton.jit
def base2_logits(
    acc,
    row_scale,
    col_scale_ptr,
    bias_ptr,
    col0,
    C,
    factor,
    squeeze,
    BN: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Logits of the softmax in base 2, columns past C at LOWEST; and tanh(squeeze · raw) where there is a softcap.

    With PARTS, `row_scale` and `col_scale_ptr` undo the powers of two that the split multiplied each row by.
    """
    cols = col0 + tl.arange(0, BN)
    if PARTS:
        col_scale = tl.load(col_scale_ptr + cols, mask=cols < C, other=0.0)
        acc = acc * row_scale[:, None] * col_scale[None, :]
    if HAS_BIAS:
        b = tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        if not SOFTCAP:
            b = tl.maximum(b, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        acc += b[None, :]
    core = acc
    if SOFTCAP:
        core = tanh(acc * squeeze)
    z = core * (factor * LOG2E)
    if col0 + BN > C:
        z = tl.where((tl.arange(0, BN) < C - col0)[None, :], z, LOWEST)
    return z, core
