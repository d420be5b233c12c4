"""ΔH along a direction: the original scored once, the policy θ + η v scored for a list of η."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from entropy_fast.change import UNITS, Change, measure_change, measure_noise_floor
from entropy_fast.config import Config
from entropy_fast.direction import DeltaH1, Direction, Method, delta_h1, norm
from entropy_fast.errors import InputError
from entropy_fast.estimators import ResponseFit, fit_response
from entropy_fast.policies import moved
from entropy_fast.rollouts import Rollouts
from entropy_fast.scoring import Scoring, score


@dataclass(frozen=True)
class Sweep:
    """How the entropy answers to the size of a step.

    Attributes:
        etas: the steps, in units of v.
        changes: one for each.
        fit: by unit, linear and quadratic fits of ΔH(η) through the origin.
        predicted: δH₁ = ∇H·v, or None when it was not asked for.
        direction_norm: the 2-norm of v.
    """

    etas: tuple[float, ...]
    changes: tuple[Change, ...]
    fit: dict[str, ResponseFit]
    predicted: DeltaH1 | None
    direction_norm: float

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, in nats and bits."""
        return {
            "etas": list(self.etas),
            "changes": [{"eta": eta} | change.to_dict() for eta, change in zip(self.etas, self.changes, strict=True)],
            "fit": {unit: fit.to_dict() for unit, fit in self.fit.items()},
            "delta_h1": None if self.predicted is None else self.predicted.to_dict(),
            "direction_norm": self.direction_norm,
        }


def sweep(
    model: nn.Module,
    rollouts: Rollouts,
    direction: Direction,
    etas: Sequence[float],
    config: Config | None = None,
    *,
    tokenizer: Any = None,
    in_sample: bool = False,
    predict: Method | None = "difference",
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Measure ΔH at θ + η v for every η; the model comes back bit for bit.

    Args:
        model: the original policy, which the rollouts were drawn from.
        rollouts: what both are scored on.
        direction: v by parameter: an optimizer's step (`Snapshot.difference`), a state-dict difference, ...
        etas: two or more different steps besides 0.
        config: as for `measure_change`; with `importance_sampling.master_weights`, θ + η v is not rounded to the
            weights' dtype and all is scored in float32.
        tokenizer: its EOS ids join the model's.
        in_sample: v was fitted to these same rollouts.
        predict: also estimate δH₁, by this method (see `directional_scores`); None leaves it out.
        progress: called with (policies scored, policies in all).

    Raises:
        InputError: fewer than two different η besides 0.
    """
    config = config or Config()
    if len({eta for eta in etas if eta != 0}) < 2:
        raise InputError(f"a sweep needs two or more different steps η besides 0, got {list(etas)}")
    scoring = Scoring.from_config(config, model, tokenizer)
    original = score(model, rollouts, scoring)
    floor = measure_noise_floor(model, rollouts, original, config, scoring)
    changes = []
    for done, eta in enumerate(etas):
        if progress is not None:
            progress(done + 1, len(etas) + 1)
        with moved(direction, eta, round_to_dtype=scoring.precision != "float32"):
            updated = score(model, rollouts, replace(scoring, layout=original.layout))
        changes.append(measure_change(rollouts, original, updated, config, noise_floor=floor, in_sample=in_sample))
    integrand = config.entropy.integrand
    fit: dict[str, ResponseFit] = {
        unit: fit_response(etas, [change.estimates[f"{unit}/{integrand}"].value for change in changes])
        for unit in UNITS
    }
    predicted = None
    if predict is not None:
        predicted = delta_h1(model, rollouts, direction, scoring, integrand=integrand, method=predict)
    if progress is not None:
        progress(len(etas) + 1, len(etas) + 1)
    return Sweep(tuple(etas), tuple(changes), fit, predicted, norm(direction))
