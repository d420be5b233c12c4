"""The difference of two ratios of sums, ΣN1/ΣD1 − ΣN0/ΣD0: the form of all estimators but `prefix`.

| | N1 | D1 | N0 | D0 |
|---|---|---|---|---|
| sequence, self-normalised | w·A1 | w | A0 | 1 |
| sequence, plain | w·A1 | 1 | A0 | 1 |
| per token | w·A1 | w·L | A0 | L |
| control variates | A0 + Δ_A | 1 or L + Δ_L | A0 | 1 or L |

Its influence function is the delta method's: ψ_i = n·[(N1_i − h1·D1_i)/ΣD1 − (N0_i − h0·D0_i)/ΣD0].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_fast.errors import InputError
from entropy_fast.estimators.paired import PairedScores
from entropy_fast.estimators.prompts import Prompts
from entropy_fast.estimators.weights import Weights


@dataclass(frozen=True)
class PointEstimate:
    """What every estimator hands on: the estimate, its parts per sequence, its jackknife."""

    original: float
    updated: float
    value: float
    influence: Tensor
    """ψ [n]: n·ΔĤ's derivative by the weight of each sequence; sums to 0."""
    contributions: Tensor
    """[n]: what each sequence adds; sums to the value."""
    jackknife: float
    jackknife_se: float


def ratio_terms(
    paired: PairedScores, a0: Tensor, a1: Tensor, weights: Weights, *, per_token: bool, plain: bool
) -> Tensor:
    """[n, 4]: N1, D1, N0, D0 of importance sampling without control variates."""
    w, one = weights.relative, torch.ones_like(a0)
    if per_token:
        return torch.stack((w * a1, w * paired.length, a0, paired.length), dim=1)
    if plain:  # unshifted; a weight beyond 1e308 is inf, and so is the estimate
        return torch.stack((paired.log_weight.exp() * a1, one, a0, one), dim=1)
    return torch.stack((w * a1, w, a0, one), dim=1)


def control_variate_terms(
    paired: PairedScores, a0: Tensor, a1: Tensor, prompts: Prompts, *, per_token: bool, sampled: bool
) -> Tensor:
    """[n, 4]: N1, D1, N0, D0 with control variates of known mean.

    E[w] = 1, so Δ_A = (w − 1)(A1 − b) + (A1 − A0) has the mean ΔH for any b that does not look at the sequence: here
    the leave-one-out mean of A0 over its prompt. With A = −S, w − 1 is added too: A1 − A0 = −ℓ, and w − 1 − ℓ is of
    second order. The length of the per-token form is treated alike.
    """
    excess = torch.expm1(paired.log_weight)  # w − 1
    delta_a = excess * (a1 - prompts.leave_one_out(a0)) + (a1 - a0)
    if sampled:
        delta_a = delta_a + excess
    if not per_token:
        one = torch.ones_like(a0)
        return torch.stack((a0 + delta_a, one, a0, one), dim=1)
    delta_l = excess * (paired.length - prompts.leave_one_out(paired.length))
    return torch.stack((a0 + delta_a, paired.length + delta_l, a0, paired.length), dim=1)


def estimate_ratio(terms: Tensor, prompts: Prompts) -> PointEstimate:
    """From the terms [n, 4] of `ratio_terms` or `control_variate_terms` to the estimate."""
    by_prompt = prompts.sum(terms)[prompts.counts > 0]
    total = by_prompt.sum(dim=0)
    n1, d1, n0, d0 = total
    if bool(d0 == 0) or bool(d1 == 0):
        raise InputError("no counted token in any sequence: nothing to average; check the masks and include_eos")
    h1, h0 = n1 / d1, n0 / d0
    part1, part0 = terms[:, 0] / d1, terms[:, 2] / d0
    influence = prompts.n_sequences * ((part1 - h1 * terms[:, 1] / d1) - (part0 - h0 * terms[:, 3] / d0))
    jackknife, jackknife_se = jackknife_over_prompts(h1 - h0, _difference(total - by_prompt))
    return PointEstimate(
        original=float(h0),
        updated=float(h1),
        value=float(h1 - h0),
        influence=influence,
        contributions=part1 - part0,
        jackknife=jackknife,
        jackknife_se=jackknife_se,
    )


def jackknife_over_prompts(value: Tensor, without_one: Tensor) -> tuple[float, float]:
    """The bias-corrected estimate and its standard error from the estimates without each prompt [P].

    P·θ̂ − (P−1)·mean θ̂₍₋c₎, variance (P−1)/P · Σ (θ̂₍₋c₎ − mean)²; NaN with fewer than two prompts.
    """
    p = without_one.numel()
    if p < 2:
        return math.nan, math.nan
    mean = without_one.mean()
    variance = (p - 1) / p * (without_one - mean).square().sum()
    return float(p * value - (p - 1) * mean), math.sqrt(float(variance))


def _difference(sums: Tensor) -> Tensor:
    return sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
