"""Gradients of the token statistics to hidden states, head and bias, one slab of the vocabulary at a time.

A GEMM recomputes the slab's logits tile by tile and turns them, in registers, into their gradient

    dz = g (1[y] − p) − gH p (log p + H) + gL p,

which is stored once, in 16 bits; two library GEMMs then add dz W to dHidden (in float32, because rounding every slab's
product would bias training) and write dzᵀ x to the slab's rows of dWeight. Three GEMMs in all, two with a frozen head.
The workspace is the float32 sum of dHidden and one slab of dz, which most of the time lies in rows of dWeight that are
still to come.

For float32 operands dz, x and W are taken as bf16 pairs high + low and three products of halves are summed in float32:
errors of 1e-5 relative. dz of fp16 operands is multiplied by a power of two, undone at the end, so that small
probabilities do not vanish.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from entropy_fast.kernels.launch import ceil_div, launch
from entropy_fast.kernels.linear_operands import (
    Operand,
    Tiling,
    filter_columns,
    hopper_variant,
    plain_options,
    program_count,
    tiling_for,
)
from entropy_fast.kernels.linear_tiles import LN2, LOG2E, base2_logits, product_tile, tile_of
from entropy_fast.reference.linear import Gradients, LinearStats
from entropy_fast.reference.rows import RowGradients
from entropy_fast.reference.transform import Transform

# Vocabulary columns of dz that exist at a time: enough for the GEMMs to run at full rate, and 8 × 132 tiles of
# 128 × 256 for 8192 rows, so that no multiprocessor of an H100 idles in a last, partial wave.
SLAB_COLUMNS = 8448
# Rows of dz don't start a power of two apart, where they would crowd the same channels of memory.
PITCH = 64
# With few rows the slab may be wider: this many entries of dz.
SLAB_ENTRIES = 8192 * SLAB_COLUMNS


class RowCoefficients(NamedTuple):
    """dz = −p (constant + slope · log2 p), and `target` in the target's column; (rows,) float32 each."""

    lse: torch.Tensor
    constant: torch.Tensor
    slope: torch.Tensor | None
    target: torch.Tensor


def row_coefficients(
    stats: LinearStats, grads: RowGradients, transform: Transform, gain: torch.Tensor | float = 1.0
) -> RowCoefficients:
    """What dz needs of each row; `lse` in base 2. `gain` multiplies dz.

    The target's entry uses 1 − p = −expm1(log p), which keeps its digits where p → 1.
    """
    outer = transform.factor * (transform.squeeze or 1.0) * gain
    zero = torch.zeros((), device=stats.logprob.device)
    g = zero if grads.logprob is None else grads.logprob.float()
    g_lse = zero if grads.lse is None else grads.lse.float()
    logp = stats.logprob.clamp(min=-1e4)
    p = logp.exp()
    constant = g - g_lse
    target = g_lse * p - g * logp.expm1()
    slope = None
    if grads.entropy is not None:
        g_entropy = grads.entropy.float()
        constant = constant + g_entropy * stats.entropy
        target = target - g_entropy * p * (logp + stats.entropy)
        slope = g_entropy * (LN2.value * outer)
    lse = (stats.peak + stats.log_sum) * LOG2E.value
    # a row without its target has no gradient to give
    constant = torch.where(stats.logprob.isnan(), float("nan"), constant)
    return RowCoefficients(lse, (constant * outer).expand_as(lse).contiguous(), slope, target * outer)


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
        target = tl.load(target_ptr + rows, mask=live, other=-1)
        here = (target >= col0) & (target < col0 + BN)
        if tl.max(here.to(tl.int32), 0) > 0:
            column = (target - col0).to(tl.int32)
            at_target = tl.load(dz_target_ptr + rows, mask=live, other=0.0)
            d = tl.where(tl.arange(0, BN)[None, :] == column[:, None], at_target[:, None], d)
        if SOFTCAP:
            d *= 1.0 - core * core
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


