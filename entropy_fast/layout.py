"""From padded rollouts to microbatches without waste: padding squeezed out, sequences sorted by length.

Whatever padding the rollouts came with (left, right, a gap between prompt and completion), a sequence is first made
dense: its attended tokens, in order, from position 0 on. Microbatches are right-padded groups of sequences of similar
length, each within a budget of padded tokens. In a causal model, padding on the right cannot reach a real token, so
a score does not depend on it, and positions count from 0 as the model expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_fast.rollouts import Rollouts, TokenMasks


@dataclass(frozen=True)
class DenseRollouts:
    """Rollouts with their padding squeezed out.

    Attributes:
        tokens: (N, W) int64, right-padded with 0.
        columns: (N, W) int64, the column of the rollouts that a dense position came from.
        generated: (N, W) bool, the dense positions that are to be scored.
        input_lengths: (N,) int64 on the CPU, how many tokens the model must read: up to the one before the last
            scored token; 0 for a sequence with nothing to score.
    """

    tokens: Tensor
    columns: Tensor
    generated: Tensor
    input_lengths: Tensor

    @classmethod
    def pack(cls, rollouts: Rollouts, masks: TokenMasks) -> DenseRollouts:
        """Squeeze out the padding; `masks.generated` says what is to be scored."""
        attended = rollouts.attention_mask
        columns = torch.argsort((~attended).to(torch.int8), dim=1, stable=True)
        kept = attended.gather(1, columns)
        generated = masks.generated.gather(1, columns) & kept
        position = torch.arange(columns.shape[1], device=columns.device)
        input_lengths = torch.where(generated, position, 0).amax(1).cpu()
        width = int(input_lengths.max()) + 1
        tokens = torch.where(kept, rollouts.tokens.gather(1, columns), 0)
        return cls(tokens[:, :width], columns[:, :width], generated[:, :width], input_lengths)


@dataclass(frozen=True)
class Layout:
    """Which sequences are computed together, in which order; reuse it so that two policies are rounded alike.

    Attributes:
        microbatches: tuples of sequence indices. Sequences without a scored token are in none.
    """

    microbatches: tuple[tuple[int, ...], ...]

    @classmethod
    def by_tokens(cls, input_lengths: Tensor, token_budget: int, max_sequences: int | None = None) -> Layout:
        """Group sequences of similar length, longest first, at most `token_budget` padded tokens a microbatch.

        Args:
            input_lengths: (N,) int64, see `DenseRollouts`.
            token_budget: a sequence longer than this still gets a microbatch, alone.
            max_sequences: a further limit on a microbatch, None for no limit.
        """
        order = torch.argsort(input_lengths, descending=True, stable=True).tolist()
        lengths = input_lengths.tolist()
        groups: list[list[int]] = []
        for i in order:
            if lengths[i] == 0:
                break
            if groups:
                group = groups[-1]
                fits = (len(group) + 1) * lengths[group[0]] <= token_budget
                if fits and (max_sequences is None or len(group) < max_sequences):
                    group.append(i)
                    continue
            groups.append([i])
        return cls(tuple(map(tuple, groups)))


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass reads and which of its positions are scored.

    Attributes:
        sequences: (b,) int64, indices into the rollouts.
        input_ids: (b, w) int64, right-padded.
        lengths: (b,) int64, the tokens of each row that are real.
        active: (b, w) bool: position p is scored, its logits predict `targets` at p.
        targets: (b, w) int64, the next token.
        columns: (b, w) int64, the column of the rollouts that the target came from.
    """

    sequences: Tensor
    input_ids: Tensor
    lengths: Tensor
    active: Tensor
    targets: Tensor
    columns: Tensor

    def halves(self) -> tuple[Microbatch, Microbatch]:
        """Two microbatches of half as many sequences, each as narrow as its longest."""
        middle = len(self.sequences) // 2
        return self._rows(slice(None, middle)), self._rows(slice(middle, None))

    def _rows(self, rows: slice) -> Microbatch:
        width = int(self.lengths[rows].max())
        narrow = (x[rows, :width] for x in (self.input_ids, self.active, self.targets, self.columns))
        input_ids, active, targets, columns = narrow
        return Microbatch(self.sequences[rows], input_ids, self.lengths[rows], active, targets, columns)


def microbatches(dense: DenseRollouts, layout: Layout, device: torch.device) -> Iterator[Microbatch]:
    """The layout's microbatches, moved to `device` one by one."""
    for group in layout.microbatches:
        index = torch.tensor(group)
        lengths = dense.input_lengths[index]
        width = int(lengths.max())
        rows = index.to(dense.tokens.device)
        tokens = dense.tokens[rows, : width + 1].to(device)
        columns = dense.columns[rows, 1 : width + 1].to(device)
        generated = dense.generated[rows, 1 : width + 1].to(device)
        lengths = lengths.to(device)
        # what lies beyond a sequence's own inputs is padding, also where a longer neighbour goes on
        real = torch.arange(width, device=device) < lengths[:, None]
        yield Microbatch(
            sequences=index.to(device),
            input_ids=torch.where(real, tokens[:, :-1], 0),
            lengths=lengths,
            active=generated & real,
            targets=tokens[:, 1:],
            columns=columns,
        )
