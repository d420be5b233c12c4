"""Which tokens of a rollout were generated, which count, and where the first EOS stands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def generated_columns(attention_mask: Tensor, prompt_lens: Tensor) -> Tensor:
    """(N, T) bool: columns from the prompt's end on that the attention mask keeps.

    Args:
        attention_mask: (N, T) bool.
        prompt_lens: (N,) integer, the column at which generation starts.
    """
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return attention_mask & (columns[None, :] >= prompt_lens[:, None])


@dataclass(frozen=True)
class Counting:
    """Which generated tokens count.

    Attributes:
        eos_token_ids: the ids that end a sequence; several models have more than one.
        include_eos: True counts the EOS as any other token. False takes the first EOS after the prompt out of the
            integrand and the length; it stays in the importance weight, for a weight without it belongs to no policy.
        stop_at_eos: False trusts the attention mask (safe for several turns). True drops what follows the first EOS.
    """

    eos_token_ids: tuple[int, ...] = ()
    include_eos: bool = True
    stop_at_eos: bool = False


@dataclass(frozen=True)
class TokenMasks:
    """What `token_masks` found.

    Attributes:
        generated: (N, T) bool, every emitted token; importance weights sum over these.
        counted: (N, T) bool, a subset; S, R and L sum over these.
        lengths: (N,) int32, the number of counted tokens.
        eos_column: (N,) int64, the column of the first generated EOS, or −1.
        runs_past_eos: (N,) bool, generated tokens follow the first EOS.
    """

    generated: Tensor
    counted: Tensor
    lengths: Tensor
    eos_column: Tensor
    runs_past_eos: Tensor

    @property
    def truncated(self) -> Tensor:
        """(N,) bool: something was generated and no EOS among it."""
        return (self.eos_column < 0) & self.generated.any(1)

    @property
    def empty(self) -> Tensor:
        """(N,) bool: no token counts."""
        return self.lengths == 0


def token_masks(tokens: Tensor, generated: Tensor, counting: Counting) -> TokenMasks:
    """Find the first EOS of each sequence and apply the counting rules.

    Args:
        tokens: (N, T) int64.
        generated: (N, T) bool, see `Rollouts.generated`.
        counting: the rules.
    """
    t = tokens.shape[1]
    columns = torch.arange(t, device=tokens.device)
    eos_ids = torch.tensor(counting.eos_token_ids, dtype=tokens.dtype, device=tokens.device)
    is_eos = torch.isin(tokens, eos_ids) & generated
    first = torch.where(is_eos, columns, t).amin(1) if t else tokens.new_zeros(len(tokens))
    after = columns[None, :] > first[:, None]
    runs_past = (generated & after).any(1)
    if counting.stop_at_eos:
        generated = generated & ~after
    counted = generated
    if not counting.include_eos:
        counted = generated & (columns[None, :] != first[:, None])
    return TokenMasks(
        generated=generated,
        counted=counted,
        lengths=counted.sum(1, dtype=torch.int32),
        eos_column=torch.where(first < t, first, -1),
        runs_past_eos=runs_past,
    )