def slab_columns(rows: int, vocab: int, tiling: Tiling) -> int:
    """Width of a slab of dz, a multiple of the tile's."""
    columns = max(SLAB_COLUMNS, SLAB_ENTRIES // max(rows, 1) // SLAB_COLUMNS * SLAB_COLUMNS)
    return min(ceil_div(columns, tiling.BN), ceil_div(vocab, tiling.BN)) * tiling.BN


def _slabs(
    rows: _Rows, vocab: int, tiling: Tiling, d_weight: torch.Tensor | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slabs of the vocabulary, each with room for its dz.

    Until the last slabs are reached, that room is where their rows of dWeight will be; they get a smaller one.
    """
    columns = slab_columns(len(rows.targets), vocab, tiling)
    entries = rows.entries(columns)
    borrowed = 0
    if d_weight is not None and d_weight.dtype == rows.dtype and 4 * entries <= d_weight.numel():
        borrowed = (vocab - ceil_div(entries, d_weight.shape[1])) // columns * columns
    if borrowed:
        workspace = d_weight.view(-1)[borrowed * d_weight.shape[1] :][:entries]
        for start in range(0, borrowed, columns):
            yield slice(start, start + columns), workspace
        columns = ceil_div(columns // 2, tiling.BN) * tiling.BN
    workspace = rows.workspace(columns)
    for start in range(borrowed, vocab, columns):
        yield slice(start, min(start + columns, vocab)), workspace


def _filtered_slabs(rows: _Rows, vocab: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """The slabs whose mass the forward has measured."""
    columns = filter_columns(rows.hidden.device)
    workspace = rows.workspace(columns)
    for start in range(0, vocab, columns):
        yield slice(start, min(start + columns, vocab)), workspace


def linear_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: Transform,
    stats: LinearStats,
    grads: RowGradients,
    needs: tuple[bool, bool, bool],
    kept: torch.Tensor | None = None,
    precision: str = "fast",
) -> Gradients:
    """Gradients to hidden states, head and bias; what `needs` leaves out costs nothing. Shapes as in `linear_stats`.

    `kept`, (slabs, rows) bool, says which rows' dz to compute in each slab of `filter_columns` tokens; elsewhere it is
    taken for 0. Finding the rows waits for the device.
    """
    needs_hidden, needs_weight, needs_bias = needs
    total, vocab = hidden.shape[0], weight.shape[0]
    device = hidden.device
    tiling = tiling_for(total, device, precision if hidden.dtype == torch.float32 else "fast")
    gain = _gain(stats, grads) if hidden.dtype == torch.float16 else None
    rows = _Rows.of(hidden, targets, row_coefficients(stats, grads, transform, 1.0 if gain is None else gain))
    d_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=device) if needs_hidden else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else None
    d_bias = torch.empty(vocab, dtype=torch.float32, device=device) if needs_bias else None
    slabs = _slabs(rows, vocab, tiling, d_weight) if kept is None else _filtered_slabs(rows, vocab)
    for (slab, workspace), (index, part) in zip(slabs, _rows_of_slabs(rows, kept), strict=False):
        if part is None:
            for gradient in (d_weight, d_bias):
                if gradient is not None:
                    gradient[slab] = 0
            continue
        dz = _slab_dlogits(
            part, weight[slab], slab.start, None if bias is None else bias[slab], transform, workspace, tiling
        )
        if d_hidden is not None:
            _add_rows(d_hidden, index, _products(dz, _parts(weight[slab])))
        if d_weight is not None:
            _write_products(d_weight[slab], _products([t.t() for t in dz], _parts(part.hidden)), gain)
        if d_bias is not None:
            d_bias[slab] = sum(t.sum(0, dtype=torch.float32) for t in dz)
        del dz, workspace
    if gain is not None:
        d_hidden = None if d_hidden is None else d_hidden.div_(gain)
        d_bias = None if d_bias is None else d_bias.div_(gain)
    return Gradients(
        None if d_hidden is None else d_hidden.to(hidden.dtype),
        d_weight,
        None if d_bias is None else d_bias.to(weight.dtype if bias is None else bias.dtype),
    )


@dataclass(frozen=True)
class _Rows:
    """Hidden states with what dz needs of each row."""

    hidden: torch.Tensor
    operand: Operand
    targets: torch.Tensor
    coefficients: RowCoefficients

    @classmethod
    def of(cls, hidden: torch.Tensor, targets: torch.Tensor, coefficients: RowCoefficients) -> _Rows:
        return cls(hidden, Operand.of(hidden), targets, coefficients)

    @property
    def dtype(self) -> torch.dtype:
        """Of dz."""
        return torch.bfloat16 if self.operand.parts else self.hidden.dtype

    def entries(self, columns: int) -> int:
        """Of a slab of dz."""
        return len(self.targets) * self.pitch(columns)

    def workspace(self, columns: int) -> torch.Tensor:
        """Room for one slab of dz, flat."""
        return torch.empty(self.entries(columns), dtype=self.dtype, device=self.hidden.device)

    def pitch(self, columns: int) -> int:
        """Entries from one row of dz to the next."""
        return columns * (2 if self.operand.parts else 1) + PITCH


def _rows_of_slabs(rows: _Rows, kept: torch.Tensor | None) -> Iterator[tuple[torch.Tensor | None, _Rows | None]]:
    """The rows that each slab needs, and where they are among all; (None, all) for all, (index, None) for none."""
    if kept is None:
        yield from itertools.repeat((None, rows))
        return
    # whatever is small is gathered for all slabs at once: the host has to keep ahead of the device
    counts = kept.sum(1).tolist()
    index = kept.nonzero()[:, 1]
    numbers = [
        [None] * len(counts) if t is None else t.index_select(0, index).split(counts)
        for t in (rows.targets, *rows.coefficients)
    ]
    for slab, targets, *coefficients in zip(index.split(counts), *numbers, strict=True):
        if len(slab) == 0:
            yield slab, None
        else:
            yield slab, _Rows.of(rows.hidden.index_select(0, slab), targets, RowCoefficients(*coefficients))


def _add_rows(
    d_hidden: torch.Tensor, index: torch.Tensor | None, products: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """d_hidden, or its rows `index`, += Σ a @ b."""
    if index is None:
        _accumulate(d_hidden, products)
    else:
        share = torch.empty(len(index), d_hidden.shape[1], dtype=torch.float32, device=d_hidden.device)
        _accumulate(share, products, fresh=True)
        # no row comes twice, so the order of additions is fixed
        d_hidden.index_add_(0, index, share)


def _slab_dlogits(
    part: _Rows,
    weight: torch.Tensor,
    start: int,
    bias: torch.Tensor | None,
    transform: Transform,
    workspace: torch.Tensor,
    tiling: Tiling,
) -> list[torch.Tensor]:
    """dz of the slab at `start`, (rows, columns) in the workspace; high and low halves for float32 operands."""
    rows, columns = len(part.targets), weight.shape[0]
    n_col_tiles = ceil_div(columns, tiling.BN)
    padded = n_col_tiles * tiling.BN
    pitch = part.pitch(padded)
    dz = Operand(workspace[: rows * pitch].view(rows, pitch), pitch, None)
    x, w = part.operand, Operand.of(weight)
    n_units = ceil_div(rows, tiling.BM) * n_col_tiles
    programs = program_count(workspace.device)
    local_targets = part.targets - start
    scalars = (transform.factor, transform.squeeze or 1.0)
    softcap, has_entropy = transform.softcap is not None, part.coefficients.slope is not None
    if tiling.specialized and x.tma and w.tma:
        from entropy_fast.kernels.linear_hopper import tiles_kernel

        launch(
            tiles_kernel,
            programs,
            (local_targets, x.scale, w.scale, bias, *part.coefficients),
            (rows, columns, x.width, n_units),
            scalars,
            # a tile of dz takes the fourth buffer's place in shared memory
            hopper_variant(tiling, programs, 3, x.parts, bias is not None, softcap, has_entropy, True),
            descriptors=(
                x.gluon_source(tiling.BM, tiling.BK),
                w.gluon_source(tiling.BN, tiling.BK),
                dz.gluon_source(tiling.BM // 2, tiling.BN),
            ),
        )
    else:
        tma = tiling.tma and x.tma and w.tma
        dlogits_kernel[(programs,)](
            x.source(tiling.BM, tiling.BK, tma),
            w.source(tiling.BN, tiling.BK, tma),
            dz.source(tiling.BM, tiling.BN, tma),
            x.scale,
            w.scale,
            bias,
            local_targets,
            *part.coefficients,
            rows,
            columns,
            x.width,
            x.stride,
            w.stride,
            dz.stride,
            n_units,
            *scalars,
            **plain_options(tiling, programs, tma, x.parts, bias is not None, softcap),
            HAS_ENTROPY=has_entropy,
            # a tile of dz takes the third buffer's place in shared memory
            num_stages=2,
        )
    high = dz.data[:, :columns]
    return [high, dz.data[:, padded : padded + columns]] if x.parts else [high]


def _gain(stats: LinearStats, grads: RowGradients) -> torch.Tensor:
    """A power of two that brings the largest possible |dz| near 2^12, within fp16's range; a scalar on the device."""
    bound = torch.zeros((), device=stats.entropy.device)
    for gradient, most in ((grads.logprob, 1.0), (grads.lse, 1.0), (grads.entropy, stats.entropy + 1.0)):
        if gradient is not None:
            bound = bound + (gradient.float().abs() * most).amax()
    return torch.exp2(torch.floor(12.0 - torch.log2(bound)).clamp(-100.0, 100.0))


def _parts(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The matrix itself, or a float32 one as bf16 halves (high, low)."""
    if matrix.dtype != torch.float32:
        return (matrix,)
    high = matrix.to(torch.bfloat16)
    return high, (matrix - high).to(torch.bfloat16)


def _products(
    a: list[torch.Tensor] | tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The pairs whose products add up to a @ b, small ones first."""
    if len(a) == 1:
        return [(a[0], b[0])]
    return [(a[1], b[0]), (a[0], b[1]), (a[0], b[0])]


def _accumulate(out: torch.Tensor, products: list[tuple[torch.Tensor, torch.Tensor]], *, fresh: bool = False) -> None:
    """out += Σ a @ b in float32; a `fresh` out holds nothing yet."""
    for i, (a, b) in enumerate(products):
        first = fresh and i == 0
        if out.device.type == "cpu":
            out.addmm_(a.float(), b.float(), beta=0 if first else 1)
        elif first:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)


def _write_products(
    out: torch.Tensor, products: list[tuple[torch.Tensor, torch.Tensor]], gain: torch.Tensor | None
) -> None:
    """out = Σ a @ b / gain, summed in float32 and rounded once."""
    if gain is None and out.dtype == products[0][0].dtype and out.device.type != "cpu":
        torch.mm(*products[0], out=out)
        return
    total = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    _accumulate(total, products, fresh=True)
    if gain is not None:
        total.div_(gain)
    if total is not out:
        out.copy_(total)
