"""The parts of a step add up to what the optimizer does, and their first-order effects add up to δH₁."""

import pytest
import torch
from test_probe import batch, draw, enumerable, exact_entropy, random_direction, sums
from tiny_models import tiny

from entropy_fast import ImportanceSampler, InputError, Rollouts
from entropy_fast.config import Config
from entropy_fast.direction import delta_h1
from entropy_fast.parts import attribute, update_parts
from entropy_fast.rollouts import Counting
from entropy_fast.scoring import Scoring
from entropy_fast.sweep import sweep
from entropy_fast.update import one_step

SCORING = Scoring(Counting())

OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.1),
    "adamw_amsgrad": lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.1, amsgrad=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-3, weight_decay=0.1),
    "adamw_groups": lambda ps: torch.optim.AdamW(
        [{"params": ps[:3], "lr": 1e-2}, {"params": ps[3:], "weight_decay": 0.0}], lr=1e-3, betas=(0.8, 0.9)
    ),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "sgd_momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "sgd_nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
}


def running(name, steps):
    model = tiny("gpt2", dtype=torch.float64, spread=2.0)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for seed in range(steps):
        optimizer.zero_grad()
        (-sums(model, batch(seed + 10)).sum() / 40).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("loss", ["nll", "rl"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.01])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_parts_sum_to_the_step(name, steps, max_grad_norm, loss):
    model, optimizer = running(name, steps)
    rollouts = Rollouts.from_batch(batch())
    parts = update_parts(model, optimizer, rollouts, SCORING, loss=loss, max_grad_norm=max_grad_norm)
    with one_step(model, optimizer, rollouts, SCORING, loss=loss, max_grad_norm=max_grad_norm) as (_, snapshot):
        v = snapshot.difference()
    total = parts.total()
    size = max(float(d.abs().max()) for d in v.values())
    for p in v:
        rounding = 4 * 2.0**-52 * float(p.detach().abs().max())  # v is a difference of weights
        # and where coupled decay nearly cancels the gradient, parts are far larger than their sum
        found = total.get(p, torch.zeros_like(v[p]))
        torch.testing.assert_close(found, v[p], rtol=0, atol=1e-9 * size + rounding)
    if steps == 0:
        assert all(bool((m == 0).all()) for m in parts.momentum.values())


@pytest.mark.parametrize("loss", ["nll", "rl"])
def test_the_gradient_is_the_sum_over_sequences(loss):
    model, optimizer = running("adamw", 2)
    data = batch()
    parts = update_parts(model, optimizer, Rollouts.from_batch(data), SCORING, loss=loss, max_grad_norm=0.5)
    S = sums(model, data).flatten()
    grads = torch.autograd.grad((parts.coefficients * S).sum(), list(parts.gain))
    for p, g in zip(parts.gain, grads, strict=True):
        torch.testing.assert_close(parts.gradient[p], -parts.gain[p] * g, rtol=1e-8, atol=1e-14)


def test_attributed_effects_add_up_to_delta_h1():
    model, optimizer = running("adamw", 2)
    rollouts = Rollouts.from_batch(batch())
    parts = update_parts(model, optimizer, rollouts, SCORING)
    found = attribute(model, rollouts, parts, SCORING)
    whole = delta_h1(model, rollouts, parts.total(), SCORING).sequence.value
    assert float(found.momentum + found.decay + found.sequences.sum()) == pytest.approx(whole, rel=1e-8)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_sampler_offers_the_attribution():
    model, optimizer = running("sgd_momentum", 1)
    found = ImportanceSampler(model).attribute(batch(), optimizer)
    assert found.sequences.shape == (12,)
    assert found.momentum != 0


def test_an_optimizer_whose_parts_are_unknown_is_refused():
    model = tiny("gpt2")
    with pytest.raises(InputError, match="parts of a Adagrad step are not known"):
        update_parts(model, torch.optim.Adagrad(model.parameters()), Rollouts.from_batch(batch()), SCORING)


def test_a_sweep_is_linear_for_small_steps_and_its_slope_is_delta_h1():
    model, optimizer = running("sgd", 0)
    rollouts, other = Rollouts.from_batch(batch()), Rollouts.from_batch(batch(3))
    with one_step(model, optimizer, other, SCORING) as (_, snapshot):
        v = snapshot.difference()
    before = [p.clone() for p in model.parameters()]
    # small against the curvature, so that the fit's residual is of second order
    result = sweep(model, rollouts, v, [-1e-3, 1e-3, 2e-3], predict="backward")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    slope = delta_h1(model, rollouts, v, SCORING)
    assert result.fit["sequence"].linear_r2 > 0.99
    assert result.predicted.sequence.value == pytest.approx(slope.sequence.value)
    for change, eta in zip(result.changes, result.etas, strict=True):
        assert change.headline.original == result.changes[0].headline.original
        assert change.headline.value == pytest.approx(result.fit["sequence"].predict(eta), rel=1e-3)
    with pytest.raises(InputError, match="two or more different steps"):
        sweep(model, rollouts, v, [0, 1.0])


def test_the_samplers_sweep_measures_the_optimizers_own_step_at_one():
    model, optimizer = running("adamw", 1)
    sampler = ImportanceSampler(model)
    swept = sampler.sweep(batch(), optimizer, etas=(0.5, 1.0), U_batch=batch(3))
    stepped = sampler.entropy_change_two_batch(model, batch(), batch(3), optimizer)
    assert swept.changes[1].headline.value == pytest.approx(stepped["deltaH_true"], abs=1e-9)
    assert swept.to_dict()["etas"] == [0.5, 1.0]


def test_the_sweep_of_an_enumerable_policy_starts_along_the_exact_derivative():
    """On a policy whose sequences are all listed, ΔH(η)/η tends to ∇H·v."""
    model, prompts = enumerable()
    v = random_direction(model, seed=4)
    grads = torch.autograd.grad(exact_entropy(model, prompts), list(model.parameters()))
    exact = float(sum((g * v[p]).sum() for g, p in zip(grads, model.parameters(), strict=True)))
    rollouts = draw(model, prompts, g=400, seed=0)

    config = Config.from_dict({"entropy": {"integrand": "rao_blackwell"}})
    result = sweep(model, rollouts, v, [-1e-2, 1e-2], config)
    error = result.predicted.sequence.se_fixed_prompts
    assert abs(result.fit["sequence"].initial_slope - exact) < 4 * error + 0.01 * abs(exact)
