"""Scores along a direction: u = ∇S·v for every sequence, and the step of a real optimizer as the direction v."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from entropy_fast.estimators import FirstOrder, first_order
from entropy_fast.estimators.paired import Integrand
from entropy_fast.policies import moved
from entropy_fast.rollouts import Rollouts
from entropy_fast.scoring import Scorer, Scoring, evaluation_mode, score

Direction = Mapping[nn.Parameter, Tensor]
Method = Literal["backward", "difference"]


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
    method: Method = "backward",
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


@dataclass(frozen=True)
class DeltaH1:
    """δH₁ = ∇H·v in both units.

    Attributes:
        sequence: nats per sequence.
        per_token: nats per token.
        normalized: with length_normalize_deltah1, the change of E[−S/L]: `exact`, its gradient along v, and `proposal`,
            what differentiating the probe loss with S/L in the place of S gives. None without.
    """

    sequence: FirstOrder
    per_token: FirstOrder
    normalized: dict[str, FirstOrder] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers; `deltaH1` is the sequence form, or the proposal's normalised one where that was asked for."""
        main = self.sequence if self.normalized is None else self.normalized["proposal"]
        return {
            "deltaH1": main.value,
            "deltaH1_se": main.se,
            "deltaH1_bits": main.value / math.log(2),
            "sequence": self.sequence.to_dict(),
            "per_token": self.per_token.to_dict(),
            "length_normalized": self.normalized and {name: form.to_dict() for name, form in self.normalized.items()},
        }


def delta_h1(
    model: nn.Module,
    rollouts: Rollouts,
    direction: Direction,
    scoring: Scoring,
    *,
    integrand: Integrand = "sampled",
    length_normalize: bool = False,
    method: Method = "backward",
) -> DeltaH1:
    """First-order change of the entropy along v, at the model's present weights, from rollouts of its policy.

    Args:
        model: see `directional_scores`.
        rollouts: drawn from the model as it is.
        direction: v by parameter, the update vector of an optimizer's step, say.
        scoring: how to score.
        integrand: `sampled` or `rao_blackwell`; the latter adds the entropies' own derivatives.
        length_normalize: also give the two length-normalised forms (of the sampled integrand).
        method: see `directional_scores`.
    """
    by_entropy = integrand == "rao_blackwell"
    scores = score(model, rollouts, replace(scoring, entropy=by_entropy))
    along = directional_scores(model, rollouts, direction, scoring, method=method, entropy=by_entropy)
    a = scores.R if by_entropy else -scores.S
    assert a is not None
    whole = torch.equal(scores.masks.counted, scores.masks.generated)
    direct = along.r_dot if by_entropy else None if whole else -along.u_counted
    data = (along.u, a, scores.lengths.double(), rollouts.prompt_index)
    normalized = None
    if length_normalize:
        sampled = (along.u, -scores.S, *data[2:])
        normalized = {
            "exact": first_order(*sampled, length_normalize="exact", direct=None if whole else -along.u_counted),
            "proposal": first_order(*sampled, length_normalize="proposal"),
        }
    return DeltaH1(
        sequence=first_order(*data, direct=direct),
        per_token=first_order(*data, unit="per_token", direct=direct),
        normalized=normalized,
    )


def norm(direction: Direction) -> float:
    """The 2-norm of v over all parameters."""
    return sum(float(v.double().square().sum()) for v in direction.values()) ** 0.5


def _by_difference(
    model: nn.Module, rollouts: Rollouts, direction: Direction, scoring: Scoring, step: float | None
) -> DirectionalScores:
    if step is None:
        size, weights = norm(direction), norm({p: p.detach() for p in direction})
        step = 1e-3 * weights / size if size > 0 and weights > 0 else 1.0
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
