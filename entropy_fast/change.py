"""From two scorings of the same rollouts to one answer: estimates, diagnostics, noise floor and verdict together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from entropy_fast.config import Config
from entropy_fast.errors import InputError
from entropy_fast.estimators import (
    Diagnostics,
    EntropyChange,
    NoiseFloor,
    PairedScores,
    Verdict,
    diagnose,
    entropy_change,
    judge,
    noise_floor,
)
from entropy_fast.estimators.change import Unit
from entropy_fast.estimators.paired import Integrand
from entropy_fast.layout import DenseRollouts, Layout
from entropy_fast.rollouts import Rollouts
from entropy_fast.scoring import Scores, Scoring, score

UNITS: tuple[Unit, ...] = ("sequence", "per_token")

# sequences that the cheap noise floor scores a second time
_SUBSAMPLE = 64


@dataclass(frozen=True)
class Change:
    """By how much the entropy changed, and whether to believe it.

    Attributes:
        headline: the estimate that the configuration asks for.
        estimates: by `unit/integrand` (`sequence/sampled`, `per_token/rao_blackwell`, ...), and `unit/prefix` where
            per-token entropies allow it.
        diagnostics: of the weights and the rollouts.
        verdict: believable or not, and why.
        floor: the rounding noise of the headline, or None when it was not measured.
        counts: how many sequences, prompts and tokens, and how many of them need a word.
        notes: what else a reader should know, in sentences.
        low_ess: the effective sample size is below the configured threshold.
        rollouts, original, updated: what it was computed from.
    """

    headline: EntropyChange
    estimates: dict[str, EntropyChange]
    diagnostics: Diagnostics
    verdict: Verdict
    floor: NoiseFloor | None
    counts: dict[str, int]
    notes: tuple[str, ...]
    low_ess: bool
    rollouts: Rollouts = field(repr=False)
    original: Scores = field(repr=False)
    updated: Scores = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values in nats and bits; what JSON holds."""
        integrand = self.headline.integrand
        return {
            "unit": self.headline.unit,
            "deltaH": self.headline.value,
            "sequence": self.estimates[f"sequence/{integrand}"].to_dict(),
            "per_token": self.estimates[f"per_token/{integrand}"].to_dict(),
            "headline": self.headline.to_dict(),
            "estimates": {name: estimate.to_dict() for name, estimate in self.estimates.items()},
            "diagnostics": self.diagnostics.to_dict() | {"low_ess": self.low_ess},
            "noise_floor": None if self.floor is None else self.floor.to_dict(),
            "counts": self.counts,
            "notes": list(self.notes),
            "verdict": self.verdict.to_dict() | {"reasons": self.verdict.reasons},
        }


def measure_change(
    rollouts: Rollouts,
    original: Scores,
    updated: Scores,
    config: Config | None = None,
    *,
    noise_floor: NoiseFloor | None = None,
    in_sample: bool = False,
) -> Change:
    """Estimate ΔH from two scorings of the same rollouts.

    Args:
        rollouts: drawn from the original policy.
        original: scores under the policy that the rollouts were drawn from.
        updated: scores under the other policy, with the original's layout.
        config: its `entropy` and `importance_sampling` sections choose the headline.
        noise_floor: from `measure_noise_floor`.
        in_sample: the update was fitted to these same rollouts; the verdict takes it into account.

    Raises:
        InputError: the scores are of other rollouts or count other tokens, or the configuration asks for entropies
            that were not scored.
    """
    config = config or Config()
    if original.logprob.shape != updated.logprob.shape:
        raise InputError(
            f"the two scorings must be of the same rollouts, got shapes {tuple(original.logprob.shape)} and "
            f"{tuple(updated.logprob.shape)}"
        )
    if not torch.equal(original.masks.counted, updated.masks.counted):
        raise InputError(
            "the two scorings count different tokens; score both with the same Counting (EOS ids and options)"
        )
    paired = pair(rollouts, original, updated)
    options = _headline_options(config)
    headline = entropy_change(paired, unit=config.entropy.unit, **options)
    estimates = _all_estimates(paired, config)
    masks = original.masks
    diagnostics = diagnose(
        paired,
        integrand=config.entropy.integrand,
        has_eos=~masks.truncated,
        sampler_logprob=rollouts.sampler_logprobs,
    )
    threshold = config.importance_sampling.ess_threshold
    return Change(
        headline=headline,
        estimates=estimates,
        diagnostics=diagnostics,
        verdict=judge(headline, diagnostics, noise_floor=noise_floor, in_sample=in_sample),
        floor=noise_floor,
        counts=_counts(rollouts, original),
        notes=_notes(config, original),
        low_ess=diagnostics.ess < (threshold * len(rollouts) if threshold <= 1 else threshold),
        rollouts=rollouts,
        original=original,
        updated=updated,
    )


