"""Scores along a direction: u = ∇S·v for every sequence, and the step of a real optimizer as the direction v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from entropy_fast.policies import moved
from entropy_fast.rollouts import Rollouts
from entropy_fast.scoring import Scorer, Scoring, evaluation_mode, score

Direction = Mapping[nn.Parameter, Tensor]


@dataclass(frozen=True)
class DirectionalScores:
    """Derivatives along v at θ, one a sequence.

    Attributes:
        u: (N,) float64, ∇(Σ of the log-probs of all emitted tokens)·v, the score.
        u_counted: (N,) float64, the same over the counted tokens only (differs without the EOS).
        r_dot: (N,) float64, ∇R·v along the fixed sequence, or None when it was not asked for.
    """

    u: Tensor
    u_counted: Tensor
    r_dot: Tensor | None


def directional_scores(
    model: nn.Module,
    rollouts: Rollouts,
    direction: Direction,
    scoring: Scoring,
    *,
    method: Literal["backward", "difference"] = "backward",
    entropy: bool = False,
    step: float | None = None,
) -> DirectionalScores:
    """∇S·v (and ∇R·v) for every sequence.

    Args:
        model: differentiated at its present weights, in evaluation mode; `.grad` is left as it was.
        rollouts: the sequences.
        direction: v by parameter.
        scoring: how to score.
        method: `backward` is exact: one backward pass and one dot product a sequence. `difference` is
            (S(θ + εv) − S(θ − εv)) / 2ε: two scoring passes in all, with an error of O(ε²) and of rounding over ε.
        entropy: also compute ∇R·v.
        step: ε of `difference`; by default such that the weights move by 1e-3 of their norm.
    """
    if method == "difference":
        return _by_difference(model, rollouts, direction, replace(scoring, entropy=entropy), step)
    return _by_backward(model, rollouts, direction, replace(scoring, entropy=entropy))


def _by_difference(
    model: nn.Module, rollouts: Rollouts, direction: Direction, scoring: Scoring, step: float | None
) -> DirectionalScores:
    if step is None:
        size = sum(float(v.double().square().sum()) for v in direction.values()) ** 0.5
        norm = sum(float(p.detach().double().square().sum()) for p in direction) ** 0.5
        step = 1e-3 * norm / size if size > 0 and norm > 0 else 1.0
    results = []
    for eta in (step, -step):
        with moved(direction, eta, round_to_dtype=scoring.precision != "float32"):
            results.append(score(model, rollouts, scoring))
    plus, minus = results
    change = (plus.logprob.double() - minus.logprob.double()) / (2 * step)
    masks = plus.masks
    r_dot = None
    if plus.R is not None and minus.R is not None:
        r_dot = (plus.R - minus.R) / (2 * step)
    return DirectionalScores(
        u=torch.where(masks.generated, change, 0.0).sum(1),
        u_counted=torch.where(masks.counted, change, 0.0).sum(1),
        r_dot=r_dot,
    )


def _by_backward(model: nn.Module, rollouts: Rollouts, direction: Direction, scoring: Scoring) -> DirectionalScores:
    n = len(rollouts)
    u, u_counted = (torch.zeros(n, dtype=torch.float64) for _ in range(2))
    r_dot = torch.zeros(n, dtype=torch.float64) if scoring.entropy else None
    scorer = Scorer(model, rollouts, replace(scoring, layout=None, max_sequences=1))
    parameters = [p for p in direction if p.requires_grad]
    with torch.enable_grad(), evaluation_mode(model), scorer.scope():
        for batch, stats in scorer.run():
            i = int(batch.sequences[0])
            rows, columns = scorer.target_of(batch)
            counted = scorer.masks.counted[rows, columns].to(stats.logprob.device)
            inside, outside = stats.logprob[counted].sum(), stats.logprob[~counted].sum()
            last = scoring.entropy is False
            u_counted[i] = _dot(inside, parameters, direction, keep=bool((~counted).any()) or not last)
            u[i] = u_counted[i]
            if (~counted).any():
                u[i] += _dot(outside, parameters, direction, keep=not last)
            if r_dot is not None:
                r_dot[i] = _dot(stats.entropy[counted].sum(), parameters, direction, keep=False)
    device = rollouts.tokens.device
    return DirectionalScores(u.to(device), u_counted.to(device), None if r_dot is None else r_dot.to(device))


def _dot(value: Tensor, parameters: list[nn.Parameter], direction: Direction, *, keep: bool) -> float:
    grads = torch.autograd.grad(value, parameters, retain_graph=keep, allow_unused=True)
    terms = [
        (g.flatten().double() @ direction[p].flatten().to(g.device, torch.float64)).cpu()
        for g, p in zip(grads, parameters, strict=True)
        if g is not None
    ]
    return float(torch.stack(terms).sum()) if terms else 0.0
