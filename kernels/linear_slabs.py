"""How the backward goes through the vocabulary: slabs of columns, and room for the dz of each.

Every slab takes every row (but see `linear_filtered`), and its dz lies where the forward has left exponentials, or in
rows of dWeight that are still to come, as long as it fits there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from entropy_fast.kernels.launch import ceil_div
from entropy_fast.kernels.linear_dlogits import RowCoefficients
from entropy_fast.kernels.linear_operands import Operand, Tiling, tiling_for

# Vocabulary columns of dz that exist at a time, or multiples where room for them costs nothing: enough for the GEMMs to
# run at full rate, and 8 × 132 tiles of 128 × 256 for 8192 rows, so that no multiprocessor of an H100 idles in a last,
# partial wave.
SLAB_COLUMNS = 8448
# Rows of dz don't start a power of two apart, where they would crowd the same channels of memory.
PITCH = 64
# With few rows the slab may be wider: this many entries of dz.
SLAB_ENTRIES = 8192 * SLAB_COLUMNS
# A slab more costs about as much as to compute so many entries: launches, and a pass over all of dHidden.
SLAB_COST = SLAB_ENTRIES // 8


def slab_columns(rows: int, vocab: int, tiling: Tiling) -> int:
    """Width of a slab of dz, a multiple of the tile's."""
    columns = max(SLAB_COLUMNS, SLAB_ENTRIES // max(rows, 1) // SLAB_COLUMNS * SLAB_COLUMNS)
    return min(ceil_div(columns, tiling.BN), ceil_div(vocab, tiling.BN)) * tiling.BN


class Rows(NamedTuple):
    """Hidden states with what dz needs of each row; targets count from the slab's first column."""

    hidden: torch.Tensor
    operand: Operand
    targets: torch.Tensor
    coefficients: RowCoefficients


class Slab(NamedTuple):
    """Columns of the vocabulary, the rows whose dz is computed there (None for none), and room for that dz, flat.

    The rows are those that every slab takes, and then, if there are such, those at `scattered` among the others. Where
    the forward has saved the slab, `saved` has exponentials (rows, pitch) and peaks (tiles, rows); dz replaces them.
    """

    columns: slice
    rows: Rows | None
    scattered: torch.Tensor | None
    room: torch.Tensor
    saved: tuple[torch.Tensor, torch.Tensor] | None = None


def _dz_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.bfloat16 if hidden.dtype == torch.float32 else hidden.dtype


def dz_pitch(columns: int, hidden: torch.Tensor) -> int:
    """Entries from one row of dz to the next."""
    return columns * (2 if hidden.dtype == torch.float32 else 1) + PITCH


def room_for(rows: int, columns: int, hidden: torch.Tensor) -> torch.Tensor:
    """Memory for one slab of dz, flat, with nothing in it."""
    return torch.empty(rows * dz_pitch(columns, hidden), dtype=_dz_dtype(hidden), device=hidden.device)


class Saved(NamedTuple):
    """Room for exponentials, as views of some memory: dWeight's, or memory to spare.

    Attributes:
        exponentials: (slabs, rows, pitch), fp16; of a row, the first `columns` entries are used.
        peaks: (slabs × tiles of a slab, rows), float32: m, in base 2.
        columns: tokens of a slab.
        spare: the one slab's memory, flat, which is there for dz of other slabs when its own is done with.
    """

    exponentials: torch.Tensor
    peaks: torch.Tensor
    columns: int
    spare: torch.Tensor | None = None

    @property
    def tiles(self) -> int:
        """How many tiles of the vocabulary are saved."""
        return self.peaks.shape[0]

    @property
    def rows(self) -> int:
        """Rows of whole tiles: at least as many as the hidden states have."""
        return self.peaks.shape[1]

    @property
    def flat(self) -> torch.Tensor:
        """The exponentials as one matrix, slab below slab."""
        return self.exponentials.flatten(0, 1)


def _entries(columns: int, rows: int, tiling: Tiling) -> tuple[int, int]:
    """16-bit entries of a slab's exponentials, and of its peaks."""
    return rows * (columns + PITCH), 2 * columns // tiling.BN * rows


def spare_memory(most_bytes: int, hidden: torch.Tensor, vocab: int) -> torch.Tensor:
    """Flat memory for exponentials of all rows: so many bytes, or as many as the vocabulary has use for."""
    tiling = tiling_for(len(hidden), hidden.device)
    rows, whole = ceil_div(hidden.shape[0], tiling.BM) * tiling.BM, vocab // tiling.BN * tiling.BN
    return hidden.new_empty(min(most_bytes // 2, sum(_entries(whole, rows, tiling))))


def saved_in(memory: torch.Tensor, vocab: int, rows: int, tiling: Tiling) -> Saved | None:
    """Where exponentials of so many rows lie in 16-bit memory; None where none fit.

    Flat memory is to spare: one slab as wide as fits. Memory of (vocab, width) will be dWeight. There slabs lie at the
    end, their peaks behind them, and are used up in order: dWeight's own rows of a slab, written when its dz is there,
    must end before that dz and all that is still to be used. Both the first slab (whose followers all remain) and the
    last (most rows written) have to fit.
    """
    padded = ceil_div(rows, tiling.BM) * tiling.BM
    # whole 16 bytes
    end = memory.numel() // 8 * 8
    width = 0 if memory.ndim == 1 else memory.shape[1]
    # the widest slab, with the rows of dWeight that come before it
    columns = int((end - padded * PITCH) / (padded * (1 + 2 / tiling.BN) + width))
    columns, slabs = min(vocab, columns) // tiling.BN * tiling.BN, 1
    if columns <= 0:
        return None
    cost = SLAB_COST // padded
    if memory.ndim > 1 and vocab - columns > cost:

        def count(columns: int) -> int:
            own, (slab, peaks) = columns * width, _entries(columns, padded, tiling)
            return min((end - own) // (slab + peaks), (end - slab) // (own + peaks), vocab // columns)

        # narrower ones hold more in all
        whole = range(SLAB_COLUMNS, columns, SLAB_COLUMNS)
        widths = [columns, *whole, *(w - tiling.BN for w in whole)]
        columns = max(widths, key=lambda w: (w - cost) * count(w))
        slabs = count(columns)
    slab, peaks = _entries(columns, padded, tiling)
    flat, first_peak = memory.view(-1), end - slabs * peaks
    exponentials = flat[first_peak - slabs * slab : first_peak]
    return Saved(
        exponentials.view(torch.float16).view(slabs, padded, -1),
        flat[first_peak:end].view(torch.float32).view(-1, padded),
        columns,
        exponentials if memory.ndim == 1 else None,
    )


def all_slabs(
    rows: Rows, vocab: int, tiling: Tiling, d_weight: torch.Tensor | None, saved: Saved | None = None
) -> Iterator[Slab]:
    """All rows, slab by slab; first those that are `saved`, in dWeight's memory or elsewhere.

    Memory to spare then serves the others. Without it, dz of another slab lies in the rows of dWeight that follow the
    slab's own, as long as half a slab fits there; the last slabs get a room of their own, of about half a slab. What is
    lent costs nothing, so each slab is as wide as fits: it reads and writes all of the float32 dHidden.
    """
    total = len(rows.targets)
    columns = slab_columns(total, vocab, tiling)
    start = 0
    if saved is not None:
        tiles = saved.columns // tiling.BN
        for exponentials, peaks in zip(saved.exponentials, saved.peaks.split(tiles), strict=True):
            here = slice(start, start + saved.columns)
            yield Slab(here, _from_column(start, rows), None, exponentials, (exponentials, peaks))
            start += saved.columns
    room = None
    if saved is not None and saved.spare is not None:
        columns, room = saved.columns, saved.spare.view(_dz_dtype(rows.hidden))
    elif d_weight is not None and _may_lend(d_weight, total, columns, rows.hidden):
        own, half = start, ceil_div(columns // 2, tiling.BN) * tiling.BN
        for slab in _lent_slabs(rows, vocab, start, columns, half, tiling.BN, d_weight):
            yield slab
            start = slab.columns.stop
        if start > own:
            # all alike, and a quarter wider rather than one more
            count = ceil_div(vocab - start, 5 * half // 4)
            columns = ceil_div(vocab - start, count * tiling.BN) * tiling.BN
    room = room_for(total, columns, rows.hidden) if room is None else room
    for first in range(start, vocab, columns):
        yield Slab(slice(first, min(first + columns, vocab)), _from_column(first, rows), None, room)


def _may_lend(d_weight: torch.Tensor, rows: int, columns: int, hidden: torch.Tensor) -> bool:
    """Whether dz fits into dWeight's dtype, and often enough that smaller slabs at the end are few."""
    return d_weight.dtype == _dz_dtype(hidden) and 4 * rows * dz_pitch(columns, hidden) <= d_weight.numel()


def _lent_slabs(
    rows: Rows, vocab: int, start: int, columns: int, half: int, tile: int, d_weight: torch.Tensor
) -> Iterator[Slab]:
    """Slabs from token `start` on whose dz fits into dWeight behind the slab's own rows, each as wide as that allows.

    They are multiples of `columns`, and after these down to `half` of them, in whole tiles.
    """
    total, width = len(rows.targets), d_weight.shape[1]
    least = columns
    while (widest := ((vocab - start) * width - total * PITCH) // (total + width)) >= least:
        stop = start + (widest // columns * columns or widest // tile * tile)
        first = stop * width
        room = d_weight.view(-1)[first : first + total * dz_pitch(stop - start, rows.hidden)]
        yield Slab(slice(start, stop), _from_column(start, rows), None, room)
        start, least = stop, half


def _from_column(start: int, rows: Rows) -> Rows:
    return rows._replace(targets=rows.targets - start) if start else rows
