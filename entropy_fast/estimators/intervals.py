"""Student's t quantiles: with few prompts, ±1.96 standard errors is too short."""

from __future__ import annotations

import math
from statistics import NormalDist

from entropy_fast.errors import InputError


def check_confidence(confidence: float) -> None:
    """Raise InputError unless 0 < confidence < 1."""
    if not 0.0 < confidence < 1.0:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}; 0.95 is usual")


def interval(value: float, se: float, dof: int, confidence: float) -> tuple[float, float]:
    """value ± t·se, two-sided; (nan, nan) when the standard error is unknown."""
    if math.isnan(se) or dof < 1:
        return math.nan, math.nan
    half = t_quantile(0.5 + confidence / 2, dof) * se
    return value - half, value + half


def t_quantile(probability: float, dof: int) -> float:
    """The quantile of Student's t with integer `dof`, for probability in [0.5, 1).

    Bisection on the closed form of the distribution function. Source: Abramowitz and Stegun, 26.7.3, 26.7.4; beyond
    1000 degrees of freedom the expansion 26.7.5, whose relative error is then below 1e-9.
    """
    z = NormalDist().inv_cdf(probability)
    if dof > 1000:
        return (
            z
            + (z**3 + z) / (4 * dof)
            + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * dof**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * dof**3)
        )
    low, high = 0.0, math.pi / 2  # of θ = atan(t / sqrt(dof))
    for _ in range(80):
        middle = (low + high) / 2
        if 0.5 + _central_probability(middle, dof) / 2 < probability:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(dof)


def _central_probability(theta: float, dof: int) -> float:
    """P(|T| < sqrt(dof)·tan θ)."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = dof % 2 == 1
    term, total = (cosine, cosine if dof > 1 else 0.0) if odd else (1.0, 1.0)
    for i in range(3 if odd else 2, dof - 1, 2):
        term *= cosine * cosine * (i - 1) / i
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
