"""Differentiable sums, probe losses and δH₁, against autograd, finite differences and exact enumeration."""

import copy
import itertools

import pytest
import torch
from tiny_models import tiny

from entropy_fast import InputError, ProbeComponents, Rollouts
from entropy_fast.change import measure_change
from entropy_fast.config import Config
from entropy_fast.direction import directional_scores, norm
from entropy_fast.policies import moved
from entropy_fast.rollouts import Counting
from entropy_fast.scoring import Scoring, score
from entropy_fast.update import one_step

B, G, P, T = 3, 4, 2, 8


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    masks = torch.ones(B, G, T)
    masks[0, 1, 5:] = 0
    masks[2, 0, P:] = 0  # an empty completion
    return {
        "sequences": torch.randint(3, 100, (B, G, T), generator=g),
        "prompt_lens": torch.full((B,), P),
        "attention_masks": masks,
        "advantages": torch.randn(B, G, generator=g),
        "max_lengths": torch.tensor([6, 7, 8]),
    }


def sums(model, data):
    """S (B, G) from the model's own logits, differentiable."""
    tokens, mask = data["sequences"].reshape(-1, T), data["attention_masks"].reshape(-1, T).long()
    logp = model(input_ids=tokens, attention_mask=mask).logits.log_softmax(-1)[:, :-1]
    picked = logp.gather(2, tokens[:, 1:, None])[..., 0]
    keep = mask[:, 1:].bool() & (torch.arange(1, T) >= P)
    return picked.where(keep, 0.0).sum(1).reshape(B, G)


@pytest.fixture
def model():
    return tiny("gpt2", dtype=torch.float64, spread=2.0)  # LayerNorm in float64; RMSNorm rounds to float32


@pytest.mark.parametrize("size", [None, 1, 5])
def test_sums_are_differentiable_and_complete(model, size):
    data = batch()
    probe = ProbeComponents(model, {"memory_config": {"teacher_force_microbatch_size": size}})
    result = probe._teacher_force_logprobs(data)
    assert set(result) == {"S", "L", "sequences", "advantages", "max_lengths", "attention_masks"}
    assert result["L"].tolist() == data["attention_masks"][:, :, P:].sum(2).int().tolist()
    weights = torch.randn(B, G, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = sums(model, data)
    torch.testing.assert_close(result["S"], expected, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad((result["S"] * weights).sum(), list(model.parameters()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("normalize", [False, True])
def test_probe_losses_are_the_proposals(model, normalize):
    data = batch()
    probe = ProbeComponents(model, {"entropy": {"length_normalize_deltah1": normalize}})
    result = probe._teacher_force_logprobs(data)
    S, L = sums(model, data).tolist(), result["L"].tolist()
    if normalize:
        S = [[s / max(n, 1) for s, n in zip(row, lengths, strict=True)] for row, lengths in zip(S, L, strict=True)]
    X = sum((row[g] - (sum(row) - row[g]) / (G - 1)) * row[g] for row in S for g in range(G)) / (B * G)
    A, limits = data["advantages"].tolist(), data["max_lengths"].tolist()
    Y = sum(A[b][g] / limits[b] * S[b][g] for b in range(B) for g in range(G)) / (B * G)
    assert float(probe._build_probe_loss_X_from_S(result)) == pytest.approx(X, rel=1e-10)
    assert float(probe._build_probe_loss_Y_from_S(result)) == pytest.approx(Y, rel=1e-9)


def test_the_gradient_of_loss_x_is_the_score_form(model):
    """The factor in front is held fixed: differentiating it as well would double the gradient."""
    data, probe = batch(), ProbeComponents(model)
    loss = probe._build_probe_loss_X_from_S(probe._teacher_force_logprobs(data))
    S = sums(model, data)
    fixed = S.detach()
    coefficient = (fixed - (fixed.sum(1, keepdim=True) - fixed) / (G - 1)) / (B * G)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    theirs = torch.autograd.grad((coefficient * S).sum(), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_loss_y_needs_advantages(model):
    data = batch()
    del data["advantages"]
    probe = ProbeComponents(model)
    with pytest.raises(InputError, match="needs advantages"):
        probe._build_probe_loss_Y_from_S(probe._teacher_force_logprobs(data))


def random_direction(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {p: torch.randn(p.shape, generator=g, dtype=torch.float64) * 1e-2 for p in model.parameters()}


@pytest.mark.parametrize("include_eos", [True, False])
def test_directional_scores_agree_with_finite_differences(model, include_eos):
    rollouts, v = Rollouts.from_batch(batch()), random_direction(model)
    eos = int(rollouts.tokens[1, 4])  # some token that was generated
    scoring = Scoring(Counting((eos,), include_eos=include_eos))
    exact = directional_scores(model, rollouts, v, scoring, entropy=True)
    near = directional_scores(model, rollouts, v, scoring, method="difference", entropy=True, step=1e-4)
    for name in ("u", "u_counted", "r_dot"):
        a, b = getattr(exact, name), getattr(near, name)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(a.abs().max()))  # O(ε²) and 1e-16 S/ε
    assert torch.equal(exact.u, exact.u_counted) == include_eos
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("integrand", ["sampled", "rao_blackwell"])
def test_the_score_form_is_the_slope_of_the_measured_change(model, integrand):
    """Same batch, no sampling error: d ΔĤ/dη at 0 is mean(u (A − Ā)) − mean(u), or mean(u (R − R̄)) + mean(Ṙ)."""
    rollouts, v = Rollouts.from_batch(batch()), random_direction(model)
    scoring = Scoring(Counting())
    config = Config.from_dict({"entropy": {"integrand": integrand}})
    original = score(model, rollouts, scoring)

    def change(eta):
        with moved(v, eta):
            return measure_change(rollouts, original, score(model, rollouts, scoring), config).headline.value

    along = directional_scores(model, rollouts, v, scoring, entropy=True)
    A = -original.S if integrand == "sampled" else original.R
    direct = -along.u if integrand == "sampled" else along.r_dot
    slope = (along.u * (A - A.mean())).mean() + direct.mean()
    eta = 1e-4
    assert (change(eta) - change(-eta)) / (2 * eta) == pytest.approx(float(slope), rel=1e-5)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, **options)


def test_the_update_vector_is_what_the_optimizer_does(model):
    rollouts, optimizer = Rollouts.from_batch(batch()), adamw(model)
    for _ in range(2):  # moments and bias correction of an optimizer that has been running
        optimizer.zero_grad()
        (-sums(model, batch(5)).sum() / 40).backward()
        optimizer.step()
    before = copy.deepcopy(model)
    with one_step(model, optimizer, rollouts, Scoring(Counting())) as (_, snapshot):
        v = snapshot.difference()
        after = {name: p.clone() for name, p in model.named_parameters()}
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p + v[p], after[name], rtol=0, atol=1e-15)
        assert torch.equal(p, q)


def enumerable(seed=0):
    """Four tokens, three positions, two prompts: every one of 64 sequences can be listed."""
    return tiny("gpt2", seed=seed, dtype=torch.float64, spread=1.0, vocab_size=4), [[1, 2], [3]]


def exact_entropy(model, prompts, length=3):
    total = 0.0
    for prompt in prompts:
        continuations = torch.tensor(list(itertools.product(range(4), repeat=length)))
        ids = torch.cat([torch.tensor(prompt).expand(len(continuations), -1), continuations], 1)
        logp = model(input_ids=ids).logits.log_softmax(-1)[:, len(prompt) - 1 : -1]
        S = logp.gather(2, continuations[..., None])[..., 0].sum(1)
        total = total - (S.exp() * S).sum() / len(prompts)
    return total


def draw(model, prompts, g, seed, length=3):
    torch.manual_seed(seed)
    lists = [[], [], []]
    for k, prompt in enumerate(prompts):
        ids = torch.tensor(prompt).expand(g, -1)
        for _ in range(length):
            with torch.no_grad():
                p = model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1)], 1)
        lists[0] += [prompt] * g
        lists[1] += ids[:, len(prompt) :].tolist()
        lists[2] += [k] * g
    return Rollouts.from_lists(*lists)


