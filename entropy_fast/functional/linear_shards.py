"""A head whose vocabulary is split over several weights: statistics of each part, combined, and each part's gradients.

    parts = [shard_stats(hidden, w, targets, start=s) for w, s in shards]
    stats = combine_shards(parts)                        # an all-gather of four numbers a row, over ranks
    for w, s in shards:
        shard_gradients(hidden, w, targets, start=s, stats=stats, grad_logprob=g)   # dHidden adds up over the shards

`stats.logprob` and `stats.entropy` are those of the whole vocabulary; the log-sum-exp is `stats.peak + stats.log_sum`.
"""

from __future__ import annotations

import torch

from entropy_fast.functional.linear_operators import ieee_products, implementation
from entropy_fast.functional.operators import outside_autocast
from entropy_fast.reference.linear import Gradients, LinearStats, combine_shards
from entropy_fast.reference.rows import RowGradients
from entropy_fast.reference.transform import Transform

__all__ = ["Gradients", "LinearStats", "combine_shards", "shard_gradients", "shard_stats"]


@outside_autocast
def shard_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    start: int,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    precision: str = "exact",
) -> LinearStats:
    """Statistics of the softmax over one part of the vocabulary, nats, (rows,) each; logprob NaN without the target.

    Args:
        hidden: (rows, width).
        weight: (part, width), the rows `start`, `start + 1`, ... of the whole head; its bias, (part,), likewise.
        targets: (rows,), token ids of the whole vocabulary.
        start: the first token of this part.
        temperature: see `linear_token_stats`, as scale, softcap and precision.
    """
    transform = Transform(temperature, scale, softcap)
    with torch.no_grad(), ieee_products(hidden):
        module = implementation(hidden, precision)
        stats, _ = module.linear_stats(
            hidden, weight, targets - start, bias, transform, shard=True, precision=precision
        )
    return stats


@outside_autocast
def shard_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    start: int,
    stats: LinearStats,
    grad_logprob: torch.Tensor | None = None,
    grad_entropy: torch.Tensor | None = None,
    needs: tuple[bool, bool, bool] = (True, True, True),
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    precision: str = "exact",
) -> Gradients:
    """This part's share of dHidden, and the gradients of its weight and bias, from the combined statistics.

    Args:
        stats: `combine_shards` of all parts.
        grad_logprob: (rows,), the incoming gradient of the log-prob; None for none.
        grad_entropy: (rows,), of the entropy, likewise.
        needs: which of (hidden, weight, bias) to compute.
        hidden: and the other arguments as in `shard_stats`.
    """
    needs = (needs[0], needs[1], needs[2] and bias is not None)
    with torch.no_grad(), ieee_products(hidden):
        return implementation(hidden, precision).linear_backward(
            hidden,
            weight,
            targets - start,
            bias,
            Transform(temperature, scale, softcap),
            stats,
            RowGradients(grad_logprob, grad_entropy, None),
            needs,
            precision=precision,
        )
