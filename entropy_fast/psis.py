"""Pareto-smoothed importance sampling (PSIS): smoothed weights, and the shape k̂ of their tail.

The largest M = floor(min(n/5, 3·sqrt(n / r_eff))) weights are fitted by a generalised Pareto distribution and replaced
by its quantiles. k̂ says how many moments the weights have: below `khat_threshold(n)` the estimate can be trusted.

Sources: Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling, JMLR 25(72); the fit is
Zhang and Stephens (2009), Technometrics 51(3). Conventions (tail size, prior, cap) are those of arviz-stats 0.8.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from entropy_fast.collective import ALONE, Collective
from entropy_fast.errors import EntropyFastWarning, InputError

MIN_TAIL = 5
"""A tail of fewer points is not fitted."""


def tail_length(n: int, r_eff: float = 1.0) -> int:
    """How many of `n` weights form the tail: floor(min(n/5, 3·sqrt(n / r_eff)))."""
    return math.floor(min(0.2 * n, 3.0 * math.sqrt(n / r_eff)))


def khat_threshold(n: int) -> float:
    """The largest k̂ that `n` weights support, min(1 − 1/log10 n, 0.7). Source: Vehtari et al. (2024), section 3.2.4."""
    return min(1.0 - 1.0 / math.log10(n), 0.7) if n > 1 else -math.inf


def psislw(log_weights: Tensor, r_eff: float = 1.0, *, collective: Collective = ALONE) -> tuple[Tensor, Tensor]:
    """Smooth the tail of importance weights and estimate its shape.

    Args:
        log_weights: log weights of one sample, any shape, any floating dtype, unnormalised. −inf is a weight of zero.
        r_eff: relative efficiency of the draws, ESS/n of a Markov chain; 1 for independent draws.
        collective: the ranks over which the sample is spread; each passes its own part.

    Returns:
        The smoothed log weights (float64, the input's shape and device), normalised so that the weights sum to 1 over
        all ranks; and k̂ (float64, 0-d, same device). k̂ = inf, with the raw weights normalised and a warning, where no
        tail can be fitted: fewer than 5 tail points, all of them equal, or a tail that ties with the cutoff (also by
        underflow: the weights span more than 700 nats).

    Raises:
        InputError: NaN or +inf among the weights, no weight above zero, or r_eff not above 0.
    """
    if not r_eff > 0 or math.isinf(r_eff):
        raise InputError(f"r_eff must be a finite number above 0, got {r_eff}; pass 1 for independent draws")
    if log_weights.is_complex() or log_weights.dtype == torch.bool:
        raise InputError(f"log_weights must be real numbers, got {log_weights.dtype}; pass log(w), not a mask")
    x = log_weights.detach().to(torch.float64).flatten()
    count, largest = _count_and_largest(x, collective)
    x = x - largest

    tail_size = tail_length(count, r_eff)
    khat, reason = x.new_tensor(math.inf), ""
    if tail_size < MIN_TAIL:
        reason = f"{count} weights leave {tail_size} in the tail and {MIN_TAIL} are needed"
    else:
        members, values, cutoff = _find_tail(x, tail_size, collective)
        fitted, fitted_khat, reason = _fit_tail(values, cutoff)
        if not reason:
            khat = fitted_khat
            local = members >= 0
            x = x.index_put((members[local],), fitted[local])
    if reason:
        warnings.warn(f"k̂ is inf and the weights stay unsmoothed: {reason}", EntropyFastWarning, stacklevel=2)
    # the largest value is 0, before and after smoothing, so exp cannot overflow
    x = x - collective.sum(x.exp().sum()).log()
    return x.reshape(log_weights.shape), khat


def _count_and_largest(x: Tensor, collective: Collective) -> tuple[int, Tensor]:
    """The number of weights on all ranks and the largest one; every rank raises when one has a bad weight."""
    largest = x.max() if x.numel() else x.new_tensor(-math.inf)
    bad = torch.isnan(largest) | (largest == math.inf)  # max propagates NaN
    facts = collective.sum(torch.stack((x.new_tensor(float(x.numel())), bad.to(x.dtype))))
    count, any_bad = facts.tolist()
    if any_bad:
        raise InputError("log_weights must not hold NaN or +inf; −inf (a weight of zero) is allowed")
    largest = collective.max(largest)
    if not count or bool(largest == -math.inf):
        raise InputError(f"log_weights must hold at least one weight above zero, got {int(count)} weights, all zero")
    return int(count), largest


def _find_tail(x: Tensor, size: int, collective: Collective) -> tuple[Tensor, Tensor, Tensor]:
    """The `size` largest of all ranks, ascending, and the next value below.

    Returns the position of each in this rank's x (−1 for another rank's), the values, and the cutoff. Of equal values
    the one of the higher rank, then of the higher position, counts as larger, so that N ranks choose as one does.
    """
    candidates = _largest(x, size + 1)
    parts, place = collective.gather(x[candidates])
    values = torch.cat(parts)
    before = sum(part.numel() for part in parts[:place])
    positions = torch.full_like(values, -1, dtype=torch.int64)
    positions[before : before + candidates.numel()] = candidates
    order = values.argsort(stable=True)[-(size + 1) :]
    return positions[order[1:]], values[order[1:]], values[order[0]]


def _largest(x: Tensor, k: int) -> Tensor:
    """Positions, ascending, of (at least) the `k` largest values: all that reach the k-th, ties included."""
    if x.numel() <= k:
        return torch.arange(x.numel(), device=x.device)
    kth = x.topk(k, sorted=False).values.min()
    return (x >= kth).nonzero().flatten()


def _fit_tail(tail: Tensor, log_cutoff: Tensor) -> tuple[Tensor, Tensor, str]:
    """The smoothed tail (log scale, ascending), k̂, and, where no fit is possible, the reason instead."""
    size = tail.numel()
    cutoff = log_cutoff.exp()
    z = tail.exp() - cutoff
    quartile = z[math.floor(size / 4 + 0.5) - 1]
    if bool(tail[0] == tail[-1]):
        return tail, log_cutoff, "the largest weights are all equal"
    if bool(quartile == 0) or bool(tail[0] == -math.inf):
        return tail, log_cutoff, "the tail ties with the weights below it, or underflows"
    # Zhang and Stephens: a weighted mean over a grid of θ, weights by profile likelihood
    grid = 30 + math.isqrt(size)
    j = torch.arange(1, grid + 1, dtype=torch.float64, device=tail.device)
    theta = 1.0 / z[-1] + (1.0 - (grid / (j - 0.5)).sqrt()) / (3.0 * quartile)
    k = torch.log1p(-theta[:, None] * z).mean(dim=1)
    likelihood = size * (torch.log(-theta / k) - k - 1.0)
    posterior = torch.softmax(likelihood, dim=0)
    # as arviz does, so that the two agree to rounding: weights below 10 ulp are dropped
    posterior = torch.where(posterior >= 10 * torch.finfo(torch.float64).eps, posterior, 0.0)
    theta_hat = (posterior * theta).sum() / posterior.sum()
    k_hat = torch.log1p(-theta_hat * z).mean()
    sigma = -k_hat / theta_hat
    k_hat = (size * k_hat + 5.0) / (size + 10.0)  # prior of weight 10 at k = 1/2
    p = (torch.arange(size, dtype=torch.float64, device=tail.device) + 0.5) / size
    smoothed = torch.log(cutoff + sigma * torch.expm1(-k_hat * torch.log1p(-p)) / k_hat)
    smoothed = smoothed.clamp(max=tail[-1])
    if not bool(torch.isfinite(k_hat) & torch.isfinite(smoothed).all()):
        return tail, log_cutoff, "the tail spans too many orders of magnitude for the fit"
    return smoothed, k_hat, ""