@pytest.mark.parametrize("integrand", ["sampled", "rao_blackwell"])
def test_delta_h1_agrees_with_the_exact_derivative_within_its_error(integrand):
    from entropy_fast.direction import delta_h1

    model, prompts = enumerable()
    v = random_direction(model, seed=4)
    grads = torch.autograd.grad(exact_entropy(model, prompts), list(model.parameters()))
    exact = float(sum((g * v[p]).sum() for g, p in zip(grads, model.parameters(), strict=True)))
    rollouts = draw(model, prompts, g=400, seed=1)
    result = delta_h1(model, rollouts, v, Scoring(Counting()), integrand=integrand, method="difference").sequence
    assert abs(result.value - exact) < 4 * result.se_fixed_prompts
    assert result.se_fixed_prompts < abs(exact)  # or the line above would say nothing


def test_compute_delta_h1_predicts_the_measured_change_for_a_small_step():
    """δH₁ against ΔH of the step itself, by enumeration; the step leaves no trace."""
    model, prompts = enumerable()
    rollouts = draw(model, prompts, g=300, seed=2)
    data = {
        "sequences": torch.nn.functional.pad(rollouts.tokens, (0, 0)).reshape(2, 300, -1)[:1],
        "prompt_lens": torch.tensor([2]),
        "attention_masks": torch.ones(1, 300, 5),
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    probe = ProbeComponents(model, {"entropy": {"integrand": "rao_blackwell"}})
    before = [p.clone() for p in model.parameters()]
    result = probe.compute_delta_h1(data, optimizer, method="difference")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    start = float(exact_entropy(model, prompts[:1]))
    with one_step(model, optimizer, Rollouts.from_batch(data), Scoring(Counting())) as (_, snapshot):
        truth = float(exact_entropy(model, prompts[:1])) - start
        assert result["update"]["step_norm"] == pytest.approx(norm(snapshot.difference()))
    assert abs(result["deltaH1"] - truth) < 4 * result["sequence"]["se_fixed_prompts"] + 0.05 * abs(truth)


def test_backward_and_difference_give_the_same_delta_h1(model):
    data = batch()
    by = {
        method: ProbeComponents(model, {"entropy": {"length_normalize_deltah1": True}}).compute_delta_h1(
            data, adamw(model), method=method
        )
        for method in ("backward", "difference")
    }
    assert by["backward"]["deltaH1"] == pytest.approx(by["difference"]["deltaH1"], rel=1e-4)
    assert by["backward"]["length_normalized"]["exact"]["value"] == pytest.approx(
        by["difference"]["length_normalized"]["exact"]["value"], rel=1e-4
    )
