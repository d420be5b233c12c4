"""The data: the same sequences scored under the original policy π0 and the updated policy π1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entropy_fast.errors import InputError

Integrand = Literal["sampled", "rao_blackwell"]

# log-probabilities and entropies that came through float32 may miss their bounds by rounding
_ROUNDING = 1e-3
# tokens summed at a time, so that the float64 copies stay near 100 MB whatever the batch
_BLOCK = 2**21


@dataclass(frozen=True)
class TokenScores:
    """Per-token scores, kept for what sequence sums cannot answer. All [N, T]; False in both masks is padding."""

    logprob0: Tensor
    logprob1: Tensor
    entropy0: Tensor | None
    entropy1: Tensor | None
    generated: Tensor
    counted: Tensor


@dataclass(frozen=True)
class PairedScores:
    """Per-sequence scores of N sequences drawn from π0; all fields [N] float64 in nats unless said otherwise.

    Build it with `from_tokens` (preferred) or `from_sequences`; both check their input.
    """

    logprob0: Tensor
    """S0: log-prob of the counted tokens under the original policy."""
    logprob1: Tensor
    """S1: the same under the updated policy."""
    entropy0: Tensor | None
    """R0: sum of the token entropies over the counted tokens under the original policy."""
    entropy1: Tensor | None
    """R1: the same under the updated policy."""
    log_weight: Tensor
    """ℓ = log π1/π0 of the whole sequence: always over every generated token."""
    length: Tensor
    """L: number of counted tokens."""
    generated_length: Tensor
    """Number of generated tokens, L or more."""
    generated_logprob0: Tensor | None
    """Log-prob of all generated tokens under π0; None when only sums over the counted ones are known."""
    prompt_index: Tensor
    """[N] int64: which prompt each sequence belongs to."""
    surprise0: Tensor | None
    """Σ (log p + H) over the generated tokens under π0; its mean is 0 if the sequences were drawn from π0."""
    surprise1: Tensor | None
    """The same under π1; its w-weighted mean is 0."""
    tokens: TokenScores | None = None

    @classmethod
    def from_tokens(
        cls,
        logprob0: Tensor,
        logprob1: Tensor,
        entropy0: Tensor | None,
        entropy1: Tensor | None,
        generated: Tensor,
        counted: Tensor,
        prompt_index: Tensor,
    ) -> PairedScores:
        """From per-token scores; ℓ is the float64 sum of per-token differences.

        Args:
            logprob0, logprob1: [N, T] log-prob of each token under π0 and π1, nats, any floating dtype.
            entropy0, entropy1: [N, T] full-distribution entropy at each token, nats; None when not computed.
            generated: [N, T] bool, the tokens that the policy emitted (EOS included).
            counted: [N, T] bool, a subset of `generated`: the tokens in the integrand and in the length.
            prompt_index: [N] integers, equal for sequences of one prompt.

        Values outside `generated` are never looked at.

        Raises:
            InputError: shapes that do not match, no sequence, a counted token that was not generated, NaN, a
                log-prob above 0, a negative entropy, or a sequence that is impossible under π0.
        """
        shape = tuple(logprob0.shape)
        if len(shape) != 2 or shape[0] == 0:
            raise InputError(f"logprob0 must have shape (sequences, tokens) with a sequence at least, got {shape}")
        for name, tensor in {
            "logprob1": logprob1,
            "entropy0": entropy0,
            "entropy1": entropy1,
            "generated": generated,
            "counted": counted,
        }.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise InputError(f"{name} must have logprob0's shape {shape}, got {tuple(tensor.shape)}")
        generated, counted = _mask(generated, "generated"), _mask(counted, "counted")
        if bool((counted & ~generated).any()):
            row = int((counted & ~generated).any(dim=1).nonzero()[0])
            raise InputError(f"counted must be a subset of generated; sequence {row} counts a token that it lacks")
        tokens = TokenScores(logprob0, logprob1, entropy0, entropy1, generated, counted)
        step = max(1, _BLOCK // max(1, shape[1]))
        blocks = [_sums(tokens, slice(first, first + step)) for first in range(0, shape[0], step)]
        sums = {
            name: None if first is None else torch.cat([_present(block[name]) for block in blocks])
            for name, first in blocks[0].items()
        }
        return cls(
            **sums,  # type: ignore[arg-type]  # each present where its scores are
            length=counted.sum(dim=1).to(torch.float64),
            generated_length=generated.sum(dim=1).to(torch.float64),
            prompt_index=_prompts(prompt_index, shape[0], logprob0.device),
            tokens=tokens,
        )

    @classmethod
    def from_sequences(
        cls,
        logprob0: Tensor,
        logprob1: Tensor,
        length: Tensor,
        prompt_index: Tensor,
        *,
        entropy0: Tensor | None = None,
        entropy1: Tensor | None = None,
        log_weight: Tensor | None = None,
        generated_length: Tensor | None = None,
    ) -> PairedScores:
        """From per-sequence sums, when the tokens are gone; the prefix estimator is then out of reach.

        Args:
            logprob0, logprob1: [N] log-prob sums S0 and S1 over the counted tokens, nats.
            length: [N] number of counted tokens.
            prompt_index: [N] integers, equal for sequences of one prompt.
            entropy0, entropy1: [N] token-entropy sums R0 and R1 over the counted tokens.
            log_weight: [N] ℓ over *every* generated token; S1 − S0 when None, right only if every token counts. A sum
                of per-token differences loses less to rounding.
            generated_length: [N] number of generated tokens; `length` when None.

        Raises:
            InputError: as `from_tokens`.
        """
        n = logprob0.numel()
        if logprob0.ndim != 1 or n == 0:
            raise InputError(f"logprob0 must have shape (sequences,), got {tuple(logprob0.shape)}; flatten prompts × G")
        device = logprob0.device

        def column(x: Tensor, name: str) -> Tensor:
            if tuple(x.shape) != (n,):
                raise InputError(f"{name} must have shape ({n},), one value a sequence, got {tuple(x.shape)}")
            return x.detach().to(device=device, dtype=torch.float64)

        s0, s1, counted = column(logprob0, "logprob0"), column(logprob1, "logprob1"), column(length, "length")
        emitted = counted if generated_length is None else column(generated_length, "generated_length")
        r0 = None if entropy0 is None else column(entropy0, "entropy0")
        r1 = None if entropy1 is None else column(entropy1, "entropy1")
        _check_values(s0, "logprob0", upper=True)
        _check_values(s1, "logprob1", upper=True)
        for name, r in (("entropy0", r0), ("entropy1", r1)):
            if r is not None:
                _check_values(r, name, upper=False)
        _check_values(counted, "length", upper=False)
        if bool((emitted < counted).any()):
            raise InputError("generated_length must be at least length in every sequence")
        _check_possible(s0[:, None])
        weight = s1 - s0 if log_weight is None else column(log_weight, "log_weight")
        if bool(torch.isnan(weight).any() | (weight == torch.inf).any()):
            raise InputError("log_weight must not hold NaN or +inf; −inf (impossible under π1) is allowed")
        whole = bool((emitted == counted).all())
        return cls(
            logprob0=s0,
            logprob1=s1,
            entropy0=r0,
            entropy1=r1,
            log_weight=weight,
            length=counted,
            generated_length=emitted,
            generated_logprob0=s0 if whole else None,
            prompt_index=_prompts(prompt_index, n, device),
            surprise0=s0 + r0 if whole and r0 is not None else None,
            surprise1=s1 + r1 if whole and r1 is not None else None,
        )

    def __len__(self) -> int:
        return self.logprob0.numel()

    @property
    def every_token_counts(self) -> bool:
        """Whether the integrand covers all generated tokens (include_eos: true)."""
        return bool((self.length == self.generated_length).all())

    def integrand(self, kind: Integrand) -> tuple[Tensor, Tensor]:
        """A0 and A1, [N]: −S for "sampled", R for "rao_blackwell".

        A sequence that is impossible under π1 has weight 0 and its −S1 = inf never matters; it reads 0 here.
        """
        if kind == "sampled":
            return -self.logprob0, torch.where(self.log_weight == -torch.inf, 0.0, -self.logprob1)
        if kind != "rao_blackwell":
            raise InputError(f'integrand must be "sampled" or "rao_blackwell", got {kind!r}')
        if self.entropy0 is None or self.entropy1 is None:
            raise InputError(
                'integrand "rao_blackwell" needs entropy0 and entropy1; score with entropies, or take "sampled"'
            )
        return self.entropy0, self.entropy1


def _mask(mask: Tensor, name: str) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if mask.is_complex() or not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError(f"{name} must be a bool mask, got {mask.dtype} with values other than 0 and 1")
    return mask != 0


def _sums(tokens: TokenScores, rows: slice) -> dict[str, Tensor | None]:
    """The float64 sums over the tokens of some sequences, checked."""
    generated, counted = tokens.generated[rows], tokens.counted[rows]

    def emitted(x: Tensor | None, name: str, *, upper: bool) -> Tensor | None:
        if x is None:
            return None
        x = torch.where(generated, x[rows].detach().to(torch.float64), 0.0)
        _check_values(x, name, upper=upper, first_row=rows.start)
        return x

    lp0 = _present(emitted(tokens.logprob0, "logprob0", upper=True))
    lp1 = _present(emitted(tokens.logprob1, "logprob1", upper=True))
    h0 = emitted(tokens.entropy0, "entropy0", upper=False)
    h1 = emitted(tokens.entropy1, "entropy1", upper=False)
    _check_possible(lp0, first_row=rows.start)

    def over_counted(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(counted, x, 0.0).sum(dim=1)

    return {
        "logprob0": over_counted(lp0),
        "logprob1": over_counted(lp1),
        "entropy0": over_counted(h0),
        "entropy1": over_counted(h1),
        "log_weight": (lp1 - lp0).sum(dim=1),
        "generated_logprob0": lp0.sum(dim=1),
        "surprise0": None if h0 is None else (lp0 + h0).sum(dim=1),
        "surprise1": None if h1 is None else (lp1 + h1).sum(dim=1),
    }


def _present(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _prompts(index: Tensor, n: int, device: torch.device) -> Tensor:
    if tuple(index.shape) != (n,) or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise InputError(
            f"prompt_index must be integers of shape ({n},), one a sequence, got {index.dtype} {tuple(index.shape)}"
        )
    return index.to(device=device, dtype=torch.int64)


def _check_values(x: Tensor, name: str, *, upper: bool, first_row: int = 0) -> None:
    """Log-probs (`upper`) lie in [−inf, 0], entropies and lengths in [0, inf)."""
    bad = ~(x <= _ROUNDING) if upper else ~((x >= -_ROUNDING) & (x < torch.inf))
    if bool(bad.any()):
        place = tuple(bad.nonzero()[0].tolist())
        where = f"sequence {first_row + place[0]}" + (f", column {place[1]}" if len(place) > 1 else "")
        bounds = "at most 0 (a log-probability in nats, not a loss)" if upper else "finite and not negative"
        raise InputError(f"{name} must be {bounds}; {where} has {x[place].item()}")


def _check_possible(logprob0: Tensor, *, first_row: int = 0) -> None:
    impossible = (logprob0 == -torch.inf).any(dim=1)
    if bool(impossible.any()):
        raise InputError(
            f"sequence {first_row + int(impossible.nonzero()[0])} has probability 0 under the original policy, "
            "so it was not drawn from it; score with the policy, the temperature and the vocabulary that sampled"
        )
