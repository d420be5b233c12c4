"""ΔH = H(π1) − H(π0) from sequences drawn from π0: every estimator behind one function, one result type."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from entropy_fast.collective import ALONE, Collective
from entropy_fast.errors import InputError
from entropy_fast.estimators.intervals import check_confidence, interval
from entropy_fast.estimators.paired import Integrand, PairedScores
from entropy_fast.estimators.prefix import estimate_prefix
from entropy_fast.estimators.prompts import Prompts
from entropy_fast.estimators.ratio import control_variate_terms, estimate_ratio, ratio_terms
from entropy_fast.estimators.weights import Method, Weights, importance_weights

if TYPE_CHECKING:
    import pandas

Unit = Literal["sequence", "per_token"]
Estimator = Literal["ratio", "prefix"]

_IN_NATS = ("value", "original", "updated", "se", "se_fixed_prompts", "jackknife", "jackknife_se")


@dataclass(frozen=True)
class EntropyChange:
    """An estimate of ΔH with its uncertainty. All entropies in nats (per sequence, or per token); see `bits`."""

    value: float
    """ΔH."""
    original: float
    """H(π0)."""
    updated: float
    """H(π1)."""
    se: float
    """Standard error over prompts drawn anew, clustered by prompt; NaN with fewer than two prompts."""
    se_fixed_prompts: float
    """Standard error over new sequences of these same prompts; NaN when no prompt has two sequences."""
    interval: tuple[float, float]
    """Two-sided interval around the value, Student's t with P − 1 degrees of freedom on `se`."""
    confidence: float
    jackknife: float
    """ΔH with the O(1/n) bias of the ratio removed by a jackknife over prompts."""
    jackknife_se: float
    unit: Unit
    integrand: Integrand
    method: Method
    estimator: Estimator
    control_variate: bool
    n_sequences: int
    n_prompts: int
    n_tokens: int
    """Counted tokens."""
    khat: float | None
    """k̂ of the smoothing fit (method "psis")."""
    cut_mass: float | None
    """mean((w − c)₊), the weight that clipping removed (method "clip")."""
    influence: Tensor = dataclasses.field(repr=False)
    """[n] ψ: how hard each sequence pulls at the estimate; sums to 0. The standard errors come from it."""
    contributions: Tensor = dataclasses.field(repr=False)
    """[n]: what each sequence adds to ΔH; sums to the value."""
    prompt_index: Tensor = dataclasses.field(repr=False)
    length: Tensor = dataclasses.field(repr=False)
    log_weight: Tensor = dataclasses.field(repr=False)

    @property
    def bias(self) -> float:
        """The jackknife's estimate of the bias of `value`."""
        return self.value - self.jackknife

    @property
    def bits(self) -> dict[str, Any]:
        """The entropies, errors and interval in bits (nats over ln 2)."""
        scaled: dict[str, Any] = {name: getattr(self, name) / math.log(2) for name in _IN_NATS}
        scaled["interval"] = [bound / math.log(2) for bound in self.interval]
        return scaled

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, without the per-sequence tensors; entropies in nats, and again under "bits"."""
        numbers = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if not isinstance(getattr(self, field.name), Tensor)
        }
        return {**numbers, "interval": list(self.interval), "bits": self.bits}

    def to_json(self, **options: Any) -> str:
        """`to_dict` as JSON; what is unknown (NaN) reads null. Options go to json.dumps."""
        return json.dumps(without_nan(self.to_dict()), **options)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a sequence: prompt, length, log weight, influence, contribution. Needs pandas."""
        import pandas

        columns = ("prompt_index", "length", "log_weight", "influence", "contributions")
        return pandas.DataFrame({name: getattr(self, name).cpu().numpy() for name in columns})


