"""Can the number be believed? Thresholds in one place, reasons in words."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from entropy_fast.estimators.change import EntropyChange
from entropy_fast.estimators.diagnostics import Diagnostics
from entropy_fast.estimators.noise import NoiseFloor
from entropy_fast.psis import MIN_TAIL, tail_length

Severity = Literal["fail", "caution", "note"]
Status = Literal["believable", "caution", "not believable"]


@dataclass(frozen=True)
class Thresholds:
    """Where a diagnostic turns into a caution, and where into a failure."""

    z_caution: float = 3.0
    z_fail: float = 4.0
    """|z| of the mean weight and of the surprises. By chance 6e-5 of sound data sets reach 4, each."""
    ess_caution: float = 50.0
    ess_fail: float = 10.0
    ess_fraction_caution: float = 0.5
    ess_fraction_fail: float = 0.1
    share_caution: float = 0.1
    share_fail: float = 0.3
    """Of the largest weight."""
    near_one: float = 0.95
    """ESS/n above which the weights are so even that a high k̂ is a caution, not a failure."""
    sampler_kl_caution: float = 1e-3
    sampler_kl_fail: float = 5e-3
    """Nats per token, when |z| is at least `z_fail`. Logits rounded to bf16 give about 3e-4."""
    endings_log10: float = -4.0
    endings_count: int = 5
    """The longest sequences, that many or more, all end by themselves with less than this probability."""
    cut_mass_caution: float = 0.01
    cut_mass_fail: float = 0.1
    bias_in_se: float = 0.5
    few_prompts: int = 10


@dataclass(frozen=True)
class Finding:
    """One reason."""

    code: str
    """A stable name to test for, such as "mean_weight"."""
    severity: Severity
    message: str


@dataclass(frozen=True)
class Verdict:
    """The answer to "can I believe it?"."""

    status: Status
    findings: tuple[Finding, ...]
    """Gravest first."""

    @property
    def believable(self) -> bool:
        """False when something failed; a caution still believes."""
        return self.status != "not believable"

    @property
    def reasons(self) -> list[str]:
        """The findings as sentences, gravest first."""
        return [finding.message for finding in self.findings]

    @property
    def codes(self) -> set[str]:
        """The names of what failed or asks for caution."""
        return {finding.code for finding in self.findings if finding.severity != "note"}

    def to_dict(self) -> dict[str, Any]:
        """Status, believable, and the findings."""
        return {
            "status": self.status,
            "believable": self.believable,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        return "\n".join([self.status, *(f"  {finding.severity}: {finding.message}" for finding in self.findings)])


def judge(
    estimate: EntropyChange,
    diagnostics: Diagnostics,
    *,
    noise_floor: float | NoiseFloor | None = None,
    in_sample: bool = False,
    thresholds: Thresholds | None = None,
) -> Verdict:
    """Weigh an estimate and the diagnostics of the same scores.

    Args:
        estimate: from `entropy_change`.
        diagnostics: from `diagnose`.
        noise_floor: rounding noise of ΔH in the estimate's own unit, nats; None when not measured.
        in_sample: the update was fitted to these same sequences. Their weights then lean above 1, so that nothing
            weighted tests the sampling, and ΔH leans towards what the update favours in this sample.
        thresholds: other bounds than the defaults.

    Returns:
        A verdict: "not believable" when anything failed, "caution" when something asks for it, else "believable".
    """
    limits = thresholds or Thresholds()
    floor = noise_floor.floor if isinstance(noise_floor, NoiseFloor) else noise_floor
    findings = [
        *_about_the_sample(diagnostics, limits),
        *_about_the_weights(diagnostics, limits),
        *_about_the_estimate(estimate, limits, floor),
    ]
    if in_sample:
        findings = [finding for finding in findings if finding.code not in ("mean_weight", "updated_surprise")]
        findings += _about_fitting(diagnostics, limits)
    order = {"fail": 0, "caution": 1, "note": 2}
    findings.sort(key=lambda finding: order[finding.severity])
    gravest = findings[0].severity if findings else "note"
    status: dict[Severity, Status] = {"fail": "not believable", "caution": "caution", "note": "believable"}
    return Verdict(status[gravest], tuple(findings))


def _graded(code: str, value: float, caution: float, fail: float, message: str) -> list[Finding]:
    """A finding when the value is at or beyond a bound."""
    if value >= fail:
        return [Finding(code, "fail", message)]
    return [Finding(code, "caution", message)] if value >= caution else []


_CAUSES = (
    "the temperature, top-p or top-k of sampling, an EOS left out, sequences dropped, retokenised text, "
    "or another engine's numerics"
)


def _about_the_sample(d: Diagnostics, limits: Thresholds) -> list[Finding]:
    """Were the sequences drawn from π0, whole, and weighted by their whole likelihood ratio?"""
    found = _graded(
        "mean_weight",
        abs(d.mean_weight_z),
        limits.z_caution,
        limits.z_fail,
        f"the weights average {d.mean_weight:.4g} where 1 is expected (z = {d.mean_weight_z:.1f}): the scores are not "
        f"log-probs under the distribution that sampled ({_CAUSES}), or the update is too large for these weights",
    )
    if d.surprise_z is not None and d.surprise is not None:
        kind = "likelier" if d.surprise > 0 else "less likely"
        found += _graded(
            "surprise",
            abs(d.surprise_z),
            limits.z_caution,
            limits.z_fail,
            f"the tokens are {kind} under the original policy than its own entropy allows, by {abs(d.surprise):.3g} "
            f"nats a sequence (z = {d.surprise_z:.1f}): they were not drawn from it as scored ({_CAUSES})",
        )
    else:
        found.append(
            Finding(
                "no_entropies",
                "note",
                "without token entropies, only the mean weight tests that the sequences came from the original policy",
            )
        )
    if d.updated_surprise_z is not None:
        found += _graded(
            "updated_surprise",
            abs(d.updated_surprise_z),
            limits.z_caution,
            limits.z_fail,
            f"reweighted to the updated policy, the tokens disagree with its entropy (z = {d.updated_surprise_z:.1f}): "
            "the weights do not carry the one policy to the other",
        )
    if d.log_weight_mismatch > 0:
        found.append(
            Finding(
                "log_weight",
                "fail",
                f"in {d.log_weight_mismatch:.0%} of the sequences the log weight is not S1 − S0: weigh a sequence by "
                "its whole likelihood ratio, never by a token's or by its length-th root (with the EOS left out of S, "
                "tell generated_length)",
            )
        )
    if d.single_token_share == 1.0 and d.n_sequences > 1:
        found.append(
            Finding(
                "single_tokens",
                "caution",
                "every sequence has one token: if these are the tokens of longer sequences, each was weighted by its "
                "own ratio and ΔH is wrong; pass whole sequences",
            )
        )
    if (
        d.endings is not None
        and d.endings.n_longest >= limits.endings_count
        and d.endings.log10_probability <= limits.endings_log10
    ):
        found.append(
            Finding(
                "endings",
                "fail",
                f"no sequence was cut off, yet {d.endings.n_longest} of them end exactly at the longest length, "
                f"{d.endings.longest} tokens (probability 1e{d.endings.log10_probability:.0f}): truncated ones seem to "
                "have been dropped; keep them",
            )
        )
    if d.sampler is not None and abs(d.sampler.z) >= limits.z_fail:
        found += _graded(
            "sampler",
            abs(d.sampler.kl_per_token),
            limits.sampler_kl_caution,
            limits.sampler_kl_fail,
            f"the sampler's own log-probs differ from the original policy's by {d.sampler.kl_per_token:.2g} nats a "
            f"token on average (z = {d.sampler.z:.1f}): score at the temperature that was sampled; top-p and top-k "
            "cannot be repaired",
        )
    if d.truncated_share:
        found.append(
            Finding(
                "truncated",
                "note",
                f"{d.truncated_share:.0%} of the sequences were cut off at the length limit; ΔH is that of the process "
                "stopped there",
            )
        )
    if d.empty_share:
        found.append(Finding("empty", "note", f"{d.empty_share:.0%} of the sequences have no counted token"))
    return found


def _about_fitting(d: Diagnostics, limits: Thresholds) -> list[Finding]:
    """How much did the update learn these very sequences?"""
    message = (
        f"the step was taken on the sequences that it is evaluated on (their weights average {d.mean_weight:.4g}, "
        f"z = {d.mean_weight_z:.1f}): ΔH is partly what it learned by heart; evaluate on other rollouts "
        "(entropy_change_two_batch)"
    )
    leans = abs(d.mean_weight_z) > limits.z_caution
    return [Finding("in_sample", "caution" if leans else "note", message)]


def _about_the_weights(d: Diagnostics, limits: Thresholds) -> list[Finding]:
    """Is the update small enough for these sequences to speak about π1?"""
    found = _graded(
        "ess",
        -d.ess,
        -limits.ess_caution,
        -limits.ess_fail,
        f"the weights leave {d.ess:.0f} effective sequences of {d.n_sequences}: draw more",
    )
    found += _graded(
        "ess_fraction",
        -d.ess_fraction,
        -limits.ess_fraction_caution,
        -limits.ess_fraction_fail,
        f"ESS/n is {d.ess_fraction:.2f}: the updated policy is far from the one that sampled "
        f"(KL {d.kl:.2g} nats a sequence)",
    )
    found += _graded(
        "max_weight_share",
        d.max_weight_share,
        limits.share_caution,
        limits.share_fail,
        f"one sequence of {d.n_sequences} carries {d.max_weight_share:.0%} of the weight",
    )
    if d.impossible_share > 0:
        found.append(
            Finding(
                "impossible",
                "caution",
                f"{d.impossible_share:.1%} of the sequences are impossible under the updated policy (masked "
                "vocabulary?); KL is infinite",
            )
        )
    if tail_length(d.n_sequences) < MIN_TAIL:
        found.append(Finding("khat", "caution", f"{d.n_sequences} sequences are too few for k̂ to judge the tail"))
        return found
    for code, khat, what in (("khat", d.khat, "weights"), ("khat_integrand", d.khat_integrand, "weighted integrand")):
        # an unfit tail (inf) is one that ties, as equal weights do: bounded, whatever else
        if khat <= d.khat_threshold or math.isinf(khat):
            continue
        message = (
            f"k̂ of the {what} is {khat:.2f}, above {d.khat_threshold:.2f} for {d.n_sequences} sequences: the tail is "
            "too heavy, and the standard error with it is too small"
        )
        found.append(Finding(code, "caution" if d.ess_fraction > limits.near_one else "fail", message))
    return found


def _about_the_estimate(e: EntropyChange, limits: Thresholds, noise_floor: float | None) -> list[Finding]:
    """Is ΔH above the noise, and its error known?"""
    found: list[Finding] = []
    if not math.isfinite(e.value):
        found.append(Finding("not_finite", "fail", f"ΔH is {e.value}: the weights overflow; take method snis"))
    if e.value == 0.0:
        message = "ΔH is exactly 0: both policies give these sequences the same scores"
        found.append(Finding("unchanged", "note", message))
    elif noise_floor is not None and abs(e.value) <= noise_floor:
        message = (
            f"|ΔH| = {abs(e.value):.2g} does not rise above the rounding noise, {noise_floor:.2g}: score in float32, "
            "both policies in one batch layout, or take a larger step"
        )
        found.append(Finding("noise_floor", "fail", message))
    if e.n_prompts < 2:
        found.append(
            Finding(
                "one_prompt",
                "caution",
                "all sequences share one prompt, so nothing is known about others; se_fixed_prompts speaks of this one",
            )
        )
    elif e.n_prompts < limits.few_prompts:
        found.append(
            Finding(
                "few_prompts",
                "caution",
                f"{e.n_prompts} prompts leave the standard error itself uncertain; the interval allows for it",
            )
        )
    if math.isfinite(e.se) and e.se > 0:
        if abs(e.bias) > limits.bias_in_se * e.se:
            message = (
                f"the jackknife moves ΔH by {abs(e.bias) / e.se:.1f} standard errors: few prompts or uneven weights; "
                "prefer its value"
            )
            found.append(Finding("bias", "caution", message))
        low, high = e.interval
        if low <= 0.0 <= high:
            found.append(
                Finding("sign", "note", f"the {e.confidence:.0%} interval holds 0: the sign of ΔH is not resolved")
            )
    if e.cut_mass is not None:
        found += _graded(
            "cut_mass",
            e.cut_mass,
            limits.cut_mass_caution,
            limits.cut_mass_fail,
            f"clipping cut {e.cut_mass:.1%} of the weight, and ΔH is biased by it",
        )
    return found
