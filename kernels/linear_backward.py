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

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

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

# Vocabulary columns of dz that exist at a time, twice as many where room for them costs nothing: enough for the GEMMs
# to run at full rate, and 8 × 132 tiles of 128 × 256 for 8192 rows, so that no multiprocessor of an H100 idles in a
# last, partial wave.
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


class _Rows(NamedTuple):
    """Hidden states with what dz needs of each row; targets count from the slab's first column."""

    hidden: torch.Tensor
    operand: Operand
    targets: torch.Tensor
    coefficients: RowCoefficients


class _Slab(NamedTuple):
    """Columns of the vocabulary, the rows whose dz is computed there (None for none), and room for that dz, flat.

    The rows are those that every slab takes, and then, if there are such, those at `scattered` among the others.
    """

    columns: slice
    rows: _Rows | None
    scattered: torch.Tensor | None
    room: torch.Tensor


def _dz_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.bfloat16 if hidden.dtype == torch.float32 else hidden.dtype


def _pitch(columns: int, hidden: torch.Tensor) -> int:
    """Entries from one row of dz to the next."""
    return columns * (2 if hidden.dtype == torch.float32 else 1) + PITCH


def _room(rows: int, columns: int, hidden: torch.Tensor) -> torch.Tensor:
    """For one slab of dz."""
    return torch.empty(rows * _pitch(columns, hidden), dtype=_dz_dtype(hidden), device=hidden.device)


