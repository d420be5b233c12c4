"""Gradients of the token statistics to hidden states, head and bias, one slab of the vocabulary at a time.

A GEMM makes the gradient dz of the slab's logits (`linear_dlogits`); two library GEMMs then add dz W to dHidden (in
float32, because rounding every slab's product would bias training) and write dzᵀ x to the slab's rows of dWeight. Three
GEMMs in all, two with a frozen head. The workspace is the float32 sum of dHidden and one slab of dz (`linear_slabs`).

For float32 operands dz, x and W are taken as bf16 pairs high + low and three products of halves are summed in float32:
errors of 1e-5 relative. dz of fp16 operands is multiplied by a power of two, undone at the end, so that small
probabilities do not vanish.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch

from entropy_fast.kernels.launch import ceil_div, launch
from entropy_fast.kernels.linear_dlogits import dlogits_kernel, row_coefficients
from entropy_fast.kernels.linear_filtered import Counts, Selection, filtered_slabs
from entropy_fast.kernels.linear_operands import (
    Operand,
    Tiling,
    filter_columns,
    hopper_variant,
    plain_options,
    program_count,
    tiling_for,
)
from entropy_fast.kernels.linear_saved import saved_dlogits
from entropy_fast.kernels.linear_slabs import (
    SLAB_COLUMNS,
    Rows,
    Slab,
    all_slabs,
    dz_pitch,
    saved_in,
)
from entropy_fast.reference.linear import Gradients, LinearStats
from entropy_fast.reference.rows import RowGradients
from entropy_fast.reference.transform import Transform


class _HiddenSum:
    """dHidden, summed in float32 over the slabs.

    A slab adds one product to consecutive rows: those that every slab takes stay where they are, its others come
    behind them for as long.
    """

    def __init__(self, hidden: torch.Tensor, selection: Selection | None) -> None:
        self._hidden = hidden
        self._selection = selection

    @cached_property
    def _zeros(self) -> torch.Tensor:
        # not before the first slab's dz is under way: the device has waited long enough for the selection
        total, width = self._hidden.shape
        lead = total if self._selection is None else self._selection.counts.lead
        return torch.zeros(self._near + total - lead, width, dtype=torch.float32, device=self._hidden.device)

    @property
    def _near(self) -> int:
        return len(self._hidden) if self._selection is None else self._selection.counts.most

    @cached_property
    def near(self) -> torch.Tensor:
        """The rows that every slab takes, and room for a slab's others."""
        return self._zeros[: self._near]

    @cached_property
    def far(self) -> torch.Tensor:
        """All others."""
        return self._zeros[self._near :]

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

    def finish(self, gain: torch.Tensor | None) -> torch.Tensor:
        """The sum / gain, in the order and dtype of the hidden states."""
        hidden, selection = self._hidden, self._selection
        if gain is not None:
            self.near.div_(gain)
            self.far.div_(gain)
        if selection is None:
            return self.near.to(hidden.dtype)
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        lead = selection.counts.lead
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
    memory: torch.Tensor | None = None,
) -> Gradients:
    """Gradients to hidden states, head and bias; what `needs` leaves out costs nothing. Shapes as in `linear_stats`.

    `kept`, (slabs, rows) bool, says which rows' dz to compute in each slab of `filter_columns` tokens; elsewhere it is
    taken for 0. Finding the rows waits for the device. `memory` is what the forward filled; it is used up, or
    becomes dWeight.
    """
    needs_hidden, needs_weight, needs_bias = needs
    total, vocab = hidden.shape[0], weight.shape[0]
    device = hidden.device
    tiling = tiling_for(total, device, precision if hidden.dtype == torch.float32 else "fast")
    # before all else, so that the device still has the rest of this to do when they arrive
    counts = None if kept is None else Counts(kept)
    gain = _gain(stats, grads) if hidden.dtype == torch.float16 else None
    coefficients = row_coefficients(stats, grads, transform, gain)
    saved = None if memory is None else saved_in(memory, vocab, total, tiling)
    d_weight = None
    if needs_weight:
        own = memory is None or memory.ndim == 1
        d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if own else memory
    d_bias = torch.empty(vocab, dtype=torch.float32, device=device) if needs_bias else None
    columns = filter_columns(device)
    selection = None if counts is None else Selection.of(kept, counts, targets, coefficients, columns)
    hidden_sum = _HiddenSum(hidden, selection) if needs_hidden else None
    if selection is None:
        slabs = all_slabs(Rows(hidden, Operand.of(hidden), targets, coefficients), vocab, tiling, d_weight, saved)
    else:
        slabs = filtered_slabs(hidden, vocab, columns, selection)
    _run_slabs(slabs, weight, bias, transform, tiling, gain, hidden_sum, d_weight, d_bias)
    if d_bias is not None:
        d_bias = (d_bias if gain is None else d_bias.div_(gain)).to(weight.dtype if bias is None else bias.dtype)
    return Gradients(None if hidden_sum is None else hidden_sum.finish(gain), d_weight, d_bias)


def _run_slabs(
    slabs: Iterable[Slab],
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
    for columns, rows, scattered, room, saved in slabs:
        if rows is None:
            for gradient in (d_weight, d_bias):
                if gradient is not None:
                    gradient[columns] = 0
            continue
        w = weight[columns]
        if saved is None:
            dz = _slab_dlogits(rows, w, None if bias is None else bias[columns], transform, room, tiling)
        else:
            dz = [saved_dlogits(*saved, rows.targets, rows.coefficients, transform, w.dtype, len(w))]
        if hidden_sum is not None:
            hidden_sum.add(_products(dz, _parts(w)), scattered)
        if d_weight is not None:
            _write_products(d_weight[columns], _products([t.t() for t in dz], _parts(rows.hidden)), gain)
        if d_bias is not None:
            _write_sums(d_bias[columns], dz)


def _slab_dlogits(
    part: Rows,
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
    pitch = dz_pitch(padded, part.hidden)
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
            (part.targets, None, None, x.scale, w.scale, bias, *part.coefficients),
            (rows, columns, x.width, n_units, 0, 0, 0),
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
