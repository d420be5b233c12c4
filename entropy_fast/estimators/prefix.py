"""The prefix estimator: each token's term is weighted by the likelihood ratio of the prefix that it depends on.

H1 = Σ_t E_π0[w_{<t} H¹_t], self-normalised at every step. The weights of a prefix are less spread than those of the
whole sequence, so the standard deviation is often a third to a half smaller than that of SNIS.

Which prefix: H¹_t and the step count depend on the tokens before t alone, so w_{<t} does. What looks at token t itself,
−log p of the sampled integrand, or whether t counts when the EOS is left out, needs w_{≤t}.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_fast.collective import Collective
from entropy_fast.errors import InputError
from entropy_fast.estimators.paired import Integrand, PairedScores, TokenScores
from entropy_fast.estimators.prompts import Prompts
from entropy_fast.estimators.ratio import PointEstimate, jackknife_over_prompts


def estimate_prefix(
    paired: PairedScores, integrand: Integrand, prompts: Prompts, collective: Collective, *, per_token: bool
) -> PointEstimate:
    """The prefix estimate; a finished sequence keeps its last weight and adds 0.

    Sequence: Σ_t μ_t − R̄0 with μ_t = Σ_i w_{i,<t} H¹_it / Σ_i w_{i,<t}. Per token: Σ_t μ_t / Σ_t ν_t − ΣR0/ΣL, with
    ν_t the same average of the indicator that step t counts.
    """
    paired.integrand(integrand)  # raises when the scores lack it
    if paired.tokens is None:
        raise InputError('estimator "prefix" needs per-token scores; build the scores with PairedScores.from_tokens')
    steps = _align(paired.tokens, collective)
    indicator = steps["counted"]
    if integrand == "sampled":
        # a token that is impossible under π1 has weight 0 from there on; its inf must not meet it
        term0 = -steps["logprob0"] * indicator
        term1 = torch.where(steps["logprob1"] == -torch.inf, 0.0, -steps["logprob1"] * indicator)
    else:
        term0, term1 = steps["entropy0"] * indicator, steps["entropy1"] * indicator

    through = (steps["logprob1"] - steps["logprob0"]).cumsum(dim=1)
    before = torch.cat((torch.zeros_like(through[:, :1]), through[:, :-1]), dim=1)
    every_token_counts = not bool(collective.max((steps["generated"] != indicator).any().to(torch.float64)))
    log_length_weight = before if every_token_counts else through
    log_term_weight = log_length_weight if integrand == "rao_blackwell" else through

    # sums over the sequences of each prompt, [P, T]; the weights are scaled by the largest of their step
    w = _scaled(log_term_weight, collective)
    v = w if log_length_weight is log_term_weight else _scaled(log_length_weight, collective)
    per_prompt = [prompts.sum(x)[prompts.counts > 0] for x in (w * term1, w, v * indicator, v, term0, indicator)]
    numerator, w_sum, counted, v_sum, original, length = (x.sum(dim=0) for x in per_prompt)
    if not bool(length.sum() > 0):
        raise InputError("no counted token in any sequence: nothing to average; check the masks and include_eos")

    n = prompts.n_sequences
    w_hat, v_hat = n * w / w_sum, n * v / v_sum
    mu, nu = numerator / w_sum, counted / v_sum
    a0, l0 = term0.sum(dim=1), indicator.sum(dim=1)
    psi1 = (w_hat * (term1 - mu)).sum(dim=1)
    if per_token:
        # n/Σv is exactly 1 for equal policies, and so are the two lengths
        updated_length, original_length = (counted * (n / v_sum)).sum(), length.sum()
        d1, d0 = updated_length / n, original_length / n
        h1, h0 = mu.sum() / d1, original.sum() / original_length
        psi1 = (psi1 - h1 * (v_hat * (indicator - nu)).sum(dim=1)) / d1
        psi0 = (a0 - h0 * l0) / d0
        contributions = (w_hat * term1).sum(dim=1) / updated_length - a0 / original_length
    else:
        h1, h0 = mu.sum(), original.sum() / n
        psi0 = a0 - h0
        # weights minus 1, so that equal policies give exactly 0
        contributions = ((w_hat - 1) * term1 + (term1 - term0)).sum(dim=1) / n
    value = prompts.sum(contributions).sum()
    jackknife, jackknife_se = jackknife_over_prompts(value, _without_each(per_prompt, prompts, per_token=per_token))
    return PointEstimate(
        original=float(h0),
        updated=float(h1),
        value=float(value),
        influence=psi1 - psi0,
        contributions=contributions,
        jackknife=jackknife,
        jackknife_se=jackknife_se,
    )


def _without_each(per_prompt: list[Tensor], prompts: Prompts, *, per_token: bool) -> Tensor:
    """[P]: the estimate without each prompt. A step that only that prompt reached adds nothing."""
    numerator, w_sum, counted, v_sum, original, length = (x.sum(dim=0) - x for x in per_prompt)
    mu = torch.where(w_sum > 0, numerator / w_sum, 0.0).sum(dim=1)
    if per_token:
        nu = torch.where(v_sum > 0, counted / v_sum, 0.0).sum(dim=1)
        return mu / nu - original.sum(dim=1) / length.sum(dim=1)
    rest = prompts.n_sequences - prompts.counts[prompts.counts > 0]
    return mu - original.sum(dim=1) / rest


def _scaled(log_weight: Tensor, collective: Collective) -> Tensor:
    largest = collective.max(log_weight.max(dim=0).values)
    return (log_weight - largest).exp()


def _align(tokens: TokenScores, collective: Collective) -> dict[str, Tensor]:
    """The generated tokens moved to columns 0, 1, ...: column t is generation step t, zero beyond the last."""
    step = tokens.generated.cumsum(dim=1) - 1
    width = int(collective.max(step.max() + 1)) if step.numel() else 0
    step = step.clamp(min=0)
    aligned = {}
    for name in ("logprob0", "logprob1", "entropy0", "entropy1", "generated", "counted"):
        x = getattr(tokens, name)
        if x is not None:
            values = torch.where(tokens.generated, x.to(torch.float64), 0.0)
            aligned[name] = values.new_zeros(len(values), max(width, 1)).scatter_add_(1, step, values)
    return aligned
