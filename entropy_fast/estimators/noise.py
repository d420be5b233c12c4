"""Null calibration: what ΔH reads when nothing changed but the order in which a machine adds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from entropy_fast.errors import InputError
from entropy_fast.estimators.change import EntropyChange, entropy_change
from entropy_fast.estimators.paired import PairedScores


@dataclass(frozen=True)
class NoiseFloor:
    """The rounding noise of ΔH, in the unit of the estimate it belongs to, nats."""

    floor: float
    """Twice the root mean square of the noise; a |ΔH| below it says nothing."""
    null: EntropyChange
    """ΔH between two scorings of one policy; its truth is 0."""
    log_weight_rms: float
    """Root mean square of ℓ, whose truth is 0: nats per sequence."""
    ess_fraction: float
    """ESS/n of the null's weights; what the rounding alone takes away."""

    @property
    def exact(self) -> bool:
        """Whether the two scorings agreed bit for bit in every sequence, as those in one batch layout must."""
        return self.log_weight_rms == 0.0 and self.floor == 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; the null estimate nested."""
        return {
            "floor": self.floor,
            "exact": self.exact,
            "log_weight_rms": self.log_weight_rms,
            "ess_fraction": self.ess_fraction,
            "null": self.null.to_dict(),
        }


def noise_floor(null: PairedScores, *, n_full: int | None = None, **options: Any) -> NoiseFloor:
    """The noise of ΔH from one policy scored twice.

    The noise has a part that every data set shares (a bias b) and a part that averages out. From the null estimate
    d ± s on m sequences, b² is estimated by max(d² − s², 0), and the other part on n sequences has the variance
    s²·m/n. The floor is 2·sqrt(b² + s²·m/n), and in the full mode (m = n) 2·max(|d|, s).

    Args:
        null: the same sequences under the *same* policy in two batch layouts, as logprob0/1 and entropy0/1.
        n_full: number of sequences of the estimate it is for, when `null` is a subsample; the null's own when None.
        options: of `entropy_change`; give those of the estimate, so that the unit is the same.

    Raises:
        InputError: n_full smaller than the number of sequences in the null, and what `entropy_change` raises.
    """
    change = entropy_change(null, **options)
    m = change.n_sequences
    n = m if n_full is None else n_full
    if n < m:
        raise InputError(f"n_full must be at least the {m} sequences of the null, got {n}")
    # one prompt only: the spread between its sequences is all there is
    s = change.se if not math.isnan(change.se) else change.se_fixed_prompts
    s = 0.0 if math.isnan(s) else s
    shared = max(change.value**2 - s**2, 0.0)
    weights = (null.log_weight - null.log_weight.max()).exp()
    return NoiseFloor(
        floor=2.0 * math.sqrt(shared + s**2 * m / n),
        null=change,
        log_weight_rms=math.sqrt(float(null.log_weight.square().mean())),
        ess_fraction=float(weights.sum().square() / weights.square().sum()) / len(null),
    )
