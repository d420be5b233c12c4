"""The slabs of a filtered backward: which rows each takes, as the forward has said, and their hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from entropy_fast.kernels.linear_dlogits import RowCoefficients
from entropy_fast.kernels.linear_operands import Operand
from entropy_fast.kernels.linear_slabs import Rows, Slab, room_for


class Counts:
    """How many rows each slab takes, and how many are taken by all, the lead: on their way to the host.

    Args:
        kept: (slabs, rows), bool.
    """

    def __init__(self, kept: torch.Tensor) -> None:
        tensor = torch.cat([kept.sum(1), kept.all(0).sum(0, keepdim=True)])
        self.lead_on_device = tensor[-1]
        self._here = tensor
        self._arrived = None
        if tensor.is_cuda:
            self._here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._here.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    @cached_property
    def _numbers(self) -> list[int]:
        # waits for the device
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._here.tolist()

    @property
    def of_slabs(self) -> list[int]:
        """How many rows each slab takes."""
        return self._numbers[:-1]

    @property
    def lead(self) -> int:
        """How many rows all slabs take."""
        return self._numbers[-1]

    @property
    def most(self) -> int:
        """The largest number of rows that a slab takes."""
        return max(self.of_slabs)


class Selection(NamedTuple):
    """Which rows each slab takes, with the rows put in an order of places: those that more slabs take come first.

    Attributes:
        order: (rows,), the row at each place.
        index: (slabs, pitch), the rows that a slab takes, in that order; what follows them means nothing.
        scattered: (slabs, pitch), and their places behind the lead, ascending; negative in the lead.
        targets: (slabs, pitch), the rows' targets, counted from the slab's first column.
        coefficients: (slabs, pitch) each.
        counts: how many of these each slab takes; every slab takes those at the first places, the lead.
    """

    order: torch.Tensor
    index: torch.Tensor
    scattered: torch.Tensor
    targets: torch.Tensor
    coefficients: RowCoefficients
    counts: Counts

    @classmethod
    def of(
        cls,
        kept: torch.Tensor,
        counts: Counts,
        targets: torch.Tensor,
        coefficients: RowCoefficients,
        columns: int,
    ) -> Selection:
        """From (slabs, rows) bool and their counts, for slabs of so many columns.

        What a slab needs of its rows' numbers is a piece of a tensor, which costs the host next to nothing.
        """
        order = kept.sum(0).argsort(descending=True, stable=True)
        kept = kept.index_select(1, order)
        # every slab's numbers start on 16 bytes, or the kernel would be compiled for each way of not doing so
        gone = pad(kept.logical_not(), (0, -kept.shape[1] % 4), value=True)
        places = gone.to(torch.uint8).argsort(dim=1, stable=True).clamp(max=kept.shape[1] - 1)
        index = order[places]
        first = torch.arange(len(kept), device=kept.device)[:, None] * columns
        of_rows = RowCoefficients(*(None if t is None else t[index] for t in coefficients))
        scattered, local_targets = places - counts.lead_on_device, targets[index] - first
        return cls(order, index, scattered, local_targets, of_rows, counts)


def filtered_slabs(hidden: torch.Tensor, vocab: int, columns: int, selection: Selection) -> Iterator[Slab]:
    """The rows that were selected, in their new order, in the slabs whose mass the forward has measured.

    The hidden states of the lead are gathered once, those of a slab's other rows behind them.
    """
    # all that the first slab may take: it keeps the device busy until the counts are here
    x = hidden.index_select(0, selection.index[0])
    lead = selection.counts.lead
    room = room_for(selection.counts.most, columns, hidden)
    for slab, count in enumerate(selection.counts.of_slabs):
        rows = scattered = None
        if count > lead:
            scattered = selection.scattered[slab, lead:count]
            if slab > 0:
                torch.index_select(hidden, 0, selection.index[slab, lead:count], out=x[lead:count])
        if count:
            here = x[:count]
            numbers = (None if t is None else t[slab, :count] for t in selection.coefficients)
            rows = Rows(here, Operand.of(here), selection.targets[slab, :count], RowCoefficients(*numbers))
        start = slab * columns
        yield Slab(slice(start, min(start + columns, vocab)), rows, scattered, room)
