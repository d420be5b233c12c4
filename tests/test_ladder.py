"""The ladder of truth, on a policy whose every sequence is listed: exact identities first, statistics last.

Rung 5 (PSIS against its peer) is test_psis.py, rung 6 (ranks) test_estimators_ranks.py, rung 7 (mistakes) is
test_estimators_mistakes.py.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch

from entropy_fast.estimators import PairedScores, entropy_change, first_order
from entropy_fast.estimators.enumerable import N_PROMPTS, Policy, list_sequences, logits, score, token_scores

REFERENCE = json.loads((Path(__file__).parent / "data" / "ladder_reference.json").read_text())
ETAS = [0.0001, 0.001, 0.01, 0.1, 0.3, 1.0]


@cache
def policy(eta: float) -> Policy:
    return Policy(eta)


@cache
def directions() -> tuple[torch.Tensor, torch.Tensor]:
    """u = dS/dη and Ṙ = dR/dη of every sequence at η = 0, [4, N], by forward differentiation."""

    def sums(eta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprob, entropy = token_scores(logits(eta))
        return logprob.sum(dim=-1), entropy.sum(dim=-1)

    zero = torch.zeros((), dtype=torch.float64)
    _, (u, r_dot) = torch.func.jvp(sums, (zero,), (torch.ones_like(zero),))
    return u, r_dot


def expectation(probability: torch.Tensor, x: torch.Tensor) -> float:
    return float((probability * x).sum() / N_PROMPTS)


# Rung 1: exact identities, to 1e-12 --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record", [REFERENCE["base"], *REFERENCE["updated"]], ids=lambda record: f"eta={record['eta']}"
)
def test_the_model_is_the_one_of_the_reference(record):
    model = policy(record["eta"])
    truth = model.truth()
    assert len(list_sequences().tokens) == REFERENCE["n_seq"]
    assert truth.entropy == pytest.approx(record["H"], abs=1e-12)
    assert truth.by_prompt == pytest.approx(tuple(record["H_by_prompt"]), abs=1e-12)
    assert truth.mean_length == pytest.approx(record["mean_len"], abs=1e-12)
    assert truth.per_token == pytest.approx(record["per_token"], abs=1e-12)
    assert truth.truncated == pytest.approx(record["p_truncated"], abs=1e-12)
    if "dH" in record:
        base = policy(0.0)
        ell = (model.logprob - base.logprob).sum(dim=-1)
        chi2 = expectation(base.probability, ell.exp().square()) - 1
        assert truth.entropy - base.truth().entropy == pytest.approx(record["dH"], abs=1e-12)
        assert truth.per_token - base.truth().per_token == pytest.approx(record["d_per_token"], abs=1e-12)
        assert expectation(base.probability, -ell) == pytest.approx(record["kl_seq"], abs=1e-12)
        assert chi2 == pytest.approx(record["chi2"], abs=1e-12)
        assert 1 / (1 + chi2) == pytest.approx(record["ess_frac_limit"], abs=1e-12)


@pytest.mark.parametrize("eta", ETAS)
def test_exact_identities(eta):
    old, new = policy(0.0), policy(eta)
    p = old.probability
    s1, r1 = new.logprob.sum(dim=-1), new.entropy.sum(dim=-1)
    ell = s1 - old.logprob.sum(dim=-1)
    w = ell.exp()
    h0, h1 = old.truth().entropy, new.truth().entropy
    torch.testing.assert_close(p.sum(dim=1), torch.ones(N_PROMPTS, dtype=torch.float64), atol=1e-12, rtol=0)
    assert expectation(p, w) == pytest.approx(1.0, abs=1e-12)
    assert expectation(p * w, r1) == pytest.approx(h1, abs=1e-12)  # H = E[Σ_t H_t]
    covariance = expectation(p, w * -s1) - expectation(p, w) * expectation(p, -s1)
    assert covariance + expectation(p, -ell) == pytest.approx(h1 - h0, abs=1e-12)  # ΔH = Cov(w, −S1) + KL
    # the prefix form: every step weighted by the ratio of what came before it
    step_ratio = (new.logprob - old.logprob).cumsum(dim=-1)
    before = torch.cat((torch.zeros_like(step_ratio[..., :1]), step_ratio[..., :-1]), dim=-1)
    assert expectation(p, (before.exp() * new.entropy).sum(dim=-1)) == pytest.approx(h1, abs=1e-12)


def test_score_form_of_the_derivative():
    old = policy(0.0)
    p, s0, r0 = old.probability, old.logprob.sum(dim=-1), old.entropy.sum(dim=-1)
    u, r_dot = directions()
    known = REFERENCE["directional_derivative"]
    assert expectation(p, u) == pytest.approx(0.0, abs=1e-12)
    assert expectation(p, u * -s0) == pytest.approx(known["score_form"], abs=1e-9)  # stored to 1e-10
    assert expectation(p, u * r0) + expectation(p, r_dot) == pytest.approx(known["dH"], abs=1e-9)
    length = list_sequences().generated.sum(dim=-1).to(torch.float64)
    h, mean_length = old.truth().per_token, old.truth().mean_length
    per_token = expectation(p, u * (-s0 - h * length)) / mean_length
    assert per_token == pytest.approx(known["d_per_token"], abs=1e-9)
    # the trap: along fixed sequences the states do not shift
    assert expectation(p, r_dot) != pytest.approx(known["dH"], abs=0.1)
    # the other trap: with S/L there is a +1
    step = 1e-4
    normalized = [expectation(m.probability, -m.logprob.sum(dim=-1) / length) for m in (Policy(step), Policy(-step))]
    central = (normalized[0] - normalized[1]) / (2 * step)
    assert -expectation(p, u * (s0 + 1) / length) == pytest.approx(central, abs=1e-7)
    assert -expectation(p, u * s0 / length) != pytest.approx(central, abs=1e-3)


# Rung 2: on one batch there is no sampling error between an estimator and its derivative ---------------------------


@pytest.fixture(scope="module")
def batch():
    return policy(0.0).sample(16, 32, torch.Generator().manual_seed(11))


@pytest.mark.parametrize("unit", ["sequence", "per_token"])
@pytest.mark.parametrize("integrand", ["sampled", "rao_blackwell"])
def test_slope_of_the_estimate_is_the_first_order_change(batch, unit, integrand):
    old, step = policy(0.0), 1e-3
    u, r_dot = (x[batch.kind, batch.sequence] for x in directions())
    same = score(batch, old, old)
    sampled = integrand == "sampled"
    predicted = first_order(
        u,
        -same.logprob0 if sampled else same.entropy0,
        same.length,
        batch.prompt_index,
        unit=unit,
        direct=-u if sampled else r_dot,
        baseline="mean",
    ).value

    def delta(eta: float) -> float:
        return entropy_change(score(batch, old, Policy(eta)), unit=unit, integrand=integrand).value

    # fourth-order central difference: error O(step⁴)
    slope = (8 * (delta(step) - delta(-step)) - (delta(2 * step) - delta(-2 * step))) / (12 * step)
    assert slope == pytest.approx(predicted, abs=1e-9)


# Rung 3: linear response -------------------------------------------------------------------------------------------


def test_error_of_the_first_order_change_is_proportional_to_the_step():
    base, slope = policy(0.0).truth(), REFERENCE["directional_derivative"]["dH"]
    errors = {eta: abs((policy(eta).truth().entropy - base.entropy) / eta - slope) for eta in (0.001, 0.01, 0.1)}
    assert errors[0.01] / errors[0.001] == pytest.approx(10.0, rel=0.05)
    assert errors[0.1] / errors[0.01] == pytest.approx(10.0, rel=0.15)  # the next order is a tenth of this one here


# Rung 4: Monte Carlo -----------------------------------------------------------------------------------------------

PROMPTS, PER_PROMPT, REPLICATES = 32, 32, 400
WAYS = {
    "snis": {},
    "is": {"method": "is"},
    "psis": {"method": "psis"},
    "prefix": {"estimator": "prefix"},
    "control variate": {"control_variate": True},
}


@cache
def replicates(eta: float) -> list[PairedScores]:
    generator = torch.Generator().manual_seed(round(1000 * eta) + 1)
    draws = policy(0.0).sample(PROMPTS * REPLICATES, PER_PROMPT, generator)
    size = PROMPTS * PER_PROMPT
    return [score(draws.keep(slice(i * size, (i + 1) * size)), policy(0.0), policy(eta)) for i in range(REPLICATES)]


@pytest.mark.parametrize("integrand", ["sampled", "rao_blackwell"])
@pytest.mark.parametrize("unit", ["sequence", "per_token"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("eta", [0.01, 0.3, 1.0])
def test_bias_coverage_and_standard_error(eta, way, unit, integrand):
    old, new = policy(0.0).truth(), policy(eta).truth()
    truth = new.entropy - old.entropy if unit == "sequence" else new.per_token - old.per_token
    estimates = [entropy_change(scores, unit=unit, integrand=integrand, **WAYS[way]) for scores in replicates(eta)]
    values = torch.tensor([estimate.value for estimate in estimates], dtype=torch.float64)
    spread = float(values.std())
    assert abs(float(values.mean()) - truth) < 5 * spread / math.sqrt(REPLICATES)
    covered = sum(estimate.interval[0] <= truth <= estimate.interval[1] for estimate in estimates) / REPLICATES
    assert 0.90 <= covered <= 0.98
    mean_variance = sum(estimate.se**2 for estimate in estimates) / REPLICATES
    assert 0.85 <= math.sqrt(mean_variance) / spread <= 1.15


def test_sequences_of_a_prompt_are_not_independent():
    """What clustering is for: treating them as independent covers far too rarely."""
    truth = policy(0.3).truth().entropy - policy(0.0).truth().entropy
    covered = 0
    for scores in replicates(0.3):
        alone = PairedScores.from_sequences(
            scores.logprob0, scores.logprob1, scores.length, torch.arange(len(scores)), log_weight=scores.log_weight
        )
        low, high = entropy_change(alone).interval
        covered += low <= truth <= high
    assert covered / REPLICATES < 0.88


def test_fixed_prompt_error_covers_the_truth_of_those_prompts():
    generator = torch.Generator().manual_seed(5)
    old, new = policy(0.0), policy(0.3)
    difference = torch.tensor(new.truth().by_prompt) - torch.tensor(old.truth().by_prompt)
    z = []
    for _ in range(REPLICATES):
        draws = old.sample(8, 64, generator)
        truth = float(difference[draws.kind].mean())
        estimate = entropy_change(score(draws, old, new), method="is")
        z.append((estimate.value - truth) / estimate.se_fixed_prompts)
    assert 0.85 <= float(torch.tensor(z).std()) <= 1.15
    assert abs(float(torch.tensor(z).mean())) < 5 / math.sqrt(REPLICATES)


def test_pairing_and_prefix_weights_pay():
    """Both policies on the same sequences: the error of the difference is far below that of either."""
    scores = replicates(0.01)
    paired = torch.tensor([entropy_change(s).value for s in scores]).std()
    alone = torch.tensor([entropy_change(s).updated for s in scores]).std()
    assert float(paired) < 0.05 * float(alone)
    large = replicates(1.0)
    snis = sum(entropy_change(s, integrand="rao_blackwell").se_fixed_prompts for s in large)
    prefix = sum(entropy_change(s, integrand="rao_blackwell", estimator="prefix").se_fixed_prompts for s in large)
    assert prefix < 0.9 * snis
