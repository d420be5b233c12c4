"""The prefix estimator: each token's term is weighted by the likelihood ratio of the prefix that it depends on.

H1 = Σ_t E_π0[w_{<t} H¹_t], self-normalised at every step. The weights of a prefix are less spread than those of the
whole sequence, so the standard deviation is often a third to a half smaller than that of SNIS.

Which prefix: H¹_t and the step count depend on the tokens before t alone, so w_{<t} does. What looks at token t itself,
−log p of the sampled integrand, or whether t counts when the EOS is left out, needs w_{≤t}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_fast.collective import Collective
from entropy_fast.errors import InputError
from entropy_fast.estimators.paired import Integrand, PairedScores, TokenScores
from entropy_fast.estimators.prompts import Prompts
from entropy_fast.estimators.ratio import PointEstimate, jackknife_over_prompts

# tokens taken at a time: bounds the float64 working set, whatever the batch
_BLOCK = 2**21


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
    some_do_not_count = collective.max((paired.length != paired.generated_length).any().to(torch.float64))
    if not bool(collective.sum(paired.length.sum()) > 0):
        raise InputError("no counted token in any sequence: nothing to average; check the masks and include_eos")
    sums = _Sums.zero(paired, prompts)
    before = torch.zeros_like(paired.log_weight)
    for step in _steps(paired.tokens, integrand, collective):
        through = before[:, None] + step.log_ratio.cumsum(dim=1)
        exclusive = torch.cat((before[:, None], through[:, :-1]), dim=1)
        before = through[:, -1]
        length_weight = _scaled(through if some_do_not_count else exclusive, collective)
        term_weight = length_weight if integrand == "rao_blackwell" else _scaled(through, collective)
        sums.add(step, term_weight, length_weight, prompts)
    return sums.estimate(prompts, per_token=per_token)


@dataclass
class _Step:
    """Some consecutive generation steps, [n, steps] float64; zero where a sequence has ended."""

    log_ratio: Tensor
    term0: Tensor
    term1: Tensor
    counted: Tensor


@dataclass
class _Sums:
    """What adds up over the steps: for the estimate, per sequence [n], and without each prompt [P]."""

    mu: Tensor
    nu: Tensor
    updated_length: Tensor
    original: Tensor
    length: Tensor
    weighted_term: Tensor
    difference: Tensor
    psi_term: Tensor
    psi_length: Tensor
    mu_without: Tensor
    nu_without: Tensor

    @classmethod
    def zero(cls, paired: PairedScores, prompts: Prompts) -> _Sums:
        row, scalar = torch.zeros_like(paired.log_weight), paired.log_weight.new_zeros(())
        by_prompt = row.new_zeros(prompts.n_prompts)
        return cls(*[scalar] * 3, *[row] * 6, *[by_prompt] * 2)

    def add(self, step: _Step, w: Tensor, v: Tensor, prompts: Prompts) -> None:
        """Add some steps; `w` weighs the terms and `v` the lengths, each up to a factor of its step."""
        by_prompt = [prompts.sum(x)[prompts.counts > 0] for x in (w * step.term1, w, v * step.counted, v)]
        numerator, w_sum, counted, v_sum = (x.sum(dim=0) for x in by_prompt)
        mu, nu = numerator / w_sum, counted / v_sum
        w_hat, v_hat = prompts.n_sequences * w / w_sum, prompts.n_sequences * v / v_sum
        self.mu = self.mu + mu.sum()
        self.nu = self.nu + nu.sum()
        # n/Σv is exactly 1 for equal policies, and so is the ratio of the two lengths
        self.updated_length = self.updated_length + (counted * (prompts.n_sequences / v_sum)).sum()
        self.original = self.original + step.term0.sum(dim=1)
        self.length = self.length + step.counted.sum(dim=1)
        self.weighted_term = self.weighted_term + (w_hat * step.term1).sum(dim=1)
        # weights minus 1, so that equal policies give exactly 0
        self.difference = self.difference + ((w_hat - 1) * step.term1 + (step.term1 - step.term0)).sum(dim=1)
        self.psi_term = self.psi_term + (w_hat * (step.term1 - mu)).sum(dim=1)
        self.psi_length = self.psi_length + (v_hat * (step.counted - nu)).sum(dim=1)
        numerator, w_sum, counted, v_sum = (x.sum(dim=0) - x for x in by_prompt)
        # with one prompt there is nothing left without it
        self.mu_without = self.mu_without + torch.where(w_sum > 0, numerator / w_sum, 0.0).sum(dim=1)
        self.nu_without = self.nu_without + torch.where(v_sum > 0, counted / v_sum, 0.0).sum(dim=1)

    def estimate(self, prompts: Prompts, *, per_token: bool) -> PointEstimate:
        n, present = prompts.n_sequences, prompts.counts > 0
        original, length = (prompts.sum(x)[present] for x in (self.original, self.length))
        all_original, all_length = original.sum(), length.sum()
        if per_token:
            h1, h0 = n * self.mu / self.updated_length, all_original / all_length
            psi1 = (self.psi_term - h1 * self.psi_length) * n / self.updated_length
            psi0 = (self.original - h0 * self.length) * n / all_length
            contributions = self.weighted_term / self.updated_length - self.original / all_length
            without = self.mu_without / self.nu_without - (all_original - original) / (all_length - length)
        else:
            h1, h0 = self.mu, all_original / n
            psi1, psi0 = self.psi_term, self.original - h0
            contributions = self.difference / n
            without = self.mu_without - (all_original - original) / (n - prompts.counts[present])
        value = prompts.sum(contributions).sum()
        jackknife, jackknife_se = jackknife_over_prompts(value, without)
        return PointEstimate(
            original=float(h0),
            updated=float(h1),
            value=float(value),
            influence=psi1 - psi0,
            contributions=contributions,
            jackknife=jackknife,
            jackknife_se=jackknife_se,
        )


def _scaled(log_weight: Tensor, collective: Collective) -> Tensor:
    """Weights over the largest of their step on all ranks."""
    return (log_weight - collective.max(log_weight.max(dim=0).values)).exp()


def _steps(tokens: TokenScores, integrand: Integrand, collective: Collective) -> Iterator[_Step]:
    """The generation steps of all sequences, a block at a time; all ranks see the same number of blocks."""
    aligned = _align(tokens)
    n, here = aligned.generated.shape
    sizes = collective.max(torch.tensor([float(here), float(n)], dtype=torch.float64, device=aligned.logprob0.device))
    width, most = int(sizes[0]), int(sizes[1])
    block = max(1, _BLOCK // most)
    for first in range(0, width, block):
        columns, size = slice(first, first + block), min(block, width - first)

        def emitted(x: Tensor | None, columns: slice = columns, size: int = size) -> Tensor:
            assert x is not None
            part = torch.where(aligned.generated[:, columns], x[:, columns].to(torch.float64), 0.0)
            return torch.nn.functional.pad(part, (0, size - part.shape[1]))

        lp0, lp1, counted = emitted(aligned.logprob0), emitted(aligned.logprob1), emitted(aligned.counted)
        if integrand == "sampled":
            # a token that is impossible under π1 has weight 0 from there on; its inf must not meet it
            term0, term1 = -lp0 * counted, torch.where(lp1 == -torch.inf, 0.0, -lp1 * counted)
        else:
            term0, term1 = emitted(aligned.entropy0) * counted, emitted(aligned.entropy1) * counted
        yield _Step(lp1 - lp0, term0, term1, counted)


def _align(tokens: TokenScores) -> TokenScores:
    """The generated tokens moved to columns 0, 1, ...: column t is generation step t."""
    generated = tokens.generated
    lengths = generated.sum(dim=1)
    width = int(lengths.max()) if lengths.numel() else 0
    ended = torch.arange(width, device=generated.device) < lengths[:, None]
    if torch.equal(generated[:, :width], ended):
        return tokens if width == generated.shape[1] else _apply(tokens, lambda x: x[:, :width])
    # generated columns first, each group in its own order
    order = generated.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return _apply(tokens, lambda x: x.gather(1, order))


def _apply(tokens: TokenScores, change: Callable[[Tensor], Tensor]) -> TokenScores:
    def maybe(x: Tensor | None) -> Tensor | None:
        return None if x is None else change(x)

    return TokenScores(
        change(tokens.logprob0),
        change(tokens.logprob1),
        maybe(tokens.entropy0),
        maybe(tokens.entropy1),
        change(tokens.generated),
        change(tokens.counted),
    )
