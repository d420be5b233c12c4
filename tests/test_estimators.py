"""The estimators against formulas written out naively, brute force, and exact truth; their edges and their errors."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from entropy_fast.errors import InputError
from entropy_fast.estimators import PairedScores, diagnose, entropy_change
from entropy_fast.estimators.enumerable import Policy, score
from entropy_fast.estimators.intervals import t_quantile
from entropy_fast.estimators.prompts import Prompts

WAYS = [
    {},
    {"method": "is"},
    {"method": "clip", "clip": 1.2},
    {"method": "psis"},
    {"estimator": "prefix"},
    {"control_variate": True},
]
UNITS = ["sequence", "per_token"]
INTEGRANDS = ["sampled", "rao_blackwell"]


def random_scores(seed: int, n: int = 90, columns: int = 9, prompts: int = 12, step: float = 0.3) -> PairedScores:
    """Scores of no real policy: groups of uneven size, lengths from 0 on, masks with holes, some tokens not counted."""
    g = torch.Generator().manual_seed(seed)
    generated = torch.rand(n, columns, generator=g) < 0.8
    generated[0] = False
    counted = generated & (torch.rand(n, columns, generator=g) < 0.9)
    lp0 = -torch.rand(n, columns, generator=g, dtype=torch.float64) * 3
    lp1 = (lp0 + step * torch.randn(n, columns, generator=g, dtype=torch.float64)).clamp(max=0)
    h0 = torch.rand(n, columns, generator=g, dtype=torch.float64) * 2
    h1 = (h0 + step * torch.randn(n, columns, generator=g, dtype=torch.float64)).clamp(min=0)
    index = torch.randint(prompts, (n,), generator=g) * 7 - 3  # any ids
    return PairedScores.from_tokens(lp0, lp1, h0, h1, generated, counted, index)


def naive(scores: PairedScores, unit: str, integrand: str, way: dict) -> float:
    """The formulas, one sequence at a time, in Python floats."""
    n = len(scores)
    s0, s1, r0, r1, ell, length, c = (
        x.tolist()
        for x in (
            scores.logprob0,
            scores.logprob1,
            scores.entropy0,
            scores.entropy1,
            scores.log_weight,
            scores.length,
            scores.prompt_index,
        )
    )
    a0, a1 = ([-x for x in s0], [-x for x in s1]) if integrand == "sampled" else (r0, r1)
    w = [math.exp(x) for x in ell]
    original = sum(a0) / n if unit == "sequence" else sum(a0) / sum(length)
    if way.get("method") == "clip":
        w = [min(x, way["clip"]) for x in w]
    if way.get("control_variate"):
        updated_a, updated_l = 0.0, 0.0
        for i in range(n):
            others = [j for j in range(n) if c[j] == c[i] and j != i] or [j for j in range(n) if j != i]
            b = sum(a0[j] for j in others) / len(others)
            b_length = sum(length[j] for j in others) / len(others)
            updated_a += a0[i] + (w[i] - 1) * (a1[i] - b) + (a1[i] - a0[i])
            updated_a += w[i] - 1 if integrand == "sampled" else 0.0
            updated_l += length[i] + (w[i] - 1) * (length[i] - b_length)
        return updated_a / n - original if unit == "sequence" else updated_a / updated_l - original
    numerator = sum(x * y for x, y in zip(w, a1, strict=True))
    if unit == "per_token":
        return numerator / sum(x * y for x, y in zip(w, length, strict=True)) - original
    return numerator / (n if way.get("method") == "is" else sum(w)) - original


def naive_prefix(scores: PairedScores, unit: str, integrand: str) -> float:
    tokens = scores.tokens
    inclusive_length = not scores.every_token_counts
    inclusive = integrand == "sampled" or inclusive_length
    rows = []
    for i in range(len(scores)):
        columns = tokens.generated[i].nonzero().flatten().tolist()
        rows.append(
            [
                (
                    float(tokens.logprob1[i, j] - tokens.logprob0[i, j]),
                    bool(tokens.counted[i, j]),
                    float(-tokens.logprob1[i, j] if integrand == "sampled" else tokens.entropy1[i, j]),
                )
                for j in columns
            ]
        )
    total, steps = 0.0, 0.0
    for t in range(max(map(len, rows))):
        sums = [0.0] * 4
        for row in rows:
            before = math.exp(sum(ratio for ratio, _, _ in row[:t]))
            through = math.exp(sum(ratio for ratio, _, _ in row[: t + 1]))
            w, v = through if inclusive else before, through if inclusive_length else before
            counts = t < len(row) and row[t][1]
            sums[0] += w * row[t][2] if counts else 0.0
            sums[1] += w
            sums[2] += v if counts else 0.0
            sums[3] += v
        total += sums[0] / sums[1]
        steps += sums[2] / sums[3]
    a0 = -scores.logprob0 if integrand == "sampled" else scores.entropy0
    if unit == "sequence":
        return total - float(a0.mean())
    return total / steps - float(a0.sum() / scores.length.sum())


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("integrand", INTEGRANDS)
@pytest.mark.parametrize("way", [way for way in WAYS if way.get("method") != "psis"], ids=str)
def test_value_is_the_formula(way, unit, integrand):
    for seed in range(3):
        scores = random_scores(seed)
        if way.get("estimator") == "prefix":
            expected = naive_prefix(scores, unit, integrand)
        else:
            expected = naive(scores, unit, integrand, way)
        estimate = entropy_change(scores, unit=unit, integrand=integrand, **way)
        assert estimate.value == pytest.approx(expected, abs=1e-11)
        assert estimate.updated - estimate.original == pytest.approx(estimate.value, abs=1e-11)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_parts_per_sequence(way, unit):
    scores = random_scores(5)
    estimate = entropy_change(scores, unit=unit, **way)
    assert float(estimate.contributions.sum()) == pytest.approx(estimate.value, abs=1e-12)
    assert float(estimate.influence.sum()) == pytest.approx(0.0, abs=1e-10)


def copies(scores: PairedScores, rows: torch.Tensor) -> PairedScores:
    tokens = dataclasses.replace(
        scores.tokens, **{f.name: getattr(scores.tokens, f.name)[rows] for f in dataclasses.fields(scores.tokens)}
    )
    fields = {f.name: getattr(scores, f.name)[rows] for f in dataclasses.fields(scores) if f.name != "tokens"}
    return PairedScores(**fields, tokens=tokens)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("integrand", INTEGRANDS)
@pytest.mark.parametrize(
    "way", [{}, {"method": "is"}, {"method": "clip", "clip": 1.2}, {"estimator": "prefix"}], ids=str
)
def test_influence_is_the_derivative_by_a_sequence_s_weight(way, unit, integrand):
    """One more copy of a sequence among many moves the estimate by ψ / n, up to 1/n²."""
    scores = random_scores(6, n=20)
    n, k = len(scores), 500
    estimate = entropy_change(scores, unit=unit, integrand=integrand, **way)
    many = torch.arange(n).repeat(k)
    for i in (1, 7, 19):
        more = entropy_change(
            copies(scores, torch.cat((many, torch.tensor([i])))), unit=unit, integrand=integrand, **way
        )
        moved = (more.value - estimate.value) * (n * k + 1)
        assert moved == pytest.approx(float(estimate.influence[i]), rel=0.01, abs=0.01)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("integrand", INTEGRANDS)
@pytest.mark.parametrize("way", [way for way in WAYS if way.get("method") != "psis"], ids=str)
def test_jackknife_is_leaving_each_prompt_out(way, unit, integrand):
    scores = random_scores(7)
    estimate = entropy_change(scores, unit=unit, integrand=integrand, **way)
    ids = scores.prompt_index.unique().tolist()
    without = torch.tensor(
        [
            entropy_change(
                copies(scores, (scores.prompt_index != c).nonzero().flatten()), unit=unit, integrand=integrand, **way
            ).value
            for c in ids
        ],
        dtype=torch.float64,
    )
    p = len(ids)
    assert estimate.jackknife == pytest.approx(float(p * estimate.value - (p - 1) * without.mean()), abs=1e-9)
    variance = float((p - 1) / p * (without - without.mean()).square().sum())
    assert estimate.jackknife_se == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_standard_errors_are_the_formulas():
    index = torch.tensor([4, 4, 9, 9, 9, 1, 1, 1, 1, 4])
    psi = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    psi -= psi.mean()
    random, fixed = Prompts(index).standard_errors(psi)
    groups = [psi[index == c] for c in (1, 4, 9)]
    assert random == pytest.approx(math.sqrt(3 / 2 * sum(float(g.sum()) ** 2 for g in groups)) / 10, rel=1e-12)
    within = sum(len(g) / (len(g) - 1) * float((g - g.mean()).square().sum()) for g in groups)
    assert fixed == pytest.approx(math.sqrt(within) / 10, rel=1e-12)


def test_standard_errors_that_the_data_cannot_give():
    psi = torch.tensor([0.5, -0.5, 0.25, -0.25], dtype=torch.float64)
    one_prompt = Prompts(torch.zeros(4, dtype=torch.int64)).standard_errors(psi)
    assert math.isnan(one_prompt.random_prompts)
    assert one_prompt.fixed_prompts > 0
    singles = Prompts(torch.arange(4)).standard_errors(psi)
    assert singles.random_prompts == pytest.approx(math.sqrt(4 / 3 * float(psi.square().sum())) / 4)
    assert math.isnan(singles.fixed_prompts)


def test_leave_one_out_never_looks_at_the_sequence_itself():
    index = torch.tensor([0, 0, 0, 1, 2, 2])
    x = torch.tensor([1.0, 2.0, 6.0, 5.0, 3.0, 4.0], dtype=torch.float64)
    expected = torch.tensor([4.0, 3.5, 1.5, 16 / 5, 4.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(Prompts(index).leave_one_out(x), expected)


@pytest.mark.parametrize("dof", [1, 2, 3, 7, 30, 31, 99, 1000, 1001, 5000])
def test_t_quantile_against_scipy(dof):
    from scipy.stats import t

    for probability in (0.5, 0.6, 0.9, 0.975, 0.995, 0.9999):
        assert t_quantile(probability, dof) == pytest.approx(t.ppf(probability, dof), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("integrand", INTEGRANDS)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.filterwarnings("ignore::entropy_fast.errors.EntropyFastWarning")  # equal weights have no tail to smooth
def test_equal_policies_give_exactly_zero(way, unit, integrand):
    tokens = random_scores(8).tokens
    scores = PairedScores.from_tokens(
        tokens.logprob0,
        tokens.logprob0.clone(),
        tokens.entropy0,
        tokens.entropy0.clone(),
        tokens.generated,
        tokens.counted,
        random_scores(8).prompt_index,
    )
    estimate = entropy_change(scores, unit=unit, integrand=integrand, **way)
    assert estimate.value == 0.0
    assert bool((estimate.contributions == 0).all())


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("way", [{}, {"method": "is"}, {"estimator": "prefix"}, {"control_variate": True}], ids=str)
def test_the_eos_out_of_the_integrand_stays_in_the_weight(way, unit):
    """include_eos: false converges to its own truth, because ℓ keeps the EOS (and `prefix` looks one token further)."""
    old, new = Policy(0.0), Policy(1.0)
    draws = old.sample(400, 64, torch.Generator().manual_seed(1))
    before, after = old.truth(include_eos=False), new.truth(include_eos=False)
    truth = after.entropy - before.entropy if unit == "sequence" else after.per_token - before.per_token
    estimate = entropy_change(score(draws, old, new, include_eos=False), unit=unit, **way)
    assert abs(estimate.value - truth) < 5 * estimate.se


def test_columns_do_not_matter_only_the_order_of_generation():
    scores = random_scores(9)
    tokens = scores.tokens
    pad = torch.full((len(scores), 5), 1e30, dtype=torch.float64)  # never looked at
    none = torch.zeros(len(scores), 5, dtype=torch.bool)

    def padded(x: torch.Tensor) -> torch.Tensor:
        filler = none if x.dtype == torch.bool else pad
        return torch.cat((filler, x, filler), dim=1)

    moved = PairedScores.from_tokens(
        *(padded(getattr(tokens, f.name)) for f in dataclasses.fields(tokens)), scores.prompt_index
    )
    for way in ({}, {"estimator": "prefix"}):
        assert entropy_change(moved, **way).value == pytest.approx(entropy_change(scores, **way).value, abs=1e-13)


def test_what_lies_outside_the_mask_is_never_read():
    scores = random_scores(10)
    tokens = scores.tokens
    poisoned = PairedScores.from_tokens(
        *(
            torch.where(tokens.generated, getattr(tokens, name), torch.nan)
            for name in ("logprob0", "logprob1", "entropy0", "entropy1")
        ),
        tokens.generated.to(torch.int64),  # 0 and 1 will do for a mask
        tokens.counted.to(torch.float32),
        scores.prompt_index,
    )
    for way in WAYS:
        assert entropy_change(poisoned, **way).value == entropy_change(scores, **way).value
    assert diagnose(poisoned).to_dict() == diagnose(scores).to_dict()


def test_blocks_of_sequences_are_summed_alike_and_named_right(monkeypatch):
    from entropy_fast.estimators import paired, prefix

    whole = random_scores(16)
    alone = entropy_change(whole, estimator="prefix", unit="per_token")
    monkeypatch.setattr(paired, "_BLOCK", 40)  # four sequences at a time
    monkeypatch.setattr(prefix, "_BLOCK", 200)  # two steps at a time
    parts = random_scores(16)
    together = entropy_change(parts, estimator="prefix", unit="per_token")
    assert together.value == pytest.approx(alone.value, abs=1e-13)
    assert together.jackknife == pytest.approx(alone.jackknife, abs=1e-12)
    torch.testing.assert_close(together.influence, alone.influence, atol=1e-12, rtol=0)
    for name in ("logprob0", "logprob1", "entropy0", "entropy1", "log_weight", "surprise0", "surprise1"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-13, rtol=0)
    row = int(MASK.any(dim=1).nonzero()[-1])
    lp = random_scores(0).tokens.logprob0.clone()
    lp[row] = math.nan
    with pytest.raises(InputError, match=f"sequence {row}, column"):
        PairedScores.from_tokens(**tokens_with(logprob0=lp))


def test_sum_of_differences_is_better_than_difference_of_sums():
    """float32 scores of a long sequence: ℓ from per-token differences keeps what subtracting float32 sums loses."""
    g = torch.Generator().manual_seed(0)
    lp0 = -3 * torch.rand(64, 4000, generator=g, dtype=torch.float64)
    lp1 = lp0 + 1e-4 * torch.randn(64, 4000, generator=g, dtype=torch.float64)
    lp1 = lp1.clamp(max=0)
    mask = torch.ones_like(lp0, dtype=torch.bool)
    exact = (lp1 - lp0).sum(dim=1)
    single0, single1 = lp0.float(), lp1.float()
    scores = PairedScores.from_tokens(single0, single1, None, None, mask, mask, torch.zeros(64, dtype=torch.int64))
    # each difference carries two roundings of at most 2^-24 · 3; the sums alone would add far more
    assert float((scores.log_weight - exact).abs().max()) < 4000 * 3 * 2**-23
    of_sums = (single1.sum(dim=1) - single0.sum(dim=1)).double()
    assert float((scores.log_weight - exact).square().mean()) < float((of_sums - exact).square().mean())


def test_weights_of_any_size():
    ell = torch.linspace(-1000.0, 1200.0, 50, dtype=torch.float64)
    s0 = torch.full((50,), -1300.0, dtype=torch.float64)
    scores = PairedScores.from_sequences(s0, s0 + ell, torch.full((50,), 40), torch.arange(50) % 10)
    estimate = entropy_change(scores)
    assert estimate.updated == pytest.approx(100.0, abs=1e-6)  # the one sequence that carries all the weight
    assert math.isinf(entropy_change(scores, method="is").value)
    diagnostics = diagnose(scores)
    assert diagnostics.ess == pytest.approx(1.0, abs=1e-6)
    assert math.isinf(diagnostics.mean_weight)
    tiny = PairedScores.from_sequences(s0, s0 - 1000, torch.full((50,), 40), torch.arange(50) % 10)
    assert diagnose(tiny).mean_weight == 0.0
    assert diagnose(tiny).mean_weight_z == -math.inf


@pytest.mark.parametrize("way", [way for way in WAYS if way.get("method") != "psis"], ids=str)
def test_a_sequence_that_the_update_made_impossible_has_no_weight(way):
    tokens = random_scores(11).tokens
    lp1 = tokens.logprob1.clone()
    row = 5
    column = int(tokens.generated[row].nonzero()[1])
    index = random_scores(11).prompt_index

    def change(value: float):
        lp1[row, column] = value
        scores = PairedScores.from_tokens(
            tokens.logprob0, lp1, tokens.entropy0, tokens.entropy1, tokens.generated, tokens.counted, index
        )
        return scores, entropy_change(scores, **way)

    scores, impossible = change(-math.inf)
    _, unlikely = change(-700.0)  # the weight is 1e-304: the limit
    assert impossible.value == pytest.approx(unlikely.value, abs=1e-9)
    assert bool(torch.isfinite(impossible.influence).all())
    diagnostics = diagnose(scores)
    assert diagnostics.impossible_share == pytest.approx(1 / len(scores))
    assert math.isinf(diagnostics.kl)


def test_clip_and_its_cut_mass():
    scores = random_scores(12)
    w = scores.log_weight.exp()
    clipped = entropy_change(scores, method="clip", clip=1.1)
    assert clipped.cut_mass == pytest.approx(float((w - 1.1).clamp(min=0).mean()), rel=1e-12)
    wide = entropy_change(scores, method="clip", clip=1e6)
    assert wide.value == pytest.approx(entropy_change(scores).value, abs=1e-13)
    assert wide.cut_mass == 0.0


def test_psis_is_self_normalised_with_smoothed_weights():
    from entropy_fast.psis import psislw

    scores = random_scores(13, n=400, step=0.8)
    smoothed, khat = psislw(scores.log_weight)
    estimate = entropy_change(scores, method="psis")
    assert estimate.updated == pytest.approx(float((smoothed.exp() * -scores.logprob1).sum()), abs=1e-11)
    assert estimate.khat == float(khat)


def test_results_in_all_forms():
    scores = random_scores(14)
    estimate = entropy_change(scores, unit="per_token")
    numbers = estimate.to_dict()
    for name in ("value", "original", "updated", "se", "se_fixed_prompts", "jackknife", "jackknife_se"):
        assert numbers["bits"][name] == pytest.approx(numbers[name] / math.log(2), rel=1e-15)
    half = estimate.interval[1] - estimate.value
    assert half == pytest.approx(t_quantile(0.975, estimate.n_prompts - 1) * estimate.se)
    assert json.loads(estimate.to_json()) == json.loads(json.dumps(numbers))
    alone = entropy_change(copies(scores, (scores.prompt_index == scores.prompt_index[0]).nonzero().flatten()))
    assert json.loads(alone.to_json())["se"] is None
    assert estimate.n_tokens == int(scores.length.sum())
    pandas = pytest.importorskip("pandas")
    frame = estimate.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == len(scores)
    assert frame["contributions"].sum() == pytest.approx(estimate.value, abs=1e-12)


def test_identity_of_the_entropy_change():
    old = Policy(0.0)
    scores = score(old.sample(16, 16, torch.Generator().manual_seed(0)), old, Policy(0.5))
    diagnostics = diagnose(scores)
    kl = float((-scores.log_weight).mean())
    assert diagnostics.covariance + kl == pytest.approx(entropy_change(scores).value, abs=1e-12)
    assert abs(diagnostics.identity_gap) < 1e-12
    weights = scores.log_weight.exp()
    assert diagnostics.ess == pytest.approx(float(weights.sum() ** 2 / weights.square().sum()), rel=1e-12)
    assert diagnostics.max_weight_share == pytest.approx(float(weights.max() / weights.sum()), rel=1e-12)
    assert diagnostics.mean_weight == pytest.approx(float(weights.mean()), rel=1e-12)
    z = float((weights.mean() - 1) / (weights.std() / len(scores) ** 0.5))
    assert diagnostics.mean_weight_z == pytest.approx(z, rel=1e-9)
    assert diagnostics.kl == pytest.approx(float((weights - 1 - scores.log_weight).mean()), rel=1e-9)
    assert json.loads(diagnostics.to_json())["ess_fraction"] == pytest.approx(diagnostics.ess / len(scores))


# Errors: what was given, what is needed, how to mend it ------------------------------------------------------------


def tokens_with(**changes):
    tokens = random_scores(0).tokens
    given = {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens)}
    return {**given, "prompt_index": random_scores(0).prompt_index, **changes}


MASK = random_scores(0).tokens.generated
SPOT = tuple(MASK.nonzero()[4].tolist())


def planted(name: str, value: float) -> torch.Tensor:
    x = getattr(random_scores(0).tokens, name).clone()
    x[SPOT] = value
    return x


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprob0": torch.zeros(3)}, "shape"),
        ({"logprob0": torch.zeros(0, 4)}, "a sequence at least"),
        ({"entropy1": torch.zeros(90, 8)}, "entropy1 must have logprob0's shape"),
        ({"counted": torch.ones(90, 9, dtype=torch.bool)}, "sequence 0 counts a token that it lacks"),
        ({"generated": torch.full((90, 9), 2)}, "bool mask"),
        ({"logprob1": planted("logprob1", math.nan)}, f"sequence {SPOT[0]}, column {SPOT[1]} has nan"),
        ({"logprob1": planted("logprob1", 2.5)}, "not a loss"),
        ({"entropy0": planted("entropy0", -1.0)}, "not negative"),
        ({"entropy1": planted("entropy1", math.inf)}, "finite"),
        ({"logprob0": planted("logprob0", -math.inf)}, "probability 0 under the original policy"),
        ({"prompt_index": torch.zeros(90)}, "integers"),
        ({"prompt_index": torch.zeros(5, dtype=torch.int64)}, "one a sequence"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_token_errors(changes, message):
    with pytest.raises(InputError, match=message):
        PairedScores.from_tokens(**tokens_with(**changes))


def test_sequence_errors():
    s, ones, index = -torch.ones(4), torch.ones(4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(InputError, match="flatten"):
        PairedScores.from_sequences(s.reshape(2, 2), s, ones, index)
    with pytest.raises(InputError, match="logprob1 must have shape"):
        PairedScores.from_sequences(s, s[:3], ones, index)
    with pytest.raises(InputError, match="at least length"):
        PairedScores.from_sequences(s, s, ones, index, generated_length=0 * ones)
    with pytest.raises(InputError, match="log_weight"):
        PairedScores.from_sequences(s, s, ones, index, log_weight=torch.full((4,), math.nan))
    with pytest.raises(InputError, match="probability 0"):
        PairedScores.from_sequences(torch.full((4,), -math.inf), s, ones, index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "token"}, "unit"),
        ({"integrand": "rb"}, "integrand"),
        ({"estimator": "prefixes"}, "estimator"),
        ({"method": "wis"}, "method"),
        ({"confidence": 95}, "confidence"),
        ({"method": "clip"}, "clip"),
        ({"clip": 3.0}, "clip"),
        ({"method": "clip", "clip": 0.0}, "above 0"),
        ({"estimator": "prefix", "method": "psis"}, "leave method out"),
        ({"control_variate": True, "method": "snis"}, "plain weights"),
        ({"control_variate": True, "estimator": "prefix"}, "plain weights"),
    ],
    ids=str,
)
def test_option_errors(options, message):
    with pytest.raises(InputError, match=message):
        entropy_change(random_scores(1), **options)


def test_errors_of_scores_that_lack_what_is_asked():
    full = random_scores(2)
    sums = PairedScores.from_sequences(
        full.logprob0, full.logprob1, full.length, full.prompt_index, log_weight=full.log_weight
    )
    with pytest.raises(InputError, match="entropies"):
        entropy_change(sums, integrand="rao_blackwell")
    with pytest.raises(InputError, match="from_tokens"):
        entropy_change(sums, estimator="prefix")
    with pytest.raises(InputError, match="has_eos"):
        diagnose(sums, has_eos=torch.ones(3, dtype=torch.bool))
    with pytest.raises(InputError, match="sampler_logprob"):
        diagnose(sums, sampler_logprob=torch.zeros(len(full), 4))
    empty = PairedScores.from_sequences(-torch.ones(3), -torch.ones(3), torch.zeros(3), torch.arange(3))
    for options in ({"unit": "per_token"},):
        with pytest.raises(InputError, match="no counted token"):
            entropy_change(empty, **options)
    dead = PairedScores.from_sequences(-torch.ones(3), torch.full((3,), -math.inf), torch.ones(3), torch.arange(3))
    with pytest.raises(InputError, match="impossible under the updated policy"):
        entropy_change(dead)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu_as_on_the_cpu():
    scores = random_scores(15)
    tokens = scores.tokens
    moved = PairedScores.from_tokens(
        *(getattr(tokens, f.name).cuda() for f in dataclasses.fields(tokens)), scores.prompt_index
    )
    for unit in UNITS:
        for way in WAYS:
            here, there = entropy_change(scores, unit=unit, **way), entropy_change(moved, unit=unit, **way)
            assert there.influence.is_cuda
            assert there.value == pytest.approx(here.value, abs=1e-12)
            assert there.se == pytest.approx(here.se, rel=1e-9)
            assert entropy_change(moved, unit=unit, **way).value == there.value  # the same bits each time
    assert diagnose(moved).ess == pytest.approx(diagnose(scores).ess, rel=1e-12)
