"""How the ranks of a distributed run agree: three reductions, and nothing else.

The statistics are written against `Collective`. `ALONE` is one process; `ProcessGroup` wraps torch.distributed.
Every reduction is over float64 tensors of a few kilobytes, so none of them is worth overlapping.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Collective(Protocol):
    """What the statistics need from a group of ranks; all ranks call the same methods in the same order."""

    def max(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum over the ranks; the same shape on each."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over the ranks; the same shape on each."""
        ...

    def gather(self, vector: Tensor) -> tuple[list[Tensor], int]:
        """The vectors of all ranks, in rank order (lengths may differ), and the caller's place among them."""
        ...


class Alone:
    """One process: every reduction is the identity."""

    def max(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def gather(self, vector: Tensor) -> tuple[list[Tensor], int]:
        """The vector alone, in place 0."""
        return [vector], 0


ALONE = Alone()


class ProcessGroup:
    """The reductions over a torch.distributed process group (the default group when none is given)."""

    def __init__(self, group: torch.distributed.ProcessGroup | None = None):
        self._group = group

    def max(self, tensor: Tensor) -> Tensor:
        """All-reduce MAX; the input is left as it was."""
        return self._reduce(tensor, torch.distributed.ReduceOp.MAX)

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce SUM; the input is left as it was."""
        return self._reduce(tensor, torch.distributed.ReduceOp.SUM)

    def gather(self, vector: Tensor) -> tuple[list[Tensor], int]:
        """All-gather of vectors of any lengths: the lengths travel first, then the padded vectors."""
        world = torch.distributed.get_world_size(self._group)
        length = torch.tensor([vector.numel()], device=vector.device)
        lengths = [torch.empty_like(length) for _ in range(world)]
        torch.distributed.all_gather(lengths, length, group=self._group)
        sizes = [int(size) for size in lengths]
        padded = vector.new_zeros(max(sizes))
        padded[: vector.numel()] = vector
        parts = [torch.empty_like(padded) for _ in range(world)]
        torch.distributed.all_gather(parts, padded, group=self._group)
        return [part[:size] for part, size in zip(parts, sizes, strict=True)], torch.distributed.get_rank(self._group)

    def _reduce(self, tensor: Tensor, operation: torch.distributed.ReduceOp.RedOpType) -> Tensor:
        result = tensor.clone()
        torch.distributed.all_reduce(result, op=operation, group=self._group)
        return result
