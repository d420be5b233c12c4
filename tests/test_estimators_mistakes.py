"""Rung 7 of the ladder: each mistake that people make, made on purpose, is seen, and sound data are not accused."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

from entropy_fast.estimators import Diagnostics, PairedScores, Verdict, diagnose, entropy_change, judge
from entropy_fast.estimators.enumerable import Draws, Policy, list_sequences, score

SHAPE = (32, 32)
SEEDS = range(5)
ETAS = [0.02, 0.3, 1.0]


@cache
def policy(eta: float = 0.0, temperature: float = 1.0, top_p: float | None = None) -> Policy:
    return Policy(eta, temperature=temperature, top_p=top_p)


def draw(sampler: Policy, seed: int) -> Draws:
    return sampler.sample(*SHAPE, torch.Generator().manual_seed(seed))


def check(scores: PairedScores, **facts) -> tuple[Diagnostics, Verdict]:
    diagnostics = diagnose(scores, **facts)
    return diagnostics, judge(entropy_change(scores), diagnostics)


def without_entropies(scores: PairedScores) -> PairedScores:
    return dataclasses.replace(scores, entropy0=None, entropy1=None, surprise0=None, surprise1=None)


@pytest.mark.parametrize("eta", ETAS)
def test_sound_data_are_believed(eta):
    statuses = []
    for seed in range(40):
        draws = draw(policy(), seed)
        scores = score(draws, policy(), policy(eta), include_eos=seed % 2 == 0)
        sampler = policy().logprob[draws.kind, draws.sequence]
        _, verdict = check(scores, has_eos=draws.has_eos, sampler_logprob=sampler)
        assert verdict.believable, verdict
        statuses.append(verdict.status)
    # |z| ≥ 3 of three tests happens by chance in 1 data set of 120; at η = 1, ESS/n is half, give or take
    if eta < 1:
        assert statuses.count("believable") >= 36


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("eta", ETAS)
class TestEachMistake:
    def test_eos_left_out_of_the_weight(self, eta, seed):
        draws = draw(policy(), seed)
        rows = (draws.kind, draws.sequence)
        old, new = policy(), policy(eta)
        no_eos = list_sequences().counted(include_eos=False)[draws.sequence]
        scores = PairedScores.from_tokens(
            old.logprob[rows],
            new.logprob[rows],
            old.entropy[rows],
            new.entropy[rows],
            no_eos,
            no_eos,
            draws.prompt_index,
        )
        _, verdict = check(scores, has_eos=draws.has_eos)
        assert "surprise" in verdict.codes
        assert not verdict.believable
        # and the way to leave it out of the integrand alone is sound
        right = score(draws, old, new, include_eos=False)
        assert check(right, has_eos=draws.has_eos)[1].believable

    def test_truncated_sequences_dropped(self, eta, seed):
        draws = draw(policy(), seed)
        scores = score(draws.keep(draws.has_eos), policy(), policy(eta))
        _, verdict = check(scores, has_eos=torch.ones(len(scores), dtype=torch.bool))
        assert {"surprise", "endings"} <= verdict.codes
        assert not verdict.believable
        # without entropies the endings alone tell
        _, blind = check(without_entropies(scores), has_eos=torch.ones(len(scores), dtype=torch.bool))
        assert "endings" in blind.codes
        assert not blind.believable

    @pytest.mark.parametrize(("temperature", "top_p"), [(0.7, None), (1.0, 0.9)])
    def test_sampled_from_another_distribution_than_scored(self, eta, seed, temperature, top_p):
        sampler = policy(0.0, temperature, top_p)
        draws = draw(sampler, seed)
        scores = score(draws, policy(), policy(eta))
        diagnostics, verdict = check(scores, has_eos=draws.has_eos)
        assert "surprise" in verdict.codes
        assert diagnostics.surprise > 0
        assert not verdict.believable
        # the sampler's own log-probs tell without entropies
        reported = sampler.logprob[draws.kind, draws.sequence]
        for sampler_logprob in (reported, reported.sum(dim=1)):
            _, told = check(without_entropies(scores), has_eos=draws.has_eos, sampler_logprob=sampler_logprob)
            assert "sampler" in told.codes
            assert not told.believable

    def test_scored_at_the_temperature_that_was_sampled(self, eta, seed):
        draws = draw(policy(0.0, 0.7), seed)
        scores = score(draws, policy(0.0, 0.7), policy(eta, 0.7))
        reported = policy(0.0, 0.7).logprob[draws.kind, draws.sequence]
        assert check(scores, has_eos=draws.has_eos, sampler_logprob=reported)[1].believable

    def test_length_th_root_as_a_weight(self, eta, seed):
        scores = score(draw(policy(), seed), policy(), policy(eta))
        rooted = PairedScores.from_sequences(
            scores.logprob0,
            scores.logprob1,
            scores.length,
            scores.prompt_index,
            log_weight=scores.log_weight / scores.length,
        )
        _, verdict = check(rooted)
        assert "log_weight" in verdict.codes
        assert not verdict.believable

    def test_tokens_weighted_each_by_its_own_ratio(self, eta, seed):
        scores = score(draw(policy(), seed), policy(), policy(eta))
        tokens = scores.tokens
        mask = tokens.generated
        prompts = scores.prompt_index[:, None].expand_as(mask)[mask]
        flat = PairedScores.from_sequences(
            tokens.logprob0[mask], tokens.logprob1[mask], torch.ones(int(mask.sum())), prompts
        )
        _, verdict = check(flat)
        assert "single_tokens" in verdict.codes


def test_the_mistakes_do_move_the_estimate():
    """What the table in docs/statistics.md says, in expectation, so that the tests above are about real harm."""
    listing, old, new = list_sequences(), policy(), policy(0.3)
    exact = new.truth().entropy - old.truth().entropy

    def limit(probability, logprob0, logprob1, log_weight):
        """What the self-normalised estimate converges to under the sampling distribution."""
        p = probability / probability.sum()
        w = log_weight.exp()
        return float((p * w * -logprob1).sum() / (p * w).sum() + (p * logprob0).sum())

    s0, s1 = old.logprob.sum(dim=-1), new.logprob.sum(dim=-1)
    body = listing.counted(include_eos=False)
    b0, b1 = (old.logprob * body).sum(dim=-1), (new.logprob * body).sum(dim=-1)
    length = listing.generated.sum(dim=-1)
    assert limit(old.probability, s0, s1, s1 - s0) == pytest.approx(exact, abs=1e-12)
    wrong = {
        "eos left out": limit(old.probability, b0, b1, b1 - b0),
        "truncated dropped": limit(old.probability * listing.has_eos, s0, s1, s1 - s0),
        "temperature": limit(policy(0.0, 0.7).probability, s0, s1, s1 - s0),
        "top-p": limit(policy(0.0, 1.0, 0.9).probability, s0, s1, s1 - s0),
        "root": limit(old.probability, s0, s1, (s1 - s0) / length),
    }
    # the least harm here is 7%, by dropping the truncated
    assert all(abs(value - exact) > 0.05 * abs(exact) for value in wrong.values()), (exact, wrong)


def test_a_large_update_is_not_believed():
    scores = score(draw(policy(), 0), policy(), policy(8.0))
    _, verdict = check(scores)
    assert not verdict.believable
    assert {"ess_fraction", "max_weight_share"} & verdict.codes


def test_a_change_below_the_noise_floor_is_not_believed():
    scores = score(draw(policy(), 0), policy(), policy(1e-6))
    estimate, diagnostics = entropy_change(scores), diagnose(scores)
    assert judge(estimate, diagnostics).believable
    assert judge(estimate, diagnostics, noise_floor=abs(estimate.value) / 2).believable
    assert judge(estimate, diagnostics, noise_floor=2 * abs(estimate.value)).codes == {"noise_floor"}


def test_an_unchanged_policy_is_exactly_zero_and_believed():
    scores = score(draw(policy(), 0), policy(), policy())
    for noise_floor in (None, 0.0, 1e-3):
        verdict = judge(entropy_change(scores), diagnose(scores), noise_floor=noise_floor)
        assert verdict.status == "believable"
        assert "unchanged" in {finding.code for finding in verdict.findings}


def test_an_update_fitted_to_the_same_sequences_is_no_mistake_of_sampling():
    """A step towards its own evaluation data lifts their weights; that is said, and is not taken for a mistake."""
    scores = score(draw(policy(), 0), policy(), policy(0.02))
    fitted = dataclasses.replace(
        scores, log_weight=scores.log_weight + 0.02, logprob1=scores.logprob1 + 0.02, surprise1=scores.surprise1 + 0.5
    )
    estimate, diagnostics = entropy_change(fitted), diagnose(fitted)
    assert judge(estimate, diagnostics).codes >= {"mean_weight", "updated_surprise"}
    assert judge(estimate, diagnostics, in_sample=True).codes == {"in_sample"}
    sound = judge(entropy_change(scores), diagnose(scores), in_sample=True)
    assert sound.status == "believable"
    assert "in_sample" in {finding.code for finding in sound.findings}


def test_few_sequences_and_few_prompts_ask_for_caution():
    small = policy().sample(1, 12, torch.Generator().manual_seed(0))
    _, verdict = check(score(small, policy(), policy(0.02)))
    assert verdict.status == "caution"
    assert {"one_prompt", "khat", "ess"} <= verdict.codes
    few = policy().sample(4, 64, torch.Generator().manual_seed(0))
    assert "few_prompts" in check(score(few, policy(), policy(0.02)))[1].codes


def test_clipping_away_much_weight_is_told():
    scores = score(draw(policy(), 0), policy(), policy(1.0))
    estimate = entropy_change(scores, method="clip", clip=1.0)
    weights = scores.log_weight.exp()
    assert estimate.cut_mass == pytest.approx(float((weights - 1).clamp(min=0).mean()), abs=1e-12)
    assert "cut_mass" in judge(estimate, diagnose(scores)).codes


def test_a_verdict_reads_well():
    scores = score(draw(policy(0.0, 0.7), 0), policy(), policy(0.3))
    _, verdict = check(scores)
    assert [finding.severity for finding in verdict.findings] == sorted(
        (finding.severity for finding in verdict.findings), key=["fail", "caution", "note"].index
    )
    assert str(verdict).startswith("not believable\n  fail: ")
    assert verdict.reasons == [finding["message"] for finding in verdict.to_dict()["findings"]]
    assert verdict.to_dict()["believable"] is False
