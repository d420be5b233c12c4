"""What the scores say about themselves: are the weights tame, and were the sequences drawn from π0 at all?

Two kinds of facts. The weights of a large update are heavy-tailed: ESS, the largest share, k̂ see that. And scores that
are not log-probs under the distribution that sampled make every estimate converge to a wrong number, with a small
error bar: mean weight, surprise, the sampler's own log-probs, the endings see that.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entropy_fast.collective import ALONE, Collective
from entropy_fast.errors import EntropyFastWarning, InputError
from entropy_fast.estimators.change import without_nan
from entropy_fast.estimators.paired import Integrand, PairedScores
from entropy_fast.psis import khat_threshold, psislw


@dataclass(frozen=True)
class SamplerGap:
    """How far π0's log-probs are from those that the sampler itself reported, over the generated tokens."""

    kl_per_token: float
    """mean(sampler − π0), an estimate of KL(sampler ‖ π0) in nats per token; 0 for the same distribution."""
    z: float
    """Of that mean."""
    mean_abs: float
    """Mean |difference|: per token where the sampler gave tokens, else per sequence divided by its length."""
    ess_fraction: float
    """ESS/n of the weights that would carry the sequences from the sampler to π0."""


@dataclass(frozen=True)
class Endings:
    """Whether sequences that hit the length limit are missing: how likely it is that none was cut off."""

    longest: int
    """Generated tokens of the longest sequences."""
    n_longest: int
    log10_probability: float
    """That all of them end with an EOS exactly there, by π0's own probabilities."""


