"""δH₁ = ∇H·v, the first-order change of the entropy along a step v, from u = ∇S·v of each sequence.

The score form E[u·(A − b)] is exact because moving θ moves both the values and the states that are visited.
Differentiating Σ_t H_t along fixed sequences sees the first part only (`direct`), and may even get the size wrong by a
third.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from entropy_fast.collective import ALONE, Collective
from entropy_fast.errors import InputError
from entropy_fast.estimators.intervals import check_confidence, interval
from entropy_fast.estimators.prompts import Prompts

Baseline = Literal["leave_one_out", "mean", "none"]
LengthNormalization = Literal["exact", "proposal"]
FirstOrderUnit = Literal["sequence", "per_token"]


@dataclass(frozen=True)
class FirstOrder:
    """δH₁ with its uncertainty, in nats (per sequence or token) for the step v as given; divide by ln 2 for bits."""

    value: float
    se: float
    """Standard error over prompts drawn anew, clustered by prompt; NaN with fewer than two prompts."""
    se_fixed_prompts: float
    interval: tuple[float, float]
    confidence: float
    unit: FirstOrderUnit
    length_normalize: LengthNormalization | None
    baseline: Baseline
    n_sequences: int
    n_prompts: int
    influence: Tensor = dataclasses.field(repr=False)
    """[n] ψ, sums to 0 for the baselines "mean" and "none", nearly so for "leave_one_out"."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, without the per-sequence tensor."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "influence"]
        numbers = {name: getattr(self, name) for name in names}
        bits = {name: numbers[name] / math.log(2) for name in ("value", "se", "se_fixed_prompts")}
        return {**numbers, "interval": list(self.interval), "bits": bits}


def first_order(
    u: Tensor,
    a: Tensor,
    length: Tensor,
    prompt_index: Tensor,
    *,
    unit: FirstOrderUnit = "sequence",
    length_normalize: LengthNormalization | None = None,
    direct: Tensor | None = None,
    baseline: Baseline = "leave_one_out",
    confidence: float = 0.95,
    collective: Collective = ALONE,
) -> FirstOrder:
    """Estimate δH₁ = ∇H·v.

    Args:
        u: [n] ∇S·v, the derivative of the log-prob of *every generated token* along v.
        a: [n] the integrand: −S0 ("sampled") or R0 ("rao_blackwell", which then needs `direct`), over counted tokens.
        length: [n] L, counted tokens.
        prompt_index: [n] integers, equal for sequences of one prompt.
        unit: "sequence", E[u (A − b)]; or "per_token", E[u (A − h L − b)] / E[L] with h = ΣA/ΣL.
        length_normalize: for A = −S and H_norm = E[−S/L] instead: "exact", −E[u (S + 1 − b) / L], or "proposal",
            −E[(u/L)(S/L − b)], what differentiating the probe loss with S/L in the place of S gives. The two differ:
            the proposal's weighs by 1/L once more and lacks the +1; it is no gradient of H_norm.
        direct: [n] the derivative of A along the fixed sequence: Ṙ for A = R; −(∇S_counted·v) when tokens are left out
            of A = −S. With A = −S over every token it is −u, which None stands for (of mean zero, so left out, but in
            "exact", where it gives the +1).
        baseline: "leave_one_out" (unbiased: the mean over the *other* sequences of the prompt), "mean" (over all
            sequences, biased by O(1/n); with direct = −u it is the derivative of the self-normalised ΔH of the same
            batch), or "none".
        confidence: of the interval.
        collective: the ranks over which the sequences are spread.

    Raises:
        InputError: shapes that do not match, values that are not finite, options that do not go together.

    Sources: the score-function identity (Williams 1992); docs/statistics.md derives each form.
    """
    check_confidence(confidence)
    n = u.numel()
    columns = {"u": u, "a": a, "length": length, **({} if direct is None else {"direct": direct})}
    for name, x in columns.items():
        if tuple(x.shape) != (n,) or n == 0:
            raise InputError(f"{name} must have shape (sequences,) = ({n},) and not be empty, got {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise InputError(f"{name} must be finite; sequence {int((~torch.isfinite(x)).nonzero()[0])} is not")
    if unit not in ("sequence", "per_token"):
        raise InputError(f'unit must be "sequence" or "per_token", got {unit!r}')
    if baseline not in ("leave_one_out", "mean", "none"):
        raise InputError(f'baseline must be "leave_one_out", "mean" or "none", got {baseline!r}')
    if length_normalize not in (None, "exact", "proposal"):
        raise InputError(f'length_normalize must be None, "exact" or "proposal", got {length_normalize!r}')
    if length_normalize is not None and unit == "per_token":
        raise InputError("length_normalize has a unit of its own, the mean of S/L; leave unit out")
    if length_normalize == "proposal" and direct is not None:
        raise InputError('length_normalize "proposal" has no direct part; leave direct out, or take "exact"')

    u, a, length = (x.detach().to(torch.float64) for x in (u, a, length))
    extra = torch.zeros_like(u) if direct is None else direct.detach().to(torch.float64)
    prompts = Prompts(prompt_index, collective)

    def product(score: Tensor, x: Tensor) -> Tensor:
        """score·(x − b), less what the mean does not see but the influence does: the "mean" baseline is estimated."""
        if baseline == "mean":
            return (score - prompts.mean(score)) * (x - prompts.mean(x))
        return score * (x - prompts.leave_one_out(x)) if baseline == "leave_one_out" else score * x

    if unit == "per_token":
        mean_length = prompts.mean(length)
        if bool(mean_length == 0):
            raise InputError("no counted token in any sequence: nothing to average; check the masks")
        h = prompts.mean(a) / mean_length
        rest = a - h * length
        terms = product(u, rest) + extra
        estimate = prompts.mean(terms) / mean_length
        # h is estimated too: its influence is rest/L̄, and the estimate moves with it by −E[u (L − b)]/L̄
        slope = prompts.mean(product(u, length)) / mean_length
        influence = (terms - estimate * length) / mean_length - slope * rest / mean_length
    else:
        divisor = length.clamp(min=1)
        if length_normalize == "exact" and direct is None:
            terms = product(u, (a - 1) / divisor)
        elif length_normalize == "exact":
            terms = product(u, a / divisor) + extra / divisor
        elif length_normalize == "proposal":
            terms = product(u / divisor, a / divisor)
        else:
            terms = product(u, a) + extra
        estimate = prompts.mean(terms)
        influence = terms - estimate

    errors = prompts.standard_errors(influence)
    return FirstOrder(
        value=float(estimate),
        se=errors.random_prompts,
        se_fixed_prompts=errors.fixed_prompts,
        interval=interval(float(estimate), errors.random_prompts, prompts.n_prompts - 1, confidence),
        confidence=confidence,
        unit=unit,
        length_normalize=length_normalize,
        baseline=baseline,
        n_sequences=prompts.n_sequences,
        n_prompts=prompts.n_prompts,
        influence=influence,
    )