def measure_noise_floor(
    model: nn.Module, rollouts: Rollouts, original: Scores, config: Config, scoring: Scoring
) -> NoiseFloor | None:
    """Score the original policy a second time in another layout: what ΔH reads when nothing changed.

    Args:
        model: with the original policy's weights.
        rollouts: as for `original`.
        original: the first scoring.
        config: `importance_sampling.noise_floor` is `none`, `subsample` (whole prompts, about 64 sequences) or `full`.
        scoring: how `original` was scored.
    """
    mode = config.importance_sampling.noise_floor
    if mode == "none":
        return None
    index = torch.arange(len(rollouts), device=rollouts.tokens.device)
    if mode == "subsample" and len(rollouts) > _SUBSAMPLE:
        prompts = torch.unique(rollouts.prompt_index)
        chosen = prompts[torch.linspace(0, len(prompts) - 1, max(2, _SUBSAMPLE * len(prompts) // len(rollouts))).long()]
        index = torch.isin(rollouts.prompt_index, chosen).nonzero().flatten()[: 2 * _SUBSAMPLE]
    sample = rollouts.select(index)
    first = select(original, index)
    if not first.masks.generated.any():
        return None
    second = score(
        model, sample, replace(scoring, layout=other_layout(sample, first), entropy=original.entropy is not None)
    )
    options = _headline_options(config)
    return noise_floor(pair(sample, first, second), n_full=len(rollouts), unit=config.entropy.unit, **options)


def other_layout(rollouts: Rollouts, scores: Scores) -> Layout:
    """Microbatches of half as many sequences as those that `scores` came from: the same answer, rounded otherwise."""
    lengths = DenseRollouts.pack(rollouts, scores.masks).input_lengths
    largest = max(len(group) for group in scores.layout.microbatches)
    return Layout.by_tokens(lengths, token_budget=int(lengths.sum()), max_sequences=max(1, largest // 2))


def pair(rollouts: Rollouts, original: Scores, updated: Scores) -> PairedScores:
    """The two scorings as the statistics take them."""
    return PairedScores.from_tokens(
        original.logprob,
        updated.logprob,
        original.entropy,
        updated.entropy,
        original.masks.generated,
        original.masks.counted,
        rollouts.prompt_index,
    )


def select(scores: Scores, index: torch.Tensor) -> Scores:
    """The scores of the sequences at `index`."""
    masks = replace(scores.masks, **{name: tensor[index] for name, tensor in vars(scores.masks).items()})
    entropy = None if scores.entropy is None else scores.entropy[index]
    return replace(scores, logprob=scores.logprob[index], entropy=entropy, masks=masks)


def _headline_options(config: Config) -> dict[str, Any]:
    """`entropy_change`'s options, without the unit."""
    entropy, settings = config.entropy, config.importance_sampling
    options: dict[str, Any] = {"integrand": entropy.integrand}
    if entropy.estimator == "prefix":
        return options | {"estimator": "prefix"}
    if entropy.control_variate:
        return options | {"control_variate": True}
    return options | {"method": settings.method, "clip": settings.clip_c if settings.method == "clip" else None}


def _all_estimates(paired: PairedScores, config: Config) -> dict[str, EntropyChange]:
    options = _headline_options(config)
    if options.get("estimator") == "prefix":
        options = {}
    options.pop("integrand", None)
    integrands: list[Integrand] = ["sampled"] if paired.entropy0 is None else ["sampled", "rao_blackwell"]
    estimates = {
        f"{unit}/{integrand}": entropy_change(paired, unit=unit, integrand=integrand, **options)
        for unit in UNITS
        for integrand in integrands
    }
    if paired.entropy0 is not None:
        for unit in UNITS:
            estimates[f"{unit}/prefix"] = entropy_change(
                paired, unit=unit, integrand="rao_blackwell", estimator="prefix"
            )
    return estimates


def _counts(rollouts: Rollouts, scores: Scores) -> dict[str, int]:
    masks = scores.masks
    return {
        "sequences": len(rollouts),
        "prompts": len(torch.unique(rollouts.prompt_index)),
        "generated_tokens": int(masks.generated.sum()),
        "counted_tokens": int(masks.lengths.sum()),
        "truncated": int(masks.truncated.sum()),
        "empty": int(masks.empty.sum()),
        "running_past_eos": int(masks.runs_past_eos.sum()),
    }


def _notes(config: Config, scores: Scores) -> tuple[str, ...]:
    notes: list[str] = []
    past = int(scores.masks.runs_past_eos.sum())
    if past and not config.entropy.stop_at_eos:
        notes.append(
            f"the attention mask of {past} sequences runs on past the first EOS and those tokens are counted; "
            "if they are padding, set entropy.stop_at_eos: true"
        )
    if not config.entropy.include_eos:
        notes.append(
            "the EOS is left out of entropies and lengths (entropy.include_eos: false); this is not the entropy that "
            "a language model's perplexity refers to"
        )
    if config.generation.lost_support:
        notes.append(
            "the rollouts were drawn with top-p or top-k, so they are not drawn from the distribution that is scored; "
            "the missing support cannot be put back: sample with top_p 1 and top_k 0"
        )
    return tuple(notes)
