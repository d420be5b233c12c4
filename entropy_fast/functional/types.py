"""What the functions on tokens return."""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenStats(NamedTuple):
    """Statistics of each position, in nats, shaped like the targets; float32, or float64 for float64 inputs.

    Attributes:
        logprob: log-probability of the target.
        entropy: entropy of the full distribution.
        lse: log-sum-exp of the logits; None unless asked for.
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor | None = None


class SequenceStats(NamedTuple):
    """Statistics of N sequences of T columns; sums are float64, in a fixed order, nats.

    Attributes:
        S: (N,), the log-probs of the counted tokens, summed.
        R: (N,), the entropies at the counted tokens, summed.
        L: (N,) int32, the number of counted tokens.
        emitted_logprob: (N,), the log-probs of every emitted token, summed: what an importance weight is made of,
            whatever counts. Equal to S unless `include_eos=False` took an EOS out.
        eos_column: (N,) int64, the column of the first generated EOS, or −1 (the sequence is truncated).
        runs_past_eos: (N,) bool, generated tokens follow the first EOS.
        logprob: (N, T), of the token in each column, 0 where nothing was emitted.
        entropy: (N, T), of the distribution that the token in each column was drawn from, 0 likewise.
    """

    S: torch.Tensor
    R: torch.Tensor
    L: torch.Tensor
    emitted_logprob: torch.Tensor
    eos_column: torch.Tensor
    runs_past_eos: torch.Tensor
    logprob: torch.Tensor
    entropy: torch.Tensor
