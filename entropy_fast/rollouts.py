"""Rollouts and the tokens that count: which columns were generated, where the EOS is, how long a sequence is.

Everything here is integer and boolean work on [N, T] tensors, without a loop over sequences. What was generated is
read off the attention mask and never inferred from token values, because the padding token may equal the EOS.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import InputError
from entropy_fast.reference.masks import Counting, TokenMasks, generated_columns, token_masks

__all__ = ["Counting", "Rollouts", "TokenMasks", "token_masks"]


@dataclass(frozen=True)
class Rollouts:
    """N sequences drawn from a policy, each a prompt followed by generated tokens, padded to T columns.

    Attributes:
        tokens: (N, T) int64. Columns where `attention_mask` is 0 are padding, on either side; their ids are not read.
        attention_mask: (N, T) bool.
        prompt_lens: (N,) int64, the column at which generation starts (padding on the left included).
        prompt_index: (N,) int64, which prompt a sequence belongs to; groups may be uneven.
        advantages: (N,) float32, or None.
        max_lengths: (N,) int64, the generation limit of each sequence's prompt, in tokens, or None.
        sampler_logprobs: (N, T) float32, the log-probs that the sampling engine reported for the generated tokens
            (nats; other columns are not read), or None.
        shape: (B, G) when the rollouts came as a rectangular batch, so that results can be returned in that shape.
    """

    tokens: Tensor
    attention_mask: Tensor
    prompt_lens: Tensor
    prompt_index: Tensor
    advantages: Tensor | None = None
    max_lengths: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> Rollouts:
        """Read the batch of the proposal's code.

        Args:
            batch: `sequences` (B, G, T) int, `prompt_lens` (B,) int, `attention_masks` (B, G, T); optionally
                `advantages` (B, G), `max_lengths` (B,) and `sampler_logprobs` (B, G, T). Other keys are ignored.

        Raises:
            InputError: a key is missing, a shape does not fit, or a prompt length lies outside 1..T.
        """
        missing = [key for key in ("sequences", "prompt_lens", "attention_masks") if key not in batch]
        if missing:
            raise InputError(
                f"batch lacks {', '.join(missing)}; it has {', '.join(sorted(map(str, batch))) or 'no keys'}"
            )
        sequences = _as_tensor(batch["sequences"], "sequences")
        if sequences.ndim != 3:
            raise InputError(f"sequences must have shape (B, G, T), got {tuple(sequences.shape)}")
        _require_ids(sequences, "sequences")
        b, g, t = sequences.shape
        device = sequences.device
        masks = _shaped(batch["attention_masks"], "attention_masks", (b, g, t), device)
        lens = _shaped(batch["prompt_lens"], "prompt_lens", (b,), device)

        def optional(key: str, *shapes: tuple[int, ...]) -> Tensor | None:
            return None if batch.get(key) is None else _shaped(batch[key], key, shapes[0], device)

        advantages = optional("advantages", (b, g))
        max_lengths = optional("max_lengths", (b,))
        sampler = optional("sampler_logprobs", (b, g, t))
        return cls(
            tokens=sequences.reshape(b * g, t).long(),
            attention_mask=masks.reshape(b * g, t) != 0,
            prompt_lens=lens.long().repeat_interleave(g),
            prompt_index=torch.arange(b, device=device).repeat_interleave(g),
            advantages=None if advantages is None else advantages.reshape(-1).float(),
            max_lengths=None if max_lengths is None else max_lengths.long().repeat_interleave(g),
            sampler_logprobs=None if sampler is None else sampler.reshape(b * g, t).float(),
            shape=(b, g),
        )

    @classmethod
    def from_lists(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        prompt_index: Iterable[int] | None = None,
        *,
        advantages: Iterable[float] | None = None,
        max_lengths: Iterable[int] | None = None,
        sampler_logprobs: Sequence[Sequence[float]] | None = None,
    ) -> Rollouts:
        """Build rollouts from ragged lists of token ids, one prompt and one completion a sequence (right-padded).

        Args:
            prompts: N lists of at least one id each.
            completions: N lists; an empty one is a sequence without generated tokens.
            prompt_index: N integers; by default, equal prompts are the same prompt.
            advantages: N numbers.
            max_lengths: N generation limits, in tokens.
            sampler_logprobs: N lists as long as the completions.

        Raises:
            InputError: the lists differ in length, or a prompt is empty.
        """
        n = len(prompts)
        if len(completions) != n:
            raise InputError(f"prompts and completions must be as many, got {n} and {len(completions)}")
        if n == 0:
            raise InputError("there are no rollouts: prompts is empty; give at least one")
        empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
        if empty:
            raise InputError(
                f"prompt {empty[0]} is empty; a model needs at least one token (a BOS, say) to predict from"
            )
        if prompt_index is None:
            seen: dict[tuple[int, ...], int] = {}
            prompt_index = [seen.setdefault(tuple(prompt), len(seen)) for prompt in prompts]
        rows = [torch.tensor([*p, *c], dtype=torch.int64) for p, c in zip(prompts, completions, strict=True)]
        lens = torch.tensor([len(p) for p in prompts])
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        total = torch.tensor([len(row) for row in rows])
        mask = torch.arange(tokens.shape[1])[None, :] < total[:, None]
        sampler = None
        if sampler_logprobs is not None:
            sampler = torch.zeros(tokens.shape)
            for i, (row, completion) in enumerate(zip(sampler_logprobs, completions, strict=True)):
                if row is None or len(row) != len(completion):
                    given = "none" if row is None else f"{len(row)} values"
                    raise InputError(
                        f"sampler_logprobs of sequence {i} has {given} for {len(completion)} tokens; one for each "
                        "generated token of every sequence is needed, or none at all: leave them all out"
                    )
                sampler[i, len(prompts[i]) : len(rows[i])] = torch.tensor(list(row))
        return cls(
            tokens=tokens,
            attention_mask=mask,
            prompt_lens=lens,
            prompt_index=torch.tensor(list(prompt_index), dtype=torch.int64),
            advantages=None if advantages is None else torch.tensor(list(advantages), dtype=torch.float32),
            max_lengths=None if max_lengths is None else torch.tensor(list(max_lengths), dtype=torch.int64),
            sampler_logprobs=sampler,
        )

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def generated(self) -> Tensor:
        """(N, T) bool: columns from the prompt's end on that the attention mask keeps."""
        return generated_columns(self.attention_mask, self.prompt_lens)

    def to(self, device: torch.device | str) -> Rollouts:
        """The same rollouts with every tensor on `device`."""
        moved: dict[str, Any] = {
            f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def select(self, index: Tensor) -> Rollouts:
        """The sequences at `index` ((M,) int64 or (N,) bool), in that order."""
        picked: dict[str, Any] = {
            f.name: v[index] for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **picked, shape=None)

    def reshape(self, per_sequence: Tensor) -> Tensor:
        """A (N,) result as (B, G) where the rollouts came as a rectangular batch, else unchanged."""
        return per_sequence if self.shape is None else per_sequence.reshape(self.shape)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InputError, naming sequence and column, when an attended token id is outside 0..vocab_size − 1."""
        bad = self.attention_mask & ((self.tokens < 0) | (self.tokens >= vocab_size))
        if bad.any():
            i, j = bad.nonzero()[0].tolist()
            raise InputError(
                f"token id {int(self.tokens[i, j])} (sequence {i}, column {j}) is outside the model's vocabulary of "
                f"{vocab_size}; were the rollouts tokenised for another model?"
            )


def _as_tensor(value: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name} must be a tensor or a rectangular array, got {type(value).__name__} ({error})"
        ) from None


def _shaped(value: Any, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    tensor = _as_tensor(value, name).to(device)
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} must have shape {shape} to fit sequences, got {tuple(tensor.shape)}")
    return tensor


def _require_ids(tensor: Tensor, name: str) -> None:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"{name} must be integer ids, got {tensor.dtype}; pass token ids, not logits or masks")


def _check(r: Rollouts) -> None:
    if r.tokens.ndim != 2:
        raise InputError(f"tokens must have shape (N, T), got {tuple(r.tokens.shape)}")
    _require_ids(r.tokens, "tokens")
    n, t = r.tokens.shape
    if n == 0 or t == 0:
        raise InputError(f"there are no rollouts: tokens has shape {(n, t)}")
    for name, shape in (
        ("attention_mask", (n, t)),
        ("prompt_lens", (n,)),
        ("prompt_index", (n,)),
        ("advantages", (n,)),
        ("max_lengths", (n,)),
        ("sampler_logprobs", (n, t)),
    ):
        value = getattr(r, name)
        if value is not None and tuple(value.shape) != shape:
            raise InputError(f"{name} must have shape {shape} to fit tokens, got {tuple(value.shape)}")
    where = "sequence {}" if r.shape is None else f"sequence {{}} (of {r.shape[0]} prompts × {r.shape[1]})"
    outside = (r.prompt_lens < 1) | (r.prompt_lens > t)
    if outside.any():
        i = int(outside.nonzero()[0])
        raise InputError(
            f"prompt_lens of {where.format(i)} is {int(r.prompt_lens[i])}; it must lie in 1..{t}: the column at which "
            "generation starts, after at least one prompt token"
        )
    columns = torch.arange(t, device=r.tokens.device)
    conditioned = (r.attention_mask & (columns[None, :] < r.prompt_lens[:, None])).any(1)
    if not conditioned.all():
        i = int((~conditioned).nonzero()[0])
        what = "is all zeros" if not r.attention_mask[i].any() else "keeps no token of the prompt"
        raise InputError(
            f"the attention mask of {where.format(i)} {what}; every sequence needs at least one prompt token to "
            "predict from, and ones on all its real tokens"
        )
    if not r.generated.any():
        raise InputError(
            "no sequence has a generated token: the attention mask is zero from prompt_lens on everywhere; "
            "check that the mask covers the completions and that prompt_lens is the start of generation"
        )
    if r.sampler_logprobs is not None and (r.sampler_logprobs.isnan() & r.generated).any():
        i, j = (r.sampler_logprobs.isnan() & r.generated).nonzero()[0].tolist()
        raise InputError(
            f"sampler_logprobs is NaN for the generated token in column {j} of {where.format(i)}; give a number for "
            "every generated token, or leave them all out"
        )
    if r.max_lengths is not None and (r.max_lengths < 1).any():
        raise InputError(f"max_lengths must be at least 1, got {int(r.max_lengths.min())}")
