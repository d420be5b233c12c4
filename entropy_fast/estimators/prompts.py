"""Grouping by prompt: sums, leave-one-out baselines and the two standard errors.

Sequences of one prompt share its difficulty, so the prompt, not the sequence, is the unit that was sampled.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_fast.collective import ALONE, Collective


class StandardErrors(NamedTuple):
    """Standard errors of one estimate; NaN where the data cannot tell."""

    random_prompts: float
    """Over new prompts and new sequences; NaN with fewer than two prompts."""
    fixed_prompts: float
    """Over new sequences of the same prompts; NaN when no prompt has two sequences."""


class Prompts:
    """Which sequences belong to which prompt, on all ranks.

    Args:
        index: [n] int64, any ids. With more than one rank: ids 0..P−1 with one meaning everywhere; a prompt may be
            split over ranks.
        collective: the ranks.

    Sums run over sequences sorted by prompt, in a fixed order, so they are the same bits on every run.
    """

    def __init__(self, index: Tensor, collective: Collective = ALONE):
        self._collective = collective
        if collective is ALONE:
            index = torch.unique(index, return_inverse=True)[1]
        local = index.max() + 1 if index.numel() else index.new_tensor(0)
        self._n_groups = int(collective.max(local))
        self._index = index
        self._order = index.argsort(stable=True)
        self._sizes = torch.bincount(index, minlength=self._n_groups)
        self.counts = collective.sum(self._sizes.to(torch.float64))
        """[P] float64: sequences per prompt on all ranks."""
        self.n_sequences = int(self.counts.sum())
        self.n_prompts = int((self.counts > 0).sum())

    def sum(self, x: Tensor) -> Tensor:
        """[n, ...] float64 → [P, ...]: the sum over each prompt's sequences on all ranks."""
        local = torch.segment_reduce(x[self._order], "sum", lengths=self._sizes, axis=0, unsafe=True, initial=0.0)
        return self._collective.sum(local)

    def mean(self, x: Tensor) -> Tensor:
        """[n, ...] → [...]: the mean over all sequences on all ranks."""
        return self.sum(x).sum(dim=0) / self.n_sequences

    def leave_one_out(self, x: Tensor) -> Tensor:
        """[n] → [n]: the mean of x over the *other* sequences of the same prompt.

        A prompt with a single sequence takes the mean over all other sequences, which does not look at it either.
        """
        sums = self.sum(x)
        others = self.counts[self._index] - 1
        within = (sums[self._index] - x) / others.clamp(min=1)
        overall = (sums.sum() - x) / max(self.n_sequences - 1, 1)
        return torch.where(others > 0, within, overall)

    def standard_errors(self, influence: Tensor) -> StandardErrors:
        """Of an estimate with the influence values ψ [n], which sum to zero over all ranks.

        Random prompts: V = P/(P−1) · Σ_c (Σ_{j∈c} ψ_j)² / n². Fixed: V = Σ_c G/(G−1) · Σ_j (ψ_j − ψ̄_c)² / n².
        A prompt with one sequence says nothing about its own spread and takes the mean of the others'.
        """
        sums = self.sum(torch.stack((influence, influence.square()), dim=1))
        present = self.counts > 0
        total, squares, size = sums[present, 0], sums[present, 1], self.counts[present]
        n, p = self.n_sequences, self.n_prompts
        random = math.sqrt(float(p / (p - 1) * total.square().sum())) / n if p > 1 else math.nan
        several = size > 1
        if not bool(several.any()):
            return StandardErrors(random, math.nan)
        within = (squares - total.square() / size).clamp(min=0)
        variance = within[several] / (size[several] - 1)  # of one sequence, given its prompt
        fixed = (size[several] * variance).sum() + size[~several].sum() * variance.mean()
        return StandardErrors(random, math.sqrt(float(fixed)) / n)