@dataclass(frozen=True)
class Diagnostics:
    """Facts about a set of paired scores; `judge` turns them into a verdict. Entropies and KL in nats."""

    n_sequences: int
    n_prompts: int
    n_tokens: int
    """Generated tokens."""
    ess: float
    """Effective sample size (Σw)² / Σw², from the raw weights."""
    max_weight_share: float
    """Largest weight over the sum of all."""
    mean_weight: float
    """mean(w); 1 in expectation if the sequences were drawn from π0."""
    mean_weight_z: float
    impossible_share: float
    """Share of sequences that are impossible under π1 (weight exactly 0)."""
    kl: float
    """KL(π0 ‖ π1) per sequence, mean(w − 1 − ℓ)."""
    kl_per_token: float
    khat: float
    """k̂ of the weights; inf where no tail can be fitted."""
    khat_integrand: float
    """k̂ of |w·A1|."""
    khat_threshold: float
    """Good below this: min(1 − 1/log10 n, 0.7)."""
    surprise: float | None
    """mean Σ(log p + H) under π0; 0 in expectation if the tokens were drawn from π0. None without entropies."""
    surprise_z: float | None
    updated_surprise_z: float | None
    """The same under π1 with weights w: sees a weight that does not carry π0 to π1."""
    log_weight_mismatch: float
    """Share of sequences, of those whose tokens all count, with ℓ different from S1 − S0 beyond rounding."""
    truncated_share: float | None
    """Share of sequences without an EOS; None when not told."""
    empty_share: float
    """Share of sequences without a counted token."""
    single_token_share: float
    """Share of sequences with exactly one generated token."""
    covariance: float
    """Cov(ŵ, A1): the part of ΔH that comes from where the updated policy goes. ΔH = Cov(w, −S1) + KL(π0 ‖ π1)."""
    identity_gap: float
    """SNIS ΔH − Cov(ŵ, A1) − mean(−ℓ); 0 up to rounding for the sampled integrand over every token, else NaN."""
    endings: Endings | None
    sampler: SamplerGap | None

    @property
    def ess_fraction(self) -> float:
        """ESS / n; about exp(−2·KL) for a small step."""
        return self.ess / self.n_sequences

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, nested."""
        return {**dataclasses.asdict(self), "ess_fraction": self.ess_fraction}

    def to_json(self, **options: Any) -> str:
        """`to_dict` as JSON; what is unknown (NaN) reads null. Options go to json.dumps."""
        return json.dumps(without_nan(self.to_dict()), **options)


def diagnose(
    paired: PairedScores,
    *,
    integrand: Integrand = "sampled",
    has_eos: Tensor | None = None,
    sampler_logprob: Tensor | None = None,
    collective: Collective = ALONE,
) -> Diagnostics:
    """Compute the diagnostics of a set of paired scores.

    Args:
        paired: the scores.
        integrand: the A whose tail is looked at.
        has_eos: [N] bool, whether each sequence ended by itself (False: cut off at the length limit).
        sampler_logprob: the log-probs that the sampler reported, [N, T] in the columns of `from_tokens`, or [N] sums
            over the generated tokens.
        collective: the ranks over which the sequences are spread.

    Raises:
        InputError: shapes that do not match.
    """
    n_local = len(paired)
    log_weight = paired.log_weight
    a0, a1 = paired.integrand(integrand)
    total = _Totals(paired.log_weight.new_tensor(float(n_local)), collective)
    n = total.n
    ended = None if has_eos is None else _flags(has_eos, log_weight)

    largest = collective.max(log_weight.max())
    w = (log_weight - largest).exp()
    w_sum, w_squares = total.sum(w), total.sum(w.square())
    # 1 on the scale of w; clamped where exp would overflow, with every true weight below 1e-300 anyway
    one = float((-largest).clamp(max=700.0).exp())
    generated = total.sum(paired.generated_length)
    kl = total.mean(torch.expm1(log_weight) - log_weight)
    w_hat = w * (n / w_sum)
    covariance = total.mean((w_hat - 1) * a1)
    whole = paired.length == paired.generated_length
    sampled_whole = integrand == "sampled" and total.mean(whole.to(w)) == 1.0
    # SNIS's own ΔH less its two parts, in the order that rounds least
    gap = total.mean((w_hat * a1 - a0) - (w_hat - 1) * a1 + log_weight) if sampled_whole else math.nan

    surprise, surprise_z, updated_z = None, None, None
    if paired.surprise0 is not None:
        surprise, surprise_z = total.mean_and_z(paired.surprise0)
    if paired.surprise1 is not None:
        updated_z = total.mean_and_z(torch.where(w > 0, w * paired.surprise1, 0.0))[1]

    return Diagnostics(
        n_sequences=n,
        n_prompts=_count_prompts(paired.prompt_index, collective),
        n_tokens=int(generated),
        ess=w_sum**2 / w_squares,
        max_weight_share=1.0 / w_sum,
        mean_weight=w_sum / n * float(largest.exp()),
        mean_weight_z=total.mean_and_z(w, one)[1],
        impossible_share=total.mean((log_weight == -torch.inf).to(w)),
        kl=kl,
        kl_per_token=kl * n / generated if generated else math.nan,
        khat=_khat(log_weight, collective),
        khat_integrand=_khat(log_weight + a1.abs().log(), collective),
        khat_threshold=khat_threshold(n),
        surprise=surprise,
        surprise_z=surprise_z,
        updated_surprise_z=updated_z,
        log_weight_mismatch=_mismatch(paired, whole, total),
        truncated_share=None if ended is None else total.mean((~ended).to(w)),
        empty_share=total.mean((paired.length == 0).to(w)),
        single_token_share=total.mean((paired.generated_length == 1).to(w)),
        covariance=covariance,
        identity_gap=gap,
        endings=None if ended is None else _endings(paired, ended, collective),
        sampler=None if sampler_logprob is None else _sampler_gap(paired, sampler_logprob, total),
    )


class _Totals:
    """Sums, means and z-scores over the sequences of all ranks."""

    def __init__(self, n_local: Tensor, collective: Collective):
        self._collective = collective
        self.n = int(collective.sum(n_local))

    def sum(self, x: Tensor) -> float:
        return float(self._collective.sum(x.sum()))

    def max(self, x: Tensor) -> Tensor:
        return self._collective.max(x.max())

    def mean(self, x: Tensor) -> float:
        return self.sum(x) / self.n

    def mean_and_z(self, x: Tensor, expected: float = 0.0) -> tuple[float, float]:
        """The mean of x, and its distance from the expectation in standard errors.

        The expectation holds for each prompt, not on average only, so sequences count as independent here.
        """
        mean = self.mean(x)
        if mean == expected or self.n < 2:
            return mean, 0.0
        se = math.sqrt(self.sum((x - mean).square()) / (self.n * (self.n - 1)))
        return mean, (mean - expected) / se if se > 0 else math.copysign(math.inf, mean - expected)


def _count_prompts(index: Tensor, collective: Collective) -> int:
    if collective is ALONE:
        return int(torch.unique(index).numel())
    parts, _ = collective.gather(torch.unique(index))
    return int(torch.unique(torch.cat(parts)).numel())


def _khat(log_weight: Tensor, collective: Collective) -> float:
    if not bool(collective.max(log_weight.max()) > -torch.inf):
        return math.inf
    with warnings.catch_warnings():  # an unfit tail is told by the value inf, and `judge` words it
        warnings.simplefilter("ignore", EntropyFastWarning)
        return float(psislw(log_weight, collective=collective)[1])


def _mismatch(paired: PairedScores, whole: Tensor, total: _Totals) -> float:
    difference = paired.logprob1 - paired.logprob0
    finite = torch.isfinite(difference) & torch.isfinite(paired.log_weight)
    # float32 sums of S; a mistake in ℓ is far larger
    tolerance = 1e-3 + 1e-5 * paired.logprob0.abs()
    wrong = whole & finite & ((paired.log_weight - difference).abs() > tolerance)
    considered = total.sum(whole.to(torch.float64))
    return total.sum(wrong.to(torch.float64)) / considered if considered else 0.0


def _endings(paired: PairedScores, has_eos: Tensor, collective: Collective) -> Endings | None:
    """None unless every sequence ended by itself and the last tokens are known."""
    any_cut = collective.max((~has_eos).any().to(torch.float64))
    if bool(any_cut > 0) or paired.tokens is None:
        return None
    longest = collective.max(paired.generated_length.max())
    rows = ((paired.generated_length == longest) & (longest > 0)).nonzero().flatten()
    generated = paired.tokens.generated[rows]
    columns = torch.arange(generated.shape[1], device=generated.device)
    last = torch.where(generated, columns, -1).max(dim=1).values.clamp(min=0)
    log_p = paired.tokens.logprob0[rows, last].to(torch.float64)
    count = collective.sum(log_p.new_tensor(float(rows.numel())))
    log10 = collective.sum(log_p.sum()) / math.log(10)
    return Endings(longest=int(longest), n_longest=int(count), log10_probability=float(log10))


def _sampler_gap(paired: PairedScores, sampler_logprob: Tensor, total: _Totals) -> SamplerGap:
    n = len(paired)
    reported = sampler_logprob.detach().to(device=paired.logprob0.device, dtype=torch.float64)
    if paired.tokens is not None and reported.shape == paired.tokens.logprob0.shape:
        mask = paired.tokens.generated
        difference = torch.where(mask, reported - paired.tokens.logprob0.to(torch.float64), 0.0)
        gap, absolute = difference.sum(dim=1), difference.abs().sum(dim=1)
    elif tuple(reported.shape) == (n,) and paired.generated_logprob0 is not None:
        gap = reported - paired.generated_logprob0
        absolute = gap.abs()
    else:
        raise InputError(
            f"sampler_logprob must be sums of shape ({n},) over the generated tokens, or per token in the columns "
            f"of from_tokens, got {tuple(reported.shape)}"
        )
    if bool(torch.isnan(gap).any()):
        raise InputError("sampler_logprob must not hold NaN for generated tokens; leave it out where it is unknown")
    tokens = total.sum(paired.generated_length)
    mean, z = total.mean_and_z(gap)
    carried = (-gap - total.max(-gap)).exp()
    return SamplerGap(
        kl_per_token=mean * total.n / tokens if tokens else math.nan,
        z=z,
        mean_abs=total.sum(absolute) / tokens if tokens else math.nan,
        ess_fraction=total.sum(carried) ** 2 / total.sum(carried.square()) / total.n,
    )


def _flags(has_eos: Tensor, like: Tensor) -> Tensor:
    if has_eos.shape != like.shape or has_eos.dtype != torch.bool:
        raise InputError(
            f"has_eos must be bool of shape {tuple(like.shape)}, got {has_eos.dtype} {tuple(has_eos.shape)}"
        )
    return has_eos.to(like.device)
