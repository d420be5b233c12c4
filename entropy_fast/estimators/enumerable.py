"""A policy so small that all its sequences can be listed: every expectation is then a finite sum, and truth is known.

Five tokens (0 is the EOS), at most six of them, four prompts, 5461 sequences each. The logit of token a at position t
after the tokens b and, before that, c, for prompt x (positions before the first hold the number 5):

    z = 1.5·sin(1.3a + 0.7b + 0.31c + 0.17t + 0.5x) + 0.8·[a = 0]
    logit = z + η·(cos(0.9a − 0.4b + 0.23c + 0.11t + 0.8x) + z/2)

η = 0 is the original policy; η > 0 are updates of any size. docs/statistics.md walks through it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_fast.estimators.paired import PairedScores

VOCABULARY, MAX_TOKENS, EOS, BOS, N_PROMPTS = 5, 6, 0, 5, 4


@dataclass(frozen=True)
class Listing:
    """All N sequences of the model, the same for every prompt."""

    tokens: Tensor
    """[N, 6] int64; 0 beyond the end."""
    generated: Tensor
    """[N, 6] bool."""
    has_eos: Tensor
    """[N] bool."""

    def counted(self, *, include_eos: bool = True) -> Tensor:
        """[N, 6] bool: the tokens in the integrand."""
        return self.generated if include_eos else self.generated & (self.tokens != EOS)


def list_sequences() -> Listing:
    """Every sequence that ends with an EOS or has the full length: 4^0 + ... + 4^5 + 4^6 = 5461."""
    rows = []
    for length in range(MAX_TOKENS):
        rows += [(*body, EOS) for body in itertools.product(range(1, VOCABULARY), repeat=length)]
    rows += list(itertools.product(range(1, VOCABULARY), repeat=MAX_TOKENS))
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([row + (EOS,) * (MAX_TOKENS - len(row)) for row in rows])
    generated = torch.arange(MAX_TOKENS) < lengths[:, None]
    return Listing(tokens, generated, has_eos=((tokens == EOS) & generated).any(dim=1))


def logits(listing: Listing, eta: float | Tensor) -> Tensor:
    """[prompts, N, 6, 5] float64: the logits before each token of each sequence; differentiable in η."""
    previous = torch.cat((torch.full_like(listing.tokens[:, :2], BOS), listing.tokens[:, :-1]), dim=1)
    x = torch.arange(N_PROMPTS, dtype=torch.float64)[:, None, None, None]
    a = torch.arange(VOCABULARY, dtype=torch.float64)
    t = torch.arange(MAX_TOKENS, dtype=torch.float64)[:, None]
    b = previous[:, 1:, None].to(torch.float64)
    c = previous[:, :-1, None].to(torch.float64)
    z = 1.5 * torch.sin(1.3 * a + 0.7 * b + 0.31 * c + 0.17 * t + 0.5 * x) + 0.8 * (a == EOS).to(a)
    return z + eta * (torch.cos(0.9 * a - 0.4 * b + 0.23 * c + 0.11 * t + 0.8 * x) + 0.5 * z)


def token_scores(listing: Listing, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of each token, both [prompts, N, 6], 0 beyond the end."""
    logp = logits.log_softmax(dim=-1)
    logprob = logp.gather(-1, listing.tokens.expand(len(logp), -1, -1)[..., None])[..., 0]
    # −inf (a token cut off) has probability 0 and adds nothing
    entropy = -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(dim=-1)
    return torch.where(listing.generated, logprob, 0.0), torch.where(listing.generated, entropy, 0.0)


@dataclass(frozen=True)
class Truth:
    """Exact values, averaged over the four prompts, in nats and tokens."""

    entropy: float
    mean_length: float
    truncated: float
    by_prompt: Tensor

    @property
    def per_token(self) -> float:
        """Entropy per token, a ratio of expectations."""
        return self.entropy / self.mean_length


def truth(listing: Listing, eta: float, *, include_eos: bool = True) -> Truth:
    """The entropy and the length of the policy at η, by summing over all sequences.

    Without the EOS both leave it out: the entropy is then E[−Σ log p] over the other tokens.
    """
    logprob, _ = token_scores(listing, logits(listing, eta))
    probability = logprob.sum(dim=-1).exp()
    counted = listing.counted(include_eos=include_eos)
    by_prompt = -(probability * (logprob * counted).sum(dim=-1)).sum(dim=1)
    length = (probability * counted.sum(dim=-1)).sum(dim=1)
    return Truth(
        entropy=float(by_prompt.mean()),
        mean_length=float(length.mean()),
        truncated=float((probability * ~listing.has_eos).sum(dim=1).mean()),
        by_prompt=by_prompt,
    )


def sample(
    listing: Listing,
    sampler_logits: Tensor,
    n_prompts: int,
    per_prompt: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `n_prompts` prompts at random, and sequences for each.

    Returns, each [n_prompts · per_prompt] int64: which of the four prompts, which sequence of the listing, and the
    index of the drawn prompt.
    """
    probability = token_scores(listing, sampler_logits)[0].sum(dim=-1).exp()
    kind = torch.randint(N_PROMPTS, (n_prompts,), generator=generator)
    sequence = torch.multinomial(probability[kind], per_prompt, replacement=True, generator=generator)
    return (
        kind.repeat_interleave(per_prompt),
        sequence.flatten(),
        torch.arange(n_prompts).repeat_interleave(per_prompt),
    )


def paired_scores(
    listing: Listing,
    logits0: Tensor,
    logits1: Tensor,
    kind: Tensor,
    sequence: Tensor,
    prompt_index: Tensor,
    *,
    include_eos: bool = True,
) -> PairedScores:
    """The drawn sequences scored under both policies."""
    (lp0, h0), (lp1, h1) = token_scores(listing, logits0), token_scores(listing, logits1)
    return PairedScores.from_tokens(
        lp0[kind, sequence],
        lp1[kind, sequence],
        h0[kind, sequence],
        h1[kind, sequence],
        listing.generated[sequence],
        listing.counted(include_eos=include_eos)[sequence],
        prompt_index,
    )
