"""From log weights to the weights that an estimator uses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entropy_fast.collective import Collective
from entropy_fast.errors import InputError
from entropy_fast.psis import psislw

Method = Literal["snis", "is", "clip", "psis"]


@dataclass(frozen=True)
class Weights:
    """Weights up to a common factor, which self-normalised estimates do not need."""

    relative: Tensor
    """[n] float64, at most 1: nothing overflows, whatever the log weights are."""
    khat: float | None = None
    """k̂ of the fit that smoothed them (method "psis")."""
    cut_mass: float | None = None
    """mean((w − c)₊): the mass that clipping at c removed (method "clip")."""


def importance_weights(log_weight: Tensor, method: Method, clip: float | None, collective: Collective) -> Weights:
    """The weights of one method from ℓ [n].

    Scaling by the largest weight of *all* ranks comes before any exp.
    """
    if (clip is not None) != (method == "clip"):
        raise InputError(
            f'clip must be given with method "clip" and with no other, got clip={clip} with method {method!r}'
        )
    largest = collective.max(log_weight.max() if log_weight.numel() else log_weight.new_tensor(-math.inf))
    if bool(largest == -math.inf):
        raise InputError("every sequence is impossible under the updated policy; check that it is the right one")
    if method == "psis":
        smoothed, khat = psislw(log_weight, collective=collective)
        top = collective.max(smoothed.max())
        return Weights((smoothed - top).exp(), khat=float(khat))
    if method == "clip":
        assert clip is not None
        if not clip > 0:
            raise InputError(f"clip must be above 0, got {clip}; weights have mean 1, so 10 cuts little")
        bounded = log_weight.clamp(max=math.log(clip))
        top = largest.clamp(max=math.log(clip))
        excess = torch.where(log_weight > math.log(clip), log_weight.exp() - clip, 0.0)
        totals = collective.sum(torch.stack((excess.sum(), excess.new_tensor(float(excess.numel())))))
        return Weights((bounded - top).exp(), cut_mass=float(totals[0] / totals[1]))
    if method not in ("snis", "is"):
        raise InputError(f'method must be "snis", "is", "clip" or "psis", got {method!r}')
    return Weights((log_weight - largest).exp())
