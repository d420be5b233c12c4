"""How much of the sequence-level entropy, and of its change, is only length.

A sequence's −S is a sum over its tokens, so it grows with their number; an update that writes longer answers raises
the entropy per sequence even where no token became less certain. The per-token view divides that out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from entropy_fast.change import Change


@dataclass(frozen=True)
class LengthBias:
    """The two views of one run. Entropies in nats, lengths in counted tokens.

    Attributes:
        sequence_r2: share of the variance of −S that L explains, over the sequences, under the original policy.
        per_token_r2: the same for −S/L.
        nats_per_token: slope of −S on L, nats per token of length.
        length_original: E[L] under the original policy.
        length_updated: E[L] under the updated one.
        change: ΔH per sequence.
        length_part: h̄ · ΔE[L], what the change of length contributes, at the mean entropy per token h̄.
        per_token_part: Ē[L] · Δh, what the change per token contributes, at the mean length. The parts add up to
            `change` exactly, since H = h · E[L] under either policy.
    """

    sequence_r2: float
    per_token_r2: float
    nats_per_token: float
    length_original: float
    length_updated: float
    change: float
    length_part: float
    per_token_part: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)


def length_bias(change: Change) -> LengthBias:
    """Compare the sequence-level with the per-token view of one measured change.

    Args:
        change: with at least two sequences of different length, else the shares of variance are NaN.
    """
    surprisal = -change.original.S
    length = change.original.lengths.double()
    seen = length > 0
    per_sequence = _regress(surprisal[seen], length[seen])
    per_token = _regress(surprisal[seen] / length[seen], length[seen])
    integrand = change.headline.integrand
    sequence, token = (change.estimates[f"{unit}/{integrand}"] for unit in ("sequence", "per_token"))
    length0 = _ratio(sequence.original, token.original, float(length.mean()))
    length1 = _ratio(sequence.updated, token.updated, length0)
    return LengthBias(
        sequence_r2=per_sequence[1],
        per_token_r2=per_token[1],
        nats_per_token=per_sequence[0],
        length_original=length0,
        length_updated=length1,
        change=sequence.value,
        length_part=(token.original + token.updated) / 2 * (length1 - length0),
        per_token_part=(length0 + length1) / 2 * token.value,
    )


def _regress(y: Tensor, x: Tensor) -> tuple[float, float]:
    """Slope of y on x and the share of variance that it explains."""
    dx, dy = x - x.mean(), y - y.mean()
    covariance, variance_x, variance_y = (float((a * b).sum()) for a, b in ((dx, dy), (dx, dx), (dy, dy)))
    if variance_x == 0 or variance_y == 0:
        return float("nan"), float("nan")
    return covariance / variance_x, covariance**2 / (variance_x * variance_y)


def _ratio(entropy: float, per_token: float, otherwise: float) -> float:
    # E[L] under either policy, from H = h · E[L]; a policy without any entropy does not tell its length
    return entropy / per_token if per_token else otherwise
