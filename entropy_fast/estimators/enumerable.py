"""A policy so small that all its sequences can be listed: every expectation is then a finite sum, and truth is known.

Five tokens (0 is the EOS), at most six of them, four prompts, 5461 sequences each. The logit of token a at position t
after the tokens b and, before that, c, for prompt x (positions before the first hold the number 5):

    z = 1.5·sin(1.3a + 0.7b + 0.31c + 0.17t + 0.5x) + 0.8·[a = 0]
    logit = z + η·(cos(0.9a − 0.4b + 0.23c + 0.11t + 0.8x) + z/2)

η = 0 is the original policy; η > 0 are updates of any size. docs/statistics.md walks through it.
"""

from __future__ import annotations

import functools
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


@functools.cache
def list_sequences() -> Listing:
    """Every sequence that ends with an EOS or has the full length: 4^0 + ... + 4^5 + 4^6 = 5461."""
    rows: list[tuple[int, ...]] = []
    for length in range(MAX_TOKENS):
        rows += [(*body, EOS) for body in itertools.product(range(1, VOCABULARY), repeat=length)]
    rows += list(itertools.product(range(1, VOCABULARY), repeat=MAX_TOKENS))
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([row + (EOS,) * (MAX_TOKENS - len(row)) for row in rows])
    generated = torch.arange(MAX_TOKENS) < lengths[:, None]
    return Listing(tokens, generated, has_eos=((tokens == EOS) & generated).any(dim=1))


def logits(eta: float | Tensor) -> Tensor:
    """[prompts, N, 6, 5] float64: the logits before each token of each sequence; differentiable in η."""
    tokens = list_sequences().tokens
    previous = torch.cat((torch.full_like(tokens[:, :2], BOS), tokens[:, :-1]), dim=1).to(torch.float64)
    a = torch.arange(VOCABULARY, dtype=torch.float64)
    t = torch.arange(MAX_TOKENS, dtype=torch.float64)[:, None]
    x = torch.arange(N_PROMPTS, dtype=torch.float64)[:, None, None, None]
    b, c = previous[:, 1:, None], previous[:, :-1, None]
    z = 1.5 * torch.sin(1.3 * a + 0.7 * b + 0.31 * c + 0.17 * t + 0.5 * x) + 0.8 * (a == EOS).to(a)
    return z + eta * (torch.cos(0.9 * a - 0.4 * b + 0.23 * c + 0.11 * t + 0.8 * x) + 0.5 * z)


def token_scores(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of each token of each sequence, both [prompts, N, 6], 0 beyond the end."""
    listing = list_sequences()
    logp = logits.log_softmax(dim=-1)
    logprob = logp.gather(-1, listing.tokens.expand(len(logp), -1, -1)[..., None])[..., 0]
    # a token that was cut off (−inf) has probability 0 and adds nothing
    entropy = -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(dim=-1)
    return torch.where(listing.generated, logprob, 0.0), torch.where(listing.generated, entropy, 0.0)


@dataclass(frozen=True)
class Truth:
    """Exact values of a policy, averaged over the four prompts; nats and tokens."""

    entropy: float
    mean_length: float
    truncated: float
    """Probability of no EOS."""
    by_prompt: tuple[float, ...]
    """Entropies."""

    @property
    def per_token(self) -> float:
        """Entropy per token, a ratio of expectations."""
        return self.entropy / self.mean_length


@dataclass(frozen=True)
class Draws:
    """Sequences drawn from a policy, each field [n] int64."""

    kind: Tensor
    """Which of the four prompts."""
    sequence: Tensor
    """Which of the listed sequences."""
    prompt_index: Tensor
    """Which drawn prompt; several of them can be of one kind."""

    @property
    def has_eos(self) -> Tensor:
        """[n] bool: ended by itself."""
        return list_sequences().has_eos[self.sequence]

    def keep(self, mask: Tensor) -> Draws:
        """Only some of the sequences."""
        return Draws(self.kind[mask], self.sequence[mask], self.prompt_index[mask])


class Policy:
    """The model at one η, with the scores of all its sequences.

    Args:
        eta: size of the update; 0 for the original.
        temperature: divides the logits.
        top_p: keeps, at each step, the likeliest tokens up to and including the one that reaches this mass.
    """

    def __init__(self, eta: float = 0.0, *, temperature: float = 1.0, top_p: float | None = None):
        scaled = logits(eta) / temperature
        if top_p is not None:
            scaled = scaled.masked_fill(~_nucleus(scaled, top_p), -torch.inf)
        self.logprob, self.entropy = token_scores(scaled)
        """Each [4, N, 6]."""
        self.probability = self.logprob.sum(dim=-1).exp()
        """[4, N]."""

    def truth(self, *, include_eos: bool = True) -> Truth:
        """By summing over all sequences. Without the EOS, entropy and length both leave it out."""
        listing = list_sequences()
        counted = listing.counted(include_eos=include_eos)
        by_prompt = -(self.probability * (self.logprob * counted).sum(dim=-1)).sum(dim=1)
        return Truth(
            entropy=float(by_prompt.mean()),
            mean_length=float((self.probability * counted.sum(dim=-1)).sum(dim=1).mean()),
            truncated=float((self.probability * ~listing.has_eos).sum(dim=1).mean()),
            by_prompt=tuple(by_prompt.tolist()),
        )

    def sample(self, n_prompts: int, per_prompt: int, generator: torch.Generator) -> Draws:
        """Draw prompts, each one of the four at random, and sequences for each."""
        kind = torch.randint(N_PROMPTS, (n_prompts,), generator=generator)
        sequence = torch.multinomial(self.probability[kind], per_prompt, replacement=True, generator=generator)
        index = torch.arange(n_prompts).repeat_interleave(per_prompt)
        return Draws(kind.repeat_interleave(per_prompt), sequence.flatten(), index)


def score(draws: Draws, original: Policy, updated: Policy, *, include_eos: bool = True) -> PairedScores:
    """The drawn sequences scored under both policies."""
    listing, rows = list_sequences(), (draws.kind, draws.sequence)
    return PairedScores.from_tokens(
        original.logprob[rows],
        updated.logprob[rows],
        original.entropy[rows],
        updated.entropy[rows],
        listing.generated[draws.sequence],
        listing.counted(include_eos=include_eos)[draws.sequence],
        draws.prompt_index,
    )


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    probability, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    keep = probability.cumsum(dim=-1) - probability < top_p
    return torch.zeros_like(keep).scatter(-1, order, keep)
