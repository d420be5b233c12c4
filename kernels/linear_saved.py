"""dz from exponentials that the forward has left: an element-wise pass in place of a GEMM.

From forward to backward dWeight's memory has nothing to hold. Given it, the forward stores e = 2^(z − m) of the first
tokens of the vocabulary there (`linear_slabs.saved_in`), in fp16, with the maximum m of each tile's rows. dz of these
tokens is then written over e, and slab by slab the gradient's own rows take the place.

fp16 holds e, which is at most 1, to 2^−12 relative or 2^−25 absolute: less than the rounding of dz to 16 bits.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from entropy_fast.kernels.device import LOG2E
from entropy_fast.kernels.launch import Variant, ceil_div, launch
from entropy_fast.kernels.linear_dlogits import RowCoefficients
from entropy_fast.reference.transform import Transform

# Rows and warps of a program of the element-wise pass.
BLOCK_ROWS = 16
WARPS = 8


@triton.jit(do_not_specialize=["N", "tiles", "pitch", "peaks_stride"])
def saved_dlogits_kernel(
    dz_ptr,
    exponentials_ptr,
    peaks_ptr,
    target_ptr,
    lse_ptr,
    constant_ptr,
    slope_ptr,
    dz_target_ptr,
    N,
    tiles,
    pitch,
    peaks_stride,
    uncap,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """dz of one tile's columns and ROWS rows, over their exponentials."""
    tile = tl.program_id(0) % tiles
    rows = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    live = rows < N
    col0 = tile * BN
    # a multiple of 8 already; said in a way that the compiler understands, so that it emits wide loads
    pitch = pitch // 8 * 8
    at = rows[:, None].to(tl.int64) * pitch + col0 + tl.arange(0, BN)[None, :]
    e = tl.load(exponentials_ptr + at, mask=live[:, None], other=0.0).to(tl.float32)
    peak = tl.load(peaks_ptr + tile.to(tl.int64) * peaks_stride + rows, mask=live, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=live, other=0.0)
    weight_of_p = tl.load(constant_ptr + rows, mask=live, other=0.0)[:, None]
    z = tl.log2(e) + peak[:, None]
    if slope_ptr is not None:
        weight_of_p += tl.load(slope_ptr + rows, mask=live, other=0.0)[:, None] * (z - lse[:, None])
    d = -e * tl.exp2(peak - lse)[:, None] * weight_of_p
    if SOFTCAP:
        core = z * uncap
        d *= 1.0 - core * core
    # below fp16's least number; not NaN, which stays
    d = tl.where(e == 0.0, 0.0, d)
    target = tl.load(target_ptr + rows, mask=live, other=-1)
    here = (target >= col0) & (target < col0 + BN)
    if tl.max(here.to(tl.int32), 0) > 0:
        at_target = tl.load(dz_target_ptr + rows, mask=live, other=0.0)
        column = (target - col0).to(tl.int32)
        d = tl.where(tl.arange(0, BN)[None, :] == column[:, None], at_target[:, None], d)
    tl.store(dz_ptr + at, d.to(dz_ptr.dtype.element_ty), mask=live[:, None])


def saved_dlogits(
    exponentials: torch.Tensor,
    peaks: torch.Tensor,
    targets: torch.Tensor,
    coefficients: RowCoefficients,
    transform: Transform,
    dtype: torch.dtype,
    columns: int,
) -> torch.Tensor:
    """dz (rows, columns) of a slab, in `dtype`, in place of its exponentials.

    Args:
        exponentials: (at least rows, pitch), fp16, of one slab.
        peaks: (tiles, at least rows), of that slab.
        targets: (rows,), counted from the slab's first token.
        coefficients: (rows,) each.
        transform: as in the forward.
        dtype: 16 bits wide.
        columns: tokens of the slab.
    """
    rows, tiles = len(targets), len(peaks)
    dz = exponentials.view(dtype)
    softcap = transform.softcap is not None
    launch(
        saved_dlogits_kernel,
        tiles * ceil_div(rows, BLOCK_ROWS),
        (dz, exponentials, peaks, targets, *coefficients),
        (rows, tiles, exponentials.stride(0), peaks.stride(0)),
        (1.0 / (transform.factor * LOG2E.value),),
        _variant(columns // tiles, softcap),
    )
    return dz[:rows, :columns]


@cache
def _variant(columns: int, softcap: bool) -> Variant:
    return Variant({"ROWS": BLOCK_ROWS, "BN": columns, "SOFTCAP": softcap}, num_warps=WARPS)
