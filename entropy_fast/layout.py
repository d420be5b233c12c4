"""From padded rollouts to a plan of microbatches without waste: which sequences are computed together, and how.

Whatever padding the rollouts came with (left, right, a gap between prompt and completion), a sequence is first made
dense: its attended tokens, in order, from position 0 on. A plan then groups sequences within a budget of tokens, in
one of two ways:

- padded: right-padded rows of similar length. In a causal model, padding on the right cannot reach a real token, so
  a score does not depend on it, and positions count from 0 as the model expects.
- packed: one row without padding, in which every prompt stands once for all its completions (see `packing`).

The plan is made once and used for both policies, so that both are rounded alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entropy_fast.rollouts import Rollouts, TokenMasks

# A packed microbatch repeats a prompt's keys and values for each of its completions while one layer's attention runs.
# At most this many keys for each token of the budget, so that long prompts with many completions cannot run away.
_KEYS_PER_TOKEN = 8


@dataclass(frozen=True)
class DenseRollouts:
    """Rollouts with their padding squeezed out, on the CPU, where plans are made.

    Attributes:
        tokens: (N, W) int64, right-padded with 0.
        columns: (N, W) int64, the column of the rollouts that a dense position came from.
        generated: (N, W) bool, the dense positions that are to be scored.
        input_lengths: (N,) int64, how many tokens the model must read: up to the one before the last scored token;
            0 for a sequence with nothing to score.
        prompt_lengths: (N,) int64, how many of the tokens are the prompt's.
    """

    tokens: Tensor
    columns: Tensor
    generated: Tensor
    input_lengths: Tensor
    prompt_lengths: Tensor

    @classmethod
    def pack(cls, rollouts: Rollouts, masks: TokenMasks) -> DenseRollouts:
        """Squeeze out the padding; `masks.generated` says what is to be scored."""
        attended = rollouts.attention_mask.cpu()
        columns = torch.argsort((~attended).to(torch.int8), dim=1, stable=True)
        kept = attended.gather(1, columns)
        generated = masks.generated.cpu().gather(1, columns) & kept
        position = torch.arange(columns.shape[1])
        prompt_lengths = (attended & (position < rollouts.prompt_lens.cpu()[:, None])).sum(1)
        input_lengths = torch.where(generated, position, 0).amax(1)
        width = int(input_lengths.max()) + 1
        tokens = torch.where(kept, rollouts.tokens.cpu().gather(1, columns), 0)
        return cls(tokens[:, :width], columns[:, :width], generated[:, :width], input_lengths, prompt_lengths)

    def shortened(self, sequences: Sequence[int], lengths: Sequence[int]) -> DenseRollouts:
        """Some of the sequences, each cut to a number of input tokens."""
        index, cut = torch.tensor(sequences), torch.tensor(lengths)
        inside = torch.arange(self.tokens.shape[1]) <= cut[:, None]
        return replace(
            self,
            tokens=self.tokens[index],
            columns=self.columns[index],
            generated=self.generated[index] & inside,
            input_lengths=cut,
            prompt_lengths=self.prompt_lengths[index].minimum(cut),
        )

    def families(self, sequences: Iterable[int]) -> list[list[int]]:
        """Those of `sequences` that have something to score, grouped by equal prompt, in order of appearance."""
        found: dict[bytes, list[int]] = {}
        for i in sequences:
            if self.input_lengths[i] > 0:
                prompt = self.tokens[i, : int(self.prompt_lengths[i])].numpy().tobytes()
                found.setdefault(prompt, []).append(i)
        return list(found.values())


@dataclass(frozen=True)
class Layout:
    """Which sequences are computed together, in which order; reuse it so that two policies are rounded alike.

    Attributes:
        microbatches: tuples of sequence indices. Sequences without a scored token are in none.
        packed: each microbatch is one row without padding, its prompts shared; else right-padded rows.
        fused: the model's elementwise layers run fused (see `fusion`).
    """

    microbatches: tuple[tuple[int, ...], ...]
    packed: bool = False
    fused: bool = False

    @classmethod
    def by_tokens(cls, input_lengths: Tensor, token_budget: int, max_sequences: int | None = None) -> Layout:
        """Padded: group sequences of similar length, longest first, at most `token_budget` padded tokens a microbatch.

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

    @classmethod
    def by_prompt(cls, dense: DenseRollouts, token_budget: int, max_sequences: int | None = None) -> Layout:
        """Packed: completions of a prompt together, at most `token_budget` tokens a microbatch, in even shares.

        Args:
            dense: what is scored.
            token_budget: a sequence longer than this still gets a microbatch, alone.
            max_sequences: a further limit on a microbatch, None for no limit.
        """
        families = dense.families(range(len(dense.tokens)))
        total = sum(_unique_tokens(dense, family) for family in families)
        # even shares: a remainder of a few tokens would cost a whole pass over the weights
        share = total / max(1, -(-total // token_budget))
        groups: list[list[int]] = []
        tokens = keys = 0
        for family in families:
            shared = int(dense.prompt_lengths[family[0]])
            starts_here = True
            for i in family:
                length = int(dense.input_lengths[i])
                added = length if starts_here else length - shared
                full = (
                    not groups
                    or tokens >= share
                    or tokens + added > token_budget
                    or keys + length > _KEYS_PER_TOKEN * token_budget
                    or (max_sequences is not None and len(groups[-1]) >= max_sequences)
                )
                if full:
                    groups.append([])
                    tokens, keys, added = 0, 0, length
                groups[-1].append(i)
                tokens, keys, starts_here = tokens + added, keys + length, False
        return cls(tuple(map(tuple, groups)), packed=True)

    def tokens(self, dense: DenseRollouts, group: Sequence[int]) -> int:
        """How many tokens one forward pass over these sequences reads, padding included."""
        if self.packed:
            return sum(_unique_tokens(dense, family) for family in dense.families(group))
        return len(group) * int(dense.input_lengths[list(group)].max())


def _unique_tokens(dense: DenseRollouts, family: Sequence[int]) -> int:
    shared = int(dense.prompt_lengths[family[0]])
    return shared + sum(int(dense.input_lengths[i]) - shared for i in family)
