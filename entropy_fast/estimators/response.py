"""How ΔH answers to the size of the step: fits through the origin of ΔH(η), and where the response is linear."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import InputError


@dataclass(frozen=True)
class ResponseFit:
    """ΔH(η) ≈ slope·η and ΔH(η) ≈ initial_slope·η + curvature·η², both through ΔH(0) = 0."""

    slope: float
    """Of the linear fit, nats per unit of η."""
    linear_r2: float
    """1 − Σ residual² / Σ (ΔH − mean)², weighted; 1 is perfect, and below 0 a constant fits better."""
    initial_slope: float
    """Of the quadratic fit at η = 0: what δH₁ predicts."""
    curvature: float
    """Nats per unit of η²; ½ d²H/dη²."""
    quadratic_r2: float
    linear_range: float
    """The largest |η| up to which ΔH departs from initial_slope·η by at most `tolerance` of it, by the quadratic fit,
    not beyond the largest |η| measured."""
    tolerance: float

    def predict(self, eta: float) -> float:
        """The quadratic fit at η."""
        return self.initial_slope * eta + self.curvature * eta**2

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return dataclasses.asdict(self)


def fit_response(
    etas: Sequence[float] | Tensor,
    deltas: Sequence[float] | Tensor,
    se: Sequence[float] | Tensor | None = None,
    *,
    tolerance: float = 0.1,
) -> ResponseFit:
    """Least squares of ΔH on η and on (η, η²), without an intercept.

    Args:
        etas: step sizes, any sign, two or more that differ and are not 0.
        deltas: ΔH at each.
        se: standard errors of the deltas: each point then weighs 1/se². Without them all weigh the same, and the
            largest steps decide. (Where all come from the same sequences the errors are correlated, so no standard
            error of the fit is offered.)
        tolerance: what still counts as linear.

    Raises:
        InputError: fewer than two usable points, lengths that differ, values that are not finite, se not above 0.
    """
    x, y = (torch.as_tensor(values, dtype=torch.float64).flatten().cpu() for values in (etas, deltas))
    sigma = torch.ones_like(x) if se is None else torch.as_tensor(se, dtype=torch.float64).flatten().cpu()
    if not x.shape == y.shape == sigma.shape:
        raise InputError(f"etas, deltas and se must have one length, got {x.numel()}, {y.numel()} and {sigma.numel()}")
    if not all(bool(torch.isfinite(values).all()) for values in (x, y, sigma)) or bool((sigma <= 0).any()):
        raise InputError("etas and deltas must be finite, and se finite and above 0; leave out what was not measured")
    if torch.unique(x[x != 0]).numel() < 2:
        raise InputError(f"a fit needs two or more different step sizes besides 0, got {sorted(set(x.tolist()))}")
    weight = sigma.square().reciprocal()
    weight = weight / weight.sum()

    slope = float((weight * x * y).sum() / (weight * x * x).sum())
    # scaled to |x| ≤ 1, so that tiny steps do not spoil the condition of the system
    scale = x.abs().max()
    design = torch.stack((x / scale, (x / scale).square()), dim=1) * weight.sqrt()[:, None]
    solution = torch.linalg.lstsq(design, (y * weight.sqrt())[:, None]).solution[:, 0]
    initial, curvature = float(solution[0] / scale), float(solution[1] / scale**2)

    total = (weight * (y - (weight * y).sum()).square()).sum()

    def r2(predicted: Tensor) -> float:
        return float(1 - (weight * (y - predicted).square()).sum() / total) if total > 0 else 1.0

    bound = tolerance * abs(initial / curvature) if curvature != 0 else float(scale)
    return ResponseFit(
        slope=slope,
        linear_r2=r2(slope * x),
        initial_slope=initial,
        curvature=curvature,
        quadratic_r2=r2(initial * x + curvature * x * x),
        linear_range=min(bound, float(scale)),
        tolerance=tolerance,
    )
