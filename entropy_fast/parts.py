"""What an optimizer's step is made of: momentum, weight decay and every sequence's own gradient, adding up to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from entropy_fast.direction import Direction, Method, directional_scores
from entropy_fast.errors import InputError
from entropy_fast.rollouts import Rollouts
from entropy_fast.scoring import Scorer, Scoring, evaluation_mode, score
from entropy_fast.update import TrainingLoss, accumulate_gradients, gradients


@dataclass(frozen=True)
class UpdateParts:
    """v = momentum + decay + gradient, by parameter, in float32 or wider.

    Attributes:
        momentum: what the optimizer's earlier moments contribute.
        decay: what weight decay contributes.
        gradient: what this batch's gradient contributes: −gain · g, elementwise.
        gain: the optimizer's gain at this step (the learning rate, over Adam's denominator, ...).
        coefficients: (N,) float64 c with g = Σ_i c_i ∇S_i over all emitted tokens, clipping included; so sequence i's
            part of v is −gain · c_i ∇S_i.
    """

    momentum: Direction
    decay: Direction
    gradient: Direction
    gain: Direction
    coefficients: Tensor

    def total(self) -> dict[nn.Parameter, Tensor]:
        """v itself."""
        return {p: self.momentum[p] + self.decay[p] + self.gradient[p] for p in self.gain}


def update_parts(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    scoring: Scoring,
    *,
    loss: TrainingLoss = "nll",
    max_grad_norm: float | None = None,
) -> UpdateParts:
    """Split the step that `optimizer` would take on these rollouts. Nothing is stepped, and nothing changes.

    Args:
        optimizer: a torch AdamW, Adam or SGD, with whatever state and groups it has.
        model, rollouts, scoring, loss, max_grad_norm: see `gradients`.

    Raises:
        InputError: another kind of optimizer.
    """
    split = _splitter(optimizer)
    momentum, decay, gradient, gain = ({} for _ in range(4))
    with gradients(model, optimizer, rollouts, scoring, loss=loss, max_grad_norm=max_grad_norm) as found:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    terms = split(p, group, optimizer.state.get(p, {}))
                    momentum[p], decay[p], gain[p] = terms
                    gradient[p] = -terms.gain * p.grad.to(terms.gain.dtype)
        # c is the same for every token of a sequence
        per_sequence = found.coefficients.sum(1) / (found.coefficients != 0).sum(1).clamp_min(1)
    return UpdateParts(momentum, decay, gradient, gain, per_sequence)


class Attribution(NamedTuple):
    """δH₁ = momentum + decay + Σ sequences, nats per sequence."""

    momentum: float
    decay: float
    sequences: Tensor
    """(N,) float64: what stepping on each sequence does to the entropy, to first order."""


def attribute(
    model: nn.Module, rollouts: Rollouts, parts: UpdateParts, scoring: Scoring, *, method: Method = "backward"
) -> Attribution:
    """How much of the first-order entropy change each part of the update causes.

    ∇H is estimated by the score form with the leave-one-out baseline of the prompt, once; the parts are its dot
    products, so they add up exactly. Sequence i's is −c_i (gain · ∇H)·∇S_i.

    Args:
        model: at the weights before the step.
        rollouts: drawn from it; those that the step is taken on.
        parts: from `update_parts`.
        scoring: how to score.
        method: see `directional_scores`.
    """
    slope = _entropy_gradient(model, rollouts, scoring)

    def along(direction: Direction) -> float:
        return sum(float((slope[p].double() * direction[p].double()).sum()) for p in slope)

    pull = {p: -parts.gain[p] * slope[p].to(parts.gain[p].dtype) for p in slope}
    u = directional_scores(model, rollouts, pull, scoring, method=method).u
    return Attribution(along(parts.momentum), along(parts.decay), parts.coefficients * u)


def _entropy_gradient(model: nn.Module, rollouts: Rollouts, scoring: Scoring) -> dict[nn.Parameter, Tensor]:
    """The score-form estimate of ∇H, E[(A − b) ∇S] with A = −S; `.grad` is left as it was."""
    scores = score(model, rollouts, replace(scoring, entropy=False))
    a = -scores.S
    prompts, group = torch.unique(rollouts.prompt_index, return_inverse=True)
    sums = a.new_zeros(len(prompts)).index_add(0, group, a)
    others = (torch.bincount(group)[group] - 1).clamp_min(1)
    centred = a - (sums[group] - a) / others
    if bool((scores.masks.generated & ~scores.masks.counted).any()):
        raise InputError("the attribution is of entropies that count every token; set entropy.include_eos: true")
    coefficients = centred[:, None] * scores.masks.generated / len(rollouts)
    kept = {p: p.grad for p in model.parameters()}
    try:
        for p in kept:
            p.grad = None
        with evaluation_mode(model):
            accumulate_gradients(Scorer(model, rollouts, replace(scoring, layout=None, entropy=False)), coefficients)
        return {p: p.grad for p in kept if p.grad is not None}
    finally:
        for p, grad in kept.items():
            p.grad = grad


class _Terms(NamedTuple):
    momentum: Tensor
    decay: Tensor
    gain: Tensor


def _splitter(optimizer: torch.optim.Optimizer) -> Any:
    if isinstance(optimizer, (torch.optim.AdamW, torch.optim.Adam)):
        decoupled = isinstance(optimizer, torch.optim.AdamW)
        return lambda p, group, state: _adam(p, group, state, group.get("decoupled_weight_decay", decoupled))
    if isinstance(optimizer, torch.optim.SGD):
        return _sgd
    raise InputError(
        f"the parts of a {type(optimizer).__name__} step are not known; AdamW, Adam and SGD are. The whole step of any "
        "optimizer can still be measured (compute_entropy_change, sweep)"
    )


def _adam(p: nn.Parameter, group: Mapping[str, Any], state: Mapping[str, Any], decoupled: bool) -> _Terms:
    """Kingma & Ba 2015; decoupled decay as in Loshchilov & Hutter 2019. One step on from `state`."""
    wide = torch.promote_types(p.dtype, torch.float32)
    beta1, beta2 = map(float, group["betas"])
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    sign = -1.0 if group.get("maximize") else 1.0
    weights, grad = p.detach().to(wide), sign * p.grad.to(wide)  # type: ignore[union-attr]
    step = float(state["step"]) + 1 if "step" in state else 1.0
    m = state["exp_avg"].to(wide) if "exp_avg" in state else torch.zeros_like(weights)
    v = state["exp_avg_sq"].to(wide) if "exp_avg_sq" in state else torch.zeros_like(weights)
    total = grad if decoupled else grad + weight_decay * weights
    v = beta2 * v + (1 - beta2) * total * total
    if group.get("amsgrad"):
        v = torch.maximum(v, state["max_exp_avg_sq"].to(wide)) if "max_exp_avg_sq" in state else v
    denominator = (v / (1 - beta2**step)).sqrt() + float(group["eps"])
    scale = lr / (1 - beta1**step) / denominator
    decay = -lr * weight_decay * weights if decoupled else -scale * (1 - beta1) * weight_decay * weights
    return _Terms(-scale * beta1 * m, decay, sign * scale * (1 - beta1))


def _sgd(p: nn.Parameter, group: Mapping[str, Any], state: Mapping[str, Any]) -> _Terms:
    """Stochastic gradient descent with momentum, dampening and Nesterov's form, as torch defines them."""
    wide = torch.promote_types(p.dtype, torch.float32)
    lr, mu, dampening = float(group["lr"]), float(group["momentum"]), float(group["dampening"])
    sign = -1.0 if group.get("maximize") else 1.0
    weights = p.detach().to(wide)
    buffer = state.get("momentum_buffer")
    gain = torch.full_like(weights, lr)
    momentum = torch.zeros_like(weights)
    if mu:
        fresh = 1.0 if buffer is None else 1.0 - dampening
        gain = gain * (1 + mu * fresh if group["nesterov"] else fresh)
        if buffer is not None:
            momentum = -lr * (mu * mu if group["nesterov"] else mu) * buffer.to(wide)
    return _Terms(momentum, -gain * float(group["weight_decay"]) * weights, sign * gain)