def entropy_change(
    paired: PairedScores,
    *,
    unit: Unit = "sequence",
    integrand: Integrand = "sampled",
    method: Method | None = None,
    estimator: Estimator = "ratio",
    clip: float | None = None,
    control_variate: bool = False,
    confidence: float = 0.95,
    collective: Collective = ALONE,
) -> EntropyChange:
    """Estimate ΔH = H(π1) − H(π0).

    Args:
        paired: the scores of sequences drawn from π0.
        unit: "sequence" (nats per sequence) or "per_token" (nats per counted token, a ratio of expectations).
        integrand: "sampled", −Σ log p of the tokens that were drawn; or "rao_blackwell", Σ of their full
            distributions' entropies, which usually, not always, has the smaller variance.
        method: "snis" (self-normalised, the default), "is" (plain, unshifted weights), "clip" (min(w, clip),
            self-normalised: biased, `cut_mass` says by how much weight), "psis" (Pareto-smoothed, self-normalised).
            Per token, "is" and "snis" are the same ratio.
        estimator: "ratio", one weight a sequence; or "prefix", one weight a prefix (needs per-token scores, "snis").
        clip: the bound c of method "clip".
        control_variate: subtract what is known to have mean zero, with leave-one-out baselines. Helps when prompts
            differ widely; mixed otherwise. Implies method "is", whose weights have the known mean 1.
        confidence: of the interval.
        collective: the ranks over which the sequences are spread (`entropy_fast.collective.ProcessGroup`). Each calls
            this with its own part, one sequence or more, and prompt ids 0..P−1 that mean the same everywhere; a prompt
            may be split. All get the same numbers; per-sequence results stay with their rank.

    Returns:
        An `EntropyChange`. Equal scores under both policies give exactly 0.

    Raises:
        InputError: options that do not go together, or scores that lack what they need.

    Formulas: docs/statistics.md.
    """
    check_confidence(confidence)
    if unit not in ("sequence", "per_token"):
        raise InputError(f'unit must be "sequence" or "per_token", got {unit!r}')
    if estimator not in ("ratio", "prefix"):
        raise InputError(f'estimator must be "ratio" or "prefix", got {estimator!r}')
    if method is None:
        method = "is" if control_variate else "snis"
    if control_variate and (method != "is" or estimator != "ratio"):
        raise InputError(
            'control_variate needs the plain weights of method "is" and estimator "ratio", '
            f"got method {method!r} and estimator {estimator!r}; leave the two out"
        )
    if estimator == "prefix" and method != "snis":
        raise InputError(f'estimator "prefix" normalises its own weights; leave method out, got {method!r}')

    per_token = unit == "per_token"
    prompts = Prompts(paired.prompt_index, collective)
    weights: Weights | None = None
    if estimator == "prefix":
        point = estimate_prefix(paired, integrand, prompts, collective, per_token=per_token)
    else:
        a0, a1 = paired.integrand(integrand)
        weights = importance_weights(paired.log_weight, method, clip, collective)
        if control_variate:
            sampled = integrand == "sampled"
            terms = control_variate_terms(paired, a0, a1, prompts, per_token=per_token, sampled=sampled)
        else:
            terms = ratio_terms(paired, a0, a1, weights, per_token=per_token, plain=method == "is")
        point = estimate_ratio(terms, prompts)

    errors = prompts.standard_errors(point.influence)
    return EntropyChange(
        value=point.value,
        original=point.original,
        updated=point.updated,
        se=errors.random_prompts,
        se_fixed_prompts=errors.fixed_prompts,
        interval=interval(point.value, errors.random_prompts, prompts.n_prompts - 1, confidence),
        confidence=confidence,
        jackknife=point.jackknife,
        jackknife_se=point.jackknife_se,
        unit=unit,
        integrand=integrand,
        method=method,
        estimator=estimator,
        control_variate=control_variate,
        n_sequences=prompts.n_sequences,
        n_prompts=prompts.n_prompts,
        n_tokens=int(collective.sum(paired.length.sum())),
        khat=weights.khat if weights else None,
        cut_mass=weights.cut_mass if weights else None,
        influence=point.influence,
        contributions=point.contributions,
        prompt_index=paired.prompt_index,
        length=paired.length,
        log_weight=paired.log_weight,
    )


def without_nan(value: Any) -> Any:
    """The same structure with NaN and infinities as None and as strings, which strict JSON can hold."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
