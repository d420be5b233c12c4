"""x Wᵀ + b in float32 on tensor cores, faster than float32's own units, with bits that depend on the row alone.

float32 numbers are cut into three bfloat16 pieces, 8 bits each, which lose nothing of numbers above 1e-33; a product of
two pieces is exact in float32. Weights that are bfloat16 already are one piece. Tensor cores cut off what they add to a
large sum, so they sum STEP products alone, the smallest pieces first; the sums of the steps are added in float32. One
tiling for any number of rows: a library picks its kernel by the shape, and a row's bits with it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from entropy_fast.kernels.launch import Variant, ceil_div, launch

# Pieces that hold a float32.
_PIECES = 3
_SPLIT_BLOCK = 1024
# The width has to be a multiple of this, so that every row of the pieces starts on 16 bytes.
WIDTH_STEP = 8


@triton.jit(do_not_specialize=["steps"])
def split_kernel(out_ptr, x_ptr, steps, STEP: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    """float32 into pieces of 16 bits, the largest first, each STEP · steps numbers after the one before."""
    entries = steps.to(tl.int64) * STEP
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(x_ptr + at, mask=at < entries, other=0.0)
    for i in tl.static_range(PIECES):
        piece = rest.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + i * entries + at, piece, mask=at < entries)
        rest -= piece.to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def gemm_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT_WEIGHT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of BM × BN; tiles of GROUP tile rows are neighbours in time, so that they share the weight's."""
    tile_rows = tl.cdiv(rows, BM)
    tile_columns: tl.constexpr = (COLUMNS + BN - 1) // BN
    program = tl.program_id(0)
    group_start = program // (GROUP * tile_columns) * GROUP
    group_rows = tl.minimum(tile_rows - group_start, GROUP)
    row = (group_start + program % (GROUP * tile_columns) % group_rows) * BM + tl.arange(0, BM)
    column = program % (GROUP * tile_columns) // group_rows * BN + tl.arange(0, BN)
    k = tl.arange(0, STEP)
    # rows past the end repeat the last, columns likewise: nothing but the store needs their mask
    x_row = tl.minimum(row, rows - 1).to(tl.int64) * WIDTH
    w_row = tl.minimum(column, COLUMNS - 1).to(tl.int64) * WIDTH
    x_piece = rows.to(tl.int64) * WIDTH
    total = tl.zeros([BM, BN], tl.float32)
    for start in range(0, WIDTH, STEP):
        x_at = x_ptr + x_row[:, None] + (start + k)[None, :]
        w_at = weight_ptr + w_row[None, :] + (start + k)[:, None]
        x_inside = (start + k < WIDTH)[None, :]
        w_inside = (start + k < WIDTH)[:, None]
        x0 = tl.load(x_at, x_inside, other=0.0)
        x1 = tl.load(x_at + x_piece, x_inside, other=0.0)
        x2 = tl.load(x_at + 2 * x_piece, x_inside, other=0.0)
        w0 = tl.load(w_at, w_inside, other=0.0)
        # products of pieces i and j are 2^(−8 (i + j)) of the largest: those past 2 are below float32
        part = tl.dot(x2, w0)
        if SPLIT_WEIGHT:
            w1 = tl.load(w_at + COLUMNS * WIDTH, w_inside, other=0.0)
            w2 = tl.load(w_at + 2 * COLUMNS * WIDTH, w_inside, other=0.0)
            part = tl.dot(x0, w2, part)
            part = tl.dot(x1, w1, part)
            part = tl.dot(x0, w1, part)
        part = tl.dot(x1, w0, part)
        total += tl.dot(x0, w0, part)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(out_ptr + at, total, mask=(row < rows)[:, None] & (column < COLUMNS)[None, :])


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, piece: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """x Wᵀ + b, as exact as float32's own sums; (..., columns) float32.

    Args:
        x: (..., width) float32, contiguous; width a multiple of `WIDTH_STEP`.
        weight: (columns, width), of the pieces' dtype or float32, contiguous.
        bias: (columns,) of any float dtype, or None.
        piece: what float32 is cut into; float16 holds more bits of fewer numbers.
    """
    columns, width = weight.shape
    out = x.new_empty(*x.shape[:-1], columns)
    rows = x.numel() // width
    whole = weight.dtype == piece
    variant = _variant(width, columns, not whole)
    tiles = ceil_div(rows, variant.constants["BM"]) * ceil_div(columns, variant.constants["BN"])
    w = weight if whole else split(weight, piece)
    launch(gemm_kernel, tiles, (out, split(x, piece), w, bias), (rows,), (), variant)
    return out


def split(x: torch.Tensor, piece: torch.dtype) -> torch.Tensor:
    """float32, a multiple of `WIDTH_STEP` entries, as (pieces, *shape) of a 16-bit dtype, which add up to it."""
    out = torch.empty(_PIECES, *x.shape, dtype=piece, device=x.device)
    variant = _split_variant()
    launch(split_kernel, ceil_div(x.numel(), _SPLIT_BLOCK), (out, x), (x.numel() // WIDTH_STEP,), (), variant)
    return out


@cache
def _split_variant() -> Variant:
    return Variant({"STEP": WIDTH_STEP, "PIECES": _PIECES, "BLOCK": _SPLIT_BLOCK}, num_warps=4)


@cache
def _variant(width: int, columns: int, split_weight: bool) -> Variant:
    constants = {"WIDTH": width, "COLUMNS": columns, "SPLIT_WEIGHT": split_weight}
    # within 2% of the fastest of eight tilings on an H100, and little enough shared memory for any card
    tile = {"BM": 64, "BN": 128, "STEP": 32, "GROUP": 8}
    return Variant(constants | tile, num_warps=4, num_stages=2 if split_weight else 3)
