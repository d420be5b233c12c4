"""What the machine's rounding alone does to a score: the same policy scored again, and again in another layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from entropy_fast.change import UNITS, other_layout, pair
from entropy_fast.config import Config
from entropy_fast.estimators import NoiseFloor, noise_floor
from entropy_fast.precision import Precision
from entropy_fast.rollouts import Rollouts
from entropy_fast.scoring import Scores, Scoring, score


@dataclass(frozen=True)
class PrecisionNoise:
    """The noise of one precision.

    Attributes:
        precision: the transformer's precision, see `model_precision`.
        repeatable: scoring twice in the same layout gave the same bits, as it must.
        floors: by `unit/integrand`, the rounding noise of ΔH in another layout.
        log_weight_rms: root mean square of what another layout does to a sequence's log-prob, nats.
        ess_fraction: ESS/n of that noise, what rounding alone takes from the weights.
        gap_to_float32: root mean square over sequences of S here minus S in float32, nats; None for float32 itself
            and where float32 was not asked for.
    """

    precision: Precision
    repeatable: bool
    floors: dict[str, NoiseFloor]
    log_weight_rms: float
    ess_fraction: float
    gap_to_float32: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; floors in nats."""
        return vars(self) | {"floors": {name: floor.floor for name, floor in self.floors.items()}}


def calibrate(
    model: nn.Module,
    rollouts: Rollouts,
    config: Config | None = None,
    *,
    precisions: Sequence[Precision] = ("float32", "as_loaded"),
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[PrecisionNoise]:
    """Score one policy three times in every precision: twice alike, once in another layout.

    Args:
        model: the policy; left as it was.
        rollouts: sequences that it could have drawn.
        config: as for `measure_change`.
        precisions: `float32` first, if at all: the others are compared with it.
        tokenizer: its EOS ids join the model's.
        progress: called with (scorings done, scorings in all).
    """
    config = config or Config()
    reference: Scores | None = None
    results = []
    for i, precision in enumerate(precisions):
        scoring = replace(Scoring.from_config(config, model, tokenizer), precision=precision)
        first = score(model, rollouts, scoring)
        again = score(model, rollouts, replace(scoring, layout=first.layout))
        other = score(model, rollouts, replace(scoring, layout=other_layout(rollouts, first)))
        if progress is not None:
            progress(3 * (i + 1), 3 * len(precisions))
        null = pair(rollouts, first, other)
        floors = {
            f"{unit}/{integrand}": noise_floor(null, unit=unit, integrand=integrand)
            for unit in UNITS
            for integrand in ("sampled", "rao_blackwell")
        }
        noise = floors["sequence/sampled"]
        gap = None if reference is None else float((first.S - reference.S).square().mean().sqrt())
        if precision == "float32":
            reference = first
        results.append(
            PrecisionNoise(
                precision=precision,
                repeatable=torch.equal(first.logprob, again.logprob),
                floors=floors,
                log_weight_rms=noise.log_weight_rms,
                ess_fraction=noise.ess_fraction,
                gap_to_float32=gap,
            )
        )
    return results