def _slabs(rows: _Rows, vocab: int, tiling: Tiling, d_weight: torch.Tensor | None) -> Iterator[_Slab]:
    """All rows, slab by slab.

    dz of a slab lies in the rows of dWeight that follow the slab's own, as long as it fits there; the last slabs get a
    room of their own, a smaller one. What is lent costs nothing, so slabs are twice as wide while that fits: each slab
    reads and writes all of the float32 dHidden.
    """
    total = len(rows.targets)
    columns = slab_columns(total, vocab, tiling)
    start = 0
    if d_weight is not None and _may_lend(d_weight, total, columns, rows.hidden):
        for lent_columns in (2 * columns, columns):
            while (room := _lent(d_weight, start + lent_columns, total, lent_columns, rows.hidden)) is not None:
                yield _Slab(slice(start, start + lent_columns), _from_column(start, rows), None, room)
                start += lent_columns
    if start:
        columns = ceil_div(columns // 2, tiling.BN) * tiling.BN
    room = _room(total, columns, rows.hidden)
    for first in range(start, vocab, columns):
        yield _Slab(slice(first, min(first + columns, vocab)), _from_column(first, rows), None, room)


def _may_lend(d_weight: torch.Tensor, rows: int, columns: int, hidden: torch.Tensor) -> bool:
    """Whether dz fits into dWeight's dtype, and often enough that smaller slabs at the end are few."""
    return d_weight.dtype == _dz_dtype(hidden) and 4 * rows * _pitch(columns, hidden) <= d_weight.numel()


def _lent(d_weight: torch.Tensor, row: int, rows: int, columns: int, hidden: torch.Tensor) -> torch.Tensor | None:
    """Room for a slab of dz in dWeight from `row` on, None where it does not fit."""
    first, entries = row * d_weight.shape[1], rows * _pitch(columns, hidden)
    return d_weight.view(-1)[first : first + entries] if first + entries <= d_weight.numel() else None


def _from_column(start: int, rows: _Rows) -> _Rows:
    return rows._replace(targets=rows.targets - start)


class _Selection(NamedTuple):
    """Which rows each slab takes, with the rows put in an order of places: those that more slabs take come first.

    Attributes:
        order: (rows,), the row at each place.
        index: (slabs, pitch), the rows that a slab takes, in that order; what follows them means nothing.
        scattered: (slabs, pitch), and their places behind the lead, ascending; negative in the lead.
        targets: (slabs, pitch), the rows' targets, counted from the slab's first column.
        coefficients: (slabs, pitch) each.
        counts: how many rows each slab takes.
        lead: the rows at so many first places are taken by every slab.
    """

    order: torch.Tensor
    index: torch.Tensor
    scattered: torch.Tensor
    targets: torch.Tensor
    coefficients: RowCoefficients
    counts: list[int]
    lead: int

    @classmethod
    def of(cls, kept: torch.Tensor, targets: torch.Tensor, coefficients: RowCoefficients, columns: int) -> _Selection:
        """From (slabs, rows) bool, for slabs of so many columns.

        Waits for the device once, when all of this is under way, and nothing after it does: what a slab needs of its
        rows' numbers is a piece of a tensor, which costs the host next to nothing.
        """
        order = kept.sum(0).argsort(descending=True, stable=True)
        kept = kept.index_select(1, order)
        counts = torch.cat([kept.sum(1), kept.all(0).sum(0, keepdim=True)])
        # every slab's numbers start on 16 bytes, or the kernel would be compiled for each way of not doing so
        gone = pad(kept.logical_not(), (0, -kept.shape[1] % 4), value=True)
        places = gone.to(torch.uint8).argsort(dim=1, stable=True).clamp(max=kept.shape[1] - 1)
        index = order[places]
        first = torch.arange(len(kept), device=kept.device)[:, None] * columns
        of_rows = RowCoefficients(*(None if t is None else t[index] for t in coefficients))
        scattered, local_targets = places - counts[-1], targets[index] - first
        *of_slabs, lead = counts.tolist()
        return cls(order, index, scattered, local_targets, of_rows, of_slabs, lead)


def _filtered_slabs(hidden: torch.Tensor, vocab: int, columns: int, selection: _Selection) -> Iterator[_Slab]:
    """The rows that were selected, in their new order, in the slabs whose mass the forward has measured.

    The hidden states of the lead are gathered once, those of a slab's other rows behind them.
    """
    lead, most = selection.lead, max(selection.counts)
    room = _room(most, columns, hidden)
    x = hidden.new_empty(most, hidden.shape[1])
    torch.index_select(hidden, 0, selection.order[:lead], out=x[:lead])
    for slab, count in enumerate(selection.counts):
        rows = scattered = None
        if count > lead:
            torch.index_select(hidden, 0, selection.index[slab, lead:count], out=x[lead:count])
            scattered = selection.scattered[slab, lead:count]
        if count:
            here = x[:count]
            numbers = (None if t is None else t[slab, :count] for t in selection.coefficients)
            rows = _Rows(here, Operand.of(here), selection.targets[slab, :count], RowCoefficients(*numbers))
        start = slab * columns
        yield _Slab(slice(start, min(start + columns, vocab)), rows, scattered, room)


class _HiddenSum(NamedTuple):
    """dHidden, summed in float32 over the slabs.

    A slab adds one product to consecutive rows: those that every slab takes stay where they are, its others come
    behind them for as long.

    Attributes:
        near: the rows that every slab takes, and room for a slab's others.
        far: all others.
    """

    near: torch.Tensor
    far: torch.Tensor

    @classmethod
    def of(cls, hidden: torch.Tensor, selection: _Selection | None) -> _HiddenSum:
        total, width = hidden.shape
        near, lead = (total, total) if selection is None else (max(selection.counts), selection.lead)
        zeros = torch.zeros(near + total - lead, width, dtype=torch.float32, device=hidden.device)
        return cls(zeros[:near], zeros[near:])

    def add(self, products: list[tuple[torch.Tensor, torch.Tensor]], scattered: torch.Tensor | None) -> None:
        """The rows of a slab += Σ a @ b."""
        count = len(products[0][0])
        if scattered is None:
            _accumulate(self.near[:count], products)
            return
        guests = self.near[count - len(scattered) : count]
        torch.index_select(self.far, 0, scattered, out=guests)
        _accumulate(self.near[:count], products)
        self.far.index_copy_(0, scattered, guests)

    def finish(self, hidden: torch.Tensor, selection: _Selection | None, gain: torch.Tensor | None) -> torch.Tensor:
        """The sum / gain, in the order and dtype of the hidden states."""
        if gain is not None:
            self.near.div_(gain)
            self.far.div_(gain)
        if selection is None:
            return self.near.to(hidden.dtype)
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        lead = selection.lead
        for rows, part in ((selection.order[:lead], self.near[:lead]), (selection.order[lead:], self.far)):
            out.index_copy_(0, rows, part.to(hidden.dtype))
        return out


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
    coefficients = row_coefficients(stats, grads, transform, 1.0 if gain is None else gain)
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else None
    d_bias = torch.empty(vocab, dtype=torch.float32, device=device) if needs_bias else None
    columns = filter_columns(device)
    selection = None if kept is None else _Selection.of(kept, targets, coefficients, columns)
    hidden_sum = _HiddenSum.of(hidden, selection) if needs_hidden else None
    if selection is None:
        slabs = _slabs(_Rows(hidden, Operand.of(hidden), targets, coefficients), vocab, tiling, d_weight)
    else:
        slabs = _filtered_slabs(hidden, vocab, columns, selection)
    _run_slabs(slabs, weight, bias, transform, tiling, gain, hidden_sum, d_weight, d_bias)
    if d_bias is not None:
        d_bias = (d_bias if gain is None else d_bias.div_(gain)).to(weight.dtype if bias is None else bias.dtype)
    return Gradients(None if hidden_sum is None else hidden_sum.finish(hidden, selection, gain), d_weight, d_bias)


def _run_slabs(
    slabs: Iterable[_Slab],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transform: Transform,
    tiling: Tiling,
    gain: torch.Tensor | None,
    hidden_sum: _HiddenSum | None,
    d_weight: torch.Tensor | None,
    d_bias: torch.Tensor | None,
) -> None:
    """Add the slabs' shares to dHidden and write dWeight and the bias's gradient; `gain` stays in all but dWeight."""
    for columns, rows, scattered, room in slabs:
        if rows is None:
            for gradient in (d_weight, d_bias):
                if gradient is not None:
                    gradient[columns] = 0
            continue
        w = weight[columns]
        dz = _slab_dlogits(rows, w, None if bias is None else bias[columns], transform, room, tiling)
        if hidden_sum is not None:
            hidden_sum.add(_products(dz, _parts(w)), scattered)
        if d_weight is not None:
            _write_products(d_weight[columns], _products([t.t() for t in dz], _parts(rows.hidden)), gain)
        if d_bias is not None:
            _write_sums(d_bias[columns], dz)


def _slab_dlogits(
    part: _Rows,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transform: Transform,
    room: torch.Tensor,
    tiling: Tiling,
) -> list[torch.Tensor]:
    """dz of a slab, (rows, columns) in the room given for it; high and low halves for float32 operands."""
    rows, columns = len(part.targets), weight.shape[0]
    n_col_tiles = ceil_div(columns, tiling.BN)
    padded = n_col_tiles * tiling.BN
    pitch = _pitch(padded, part.hidden)
    dz = Operand(room[: rows * pitch].view(rows, pitch), pitch, None)
    x, w = part.operand, Operand.of(weight)
    n_units = ceil_div(rows, tiling.BM) * n_col_tiles
    programs = program_count(room.device)
    scalars = (transform.factor, transform.squeeze or 1.0)
    softcap, has_entropy = transform.softcap is not None, part.coefficients.slope is not None
    if tiling.specialized and x.tma and w.tma:
        from entropy_fast.kernels.linear_hopper import tiles_kernel

        launch(
            tiles_kernel,
            programs,
            (part.targets, x.scale, w.scale, bias, *part.coefficients),
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
            part.targets,
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
    # a piece at a time: a slab whose dz lies in memory that is there anyway may be wide, but this sum needs its own
    for first in range(0, len(out), SLAB_COLUMNS):
        rows = slice(first, first + SLAB_COLUMNS)
        part = out[rows]
        total = part if out.dtype == torch.float32 else torch.empty_like(part, dtype=torch.float32)
        _accumulate(total, [(a[rows], b) for a, b in products], fresh=True)
        if gain is not None:
            total.div_(gain)
        if total is not part:
            part.copy_(total)


def _write_sums(out: torch.Tensor, dz: list[torch.Tensor]) -> None:
    """out = dz's sums over the rows, in float32."""
    high, *low = dz
    torch.sum(high, 0, dtype=torch.float32, out=out)
    for t in low:
        out += t.sum(0, dtype=torch.float32)
