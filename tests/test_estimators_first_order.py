"""δH₁ against the exact derivative of the enumerable policy, by all its sequences and by samples."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch

from entropy_fast.errors import InputError
from entropy_fast.estimators import first_order
from entropy_fast.estimators.enumerable import N_PROMPTS, Draws, Policy, list_sequences, logits, token_scores

EXACT = json.loads((Path(__file__).parent / "data" / "ladder_reference.json").read_text())["directional_derivative"]


@cache
def original() -> Policy:
    return Policy(0.0)


@cache
def token_directions() -> tuple[torch.Tensor, torch.Tensor]:
    """d(log p)/dη and d(entropy)/dη of each token at η = 0, [4, N, 6]."""
    zero = torch.zeros((), dtype=torch.float64)
    return torch.func.jvp(lambda eta: token_scores(logits(eta)), (zero,), (torch.ones_like(zero),))[1]


class Batch:
    def __init__(self, draws: Draws, *, include_eos: bool = True):
        rows, counted = (draws.kind, draws.sequence), list_sequences().counted(include_eos=include_eos)[draws.sequence]
        lp_dot, h_dot = (x[rows] for x in token_directions())
        self.u = lp_dot.sum(dim=1)
        self.u_counted = (lp_dot * counted).sum(dim=1)
        self.r_dot = (h_dot * counted).sum(dim=1)
        self.s = (original().logprob[rows] * counted).sum(dim=1)
        self.r = (original().entropy[rows] * counted).sum(dim=1)
        self.length = counted.sum(dim=1)
        self.prompt_index = draws.prompt_index


def derivative(statistic) -> float:
    """Central difference, fourth order, of an exact functional of the policy at η."""
    h = 1e-3
    f = [statistic(Policy(eta)) for eta in (h, -h, 2 * h, -2 * h)]
    return (8 * (f[0] - f[1]) - (f[2] - f[3])) / (12 * h)


def mean_length_normalized(policy: Policy, *, include_eos: bool) -> float:
    counted = list_sequences().counted(include_eos=include_eos)
    s = (policy.logprob * counted).sum(dim=-1)
    return float((policy.probability * -s / counted.sum(dim=-1).clamp(min=1)).sum() / N_PROMPTS)


FORMS = {
    "sequence": (lambda b: {"a": -b.s}, lambda: EXACT["dH"]),
    "sequence, no baseline": (lambda b: {"a": -b.s, "baseline": "none"}, lambda: EXACT["dH"]),
    "sequence, rao_blackwell": (lambda b: {"a": b.r, "direct": b.r_dot}, lambda: EXACT["dH"]),
    "per_token": (lambda b: {"a": -b.s, "unit": "per_token"}, lambda: EXACT["d_per_token"]),
    "per_token, rao_blackwell": (
        lambda b: {"a": b.r, "direct": b.r_dot, "unit": "per_token"},
        lambda: EXACT["d_per_token"],
    ),
    "S/L, exact": (
        lambda b: {"a": -b.s, "length_normalize": "exact"},
        lambda: derivative(lambda policy: mean_length_normalized(policy, include_eos=True)),
    ),
}
FORMS_WITHOUT_EOS = {
    "sequence": (
        lambda b: {"a": -b.s, "direct": -b.u_counted},
        lambda: derivative(lambda policy: policy.truth(include_eos=False).entropy),
    ),
    "per_token": (
        lambda b: {"a": -b.s, "direct": -b.u_counted, "unit": "per_token"},
        lambda: derivative(lambda policy: policy.truth(include_eos=False).per_token),
    ),
    "S/L, exact": (
        lambda b: {"a": -b.s, "direct": -b.u_counted, "length_normalize": "exact"},
        lambda: derivative(lambda policy: mean_length_normalized(policy, include_eos=False)),
    ),
}
REPLICATES = 200


@pytest.mark.parametrize(
    ("form", "include_eos"),
    [(form, True) for form in FORMS] + [(form, False) for form in FORMS_WITHOUT_EOS],
)
def test_every_form_is_unbiased_and_knows_its_error(form, include_eos):
    options, truth = (FORMS if include_eos else FORMS_WITHOUT_EOS)[form]
    exact = truth()
    draws = original().sample(32 * REPLICATES, 16, torch.Generator().manual_seed(2))
    estimates = []
    for i in range(REPLICATES):
        batch = Batch(draws.keep(slice(i * 512, (i + 1) * 512)), include_eos=include_eos)
        given = options(batch)
        estimates.append(first_order(batch.u, given.pop("a"), batch.length, batch.prompt_index, **given))
    values = torch.tensor([estimate.value for estimate in estimates], dtype=torch.float64)
    spread = float(values.std())
    assert abs(float(values.mean()) - exact) < 5 * spread / math.sqrt(REPLICATES)
    covered = sum(e.interval[0] <= exact <= e.interval[1] for e in estimates) / REPLICATES
    assert 0.89 <= covered <= 0.99
    se = math.sqrt(sum(e.se**2 for e in estimates) / REPLICATES)
    assert 0.85 <= se / spread <= 1.15


@pytest.fixture
def batch() -> Batch:
    return Batch(original().sample(20, 8, torch.Generator().manual_seed(4)))


def test_a_baseline_lowers_the_error(batch):
    errors = {
        kind: first_order(batch.u, -batch.s, batch.length, batch.prompt_index, baseline=kind).se_fixed_prompts
        for kind in ("leave_one_out", "none")
    }
    assert errors["leave_one_out"] < errors["none"]


def test_agreement_with_the_formula_of_one_prompt_at_a_time(batch):
    u, a, index = batch.u.tolist(), (-batch.s).tolist(), batch.prompt_index.tolist()
    total = 0.0
    for i in range(len(u)):
        others = [a[j] for j in range(len(u)) if index[j] == index[i] and j != i]
        total += u[i] * (a[i] - sum(others) / len(others))
    estimate = first_order(batch.u, -batch.s, batch.length, batch.prompt_index)
    assert estimate.value == pytest.approx(total / len(u), abs=1e-12)


def test_the_proposal_s_form_is_the_slope_of_its_probe_loss(batch):
    """X = mean((S' − leave-one-out mean) S') with S' = S / L: its gradient along v, the bracket held fixed, is −δH₁."""
    groups = (20, 8)
    normalized = (batch.s / batch.length).reshape(groups)
    bracket = normalized - (normalized.sum(dim=1, keepdim=True) - normalized) / 7
    slope = float((bracket * (batch.u / batch.length).reshape(groups)).mean())
    proposal = first_order(batch.u, -batch.s, batch.length, batch.prompt_index, length_normalize="proposal")
    assert proposal.value == pytest.approx(-slope, abs=1e-12)
    exact = first_order(batch.u, -batch.s, batch.length, batch.prompt_index, length_normalize="exact")
    assert abs(exact.value - proposal.value) > 1e-3  # they are different things


@pytest.mark.parametrize("unit", ["sequence", "per_token"])
@pytest.mark.parametrize("baseline", ["mean", "none"])
def test_influence_is_the_derivative_by_a_sequence_s_weight(batch, unit, baseline):
    n, k = len(batch.u), 400
    options = {"unit": unit, "baseline": baseline}
    estimate = first_order(batch.u, -batch.s, batch.length, batch.prompt_index, **options)
    assert float(estimate.influence.sum()) == pytest.approx(0.0, abs=1e-9)
    for i in (0, 33, 159):
        rows = torch.cat((torch.arange(n).repeat(k), torch.tensor([i])))
        more = first_order(batch.u[rows], -batch.s[rows], batch.length[rows], batch.prompt_index[rows], **options)
        moved = (more.value - estimate.value) * (n * k + 1)
        assert moved == pytest.approx(float(estimate.influence[i]), rel=0.01, abs=0.01)


def test_result_forms(batch):
    estimate = first_order(batch.u, -batch.s, batch.length, batch.prompt_index)
    numbers = json.loads(json.dumps(estimate.to_dict()))
    assert numbers["bits"]["value"] == pytest.approx(estimate.value / math.log(2))
    assert numbers["n_prompts"] == 20
    assert "influence" not in numbers


def test_errors(batch):
    def call(**changes):
        given = {"u": batch.u, "a": -batch.s, "length": batch.length, "prompt_index": batch.prompt_index, **changes}
        return first_order(**given)

    with pytest.raises(InputError, match="a must have shape"):
        call(a=torch.zeros(3))
    with pytest.raises(InputError, match="sequence 2 is not"):
        call(u=batch.u.index_fill(0, torch.tensor(2), math.nan))
    with pytest.raises(InputError, match="unit"):
        call(unit="token")
    with pytest.raises(InputError, match="leave unit out"):
        call(unit="per_token", length_normalize="exact")
    with pytest.raises(InputError, match="no direct part"):
        call(length_normalize="proposal", direct=-batch.u)
    with pytest.raises(InputError, match="length_normalize"):
        call(length_normalize="yes")
    with pytest.raises(InputError, match="baseline"):
        call(baseline="median")
    with pytest.raises(InputError, match="no counted token"):
        call(unit="per_token", length=torch.zeros_like(batch.length))
