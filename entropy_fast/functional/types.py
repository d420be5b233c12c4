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
