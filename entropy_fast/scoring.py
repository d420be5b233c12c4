"""A model and rollouts in, log-probs, entropies and lengths out, in memory bounded by a token budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from entropy_fast.config import Config
from entropy_fast.errors import InputError, NonFiniteLogitsError
from entropy_fast.functional import TokenStats, linear_token_stats, token_stats
from entropy_fast.heads import eos_token_ids, find_head, forward_kwargs, input_embedding, unwrap
from entropy_fast.layout import DenseRollouts, Layout, Microbatch, microbatches
from entropy_fast.precision import Precision, model_precision
from entropy_fast.rollouts import Counting, Rollouts, TokenMasks, token_masks

Progress = Callable[[int, int], None]

# Padded tokens in a microbatch when nobody chooses. More does not make a GPU faster, for it is full by then, and
# wastes more on padding; a CPU's caches like less.
DEFAULT_TOKEN_BUDGET = {"cuda": 8192, "cpu": 2048}
# Logits held at once where a model needs its own logits, in bytes of float32.
_LOGITS_BYTES = 512 * 2**20
_HEAD_ROWS = 1024


@dataclass(frozen=True)
class Scoring:
    """How a policy is scored: everything that two policies have to share for their scores to be compared.

    Attributes:
        counting: which tokens count, and the EOS ids; None takes the model's ids and counts every token.
        temperature: the temperature that the rollouts were sampled at.
        entropy: also compute the full-distribution entropy of every generated token.
        token_budget: padded tokens in a microbatch, see `DEFAULT_TOKEN_BUDGET`. Memory grows with it, not with the
            number of rollouts.
        max_sequences: a further limit on a microbatch.
        layout: microbatches made earlier (`Scores.layout`), so that rounding is the same; None makes them.
        precision: see `model_precision`.
        autocast: the dtype to run the model under autocast in, None for no autocast.
    """

    counting: Counting | None = None
    temperature: float = 1.0
    entropy: bool = True
    token_budget: int | None = None
    max_sequences: int | None = None
    layout: Layout | None = None
    precision: Precision = "as_loaded"
    autocast: torch.dtype | None = None

    @classmethod
    def from_config(
        cls, config: Config, model: nn.Module, tokenizer: Any = None, *, gradients: bool = False
    ) -> Scoring:
        """The scoring that a configuration asks for.

        Args:
            config: its `entropy`, `generation`, `memory_config` and `importance_sampling` sections are read.
            model: for the EOS ids, where the configuration names none.
            tokenizer: its EOS ids join the model's.
            gradients: take the microbatch size of differentiable passes, and the precision of training.
        """
        memory = config.memory_config
        differentiable = memory.teacher_force_microbatch_size or memory.microbatch_size
        master = config.importance_sampling.master_weights and not gradients
        return cls(
            counting=config.entropy.counting(eos_token_ids(model, tokenizer)),
            temperature=config.generation.temperature,
            token_budget=memory.token_budget,
            max_sequences=differentiable if gradients else memory.importance_microbatch_size,
            precision="float32" if master else memory.precision if not gradients else "as_loaded",
            autocast=getattr(torch, memory.dtype) if memory.amp else None,
        )


@dataclass(frozen=True)
class Scores:
    """What a policy says of the rollouts' tokens. Column j holds the score of the token in column j.

    Attributes:
        logprob: (N, T) float32 (float64 for a float64 model), nats; 0 where nothing was generated.
        entropy: the same for the full-distribution entropy at that position, or None.
        masks: which tokens were generated and which count.
        layout: how it was computed; score the other policy with the same.
    """

    logprob: Tensor
    entropy: Tensor | None
    masks: TokenMasks
    layout: Layout = field(repr=False)

    @property
    def S(self) -> Tensor:
        """(N,) float64: log-prob sums over the counted tokens, nats."""
        return torch.where(self.masks.counted, self.logprob.double(), 0.0).sum(1)

    @property
    def R(self) -> Tensor | None:
        """(N,) float64: entropy sums over the counted tokens, nats."""
        if self.entropy is None:
            return None
        return torch.where(self.masks.counted, self.entropy.double(), 0.0).sum(1)

    @property
    def lengths(self) -> Tensor:
        """(N,) int32: the number of counted tokens."""
        return self.masks.lengths


def score(
    model: nn.Module,
    rollouts: Rollouts,
    scoring: Scoring | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Scores:
    """Score every generated token of `rollouts` under `model`, without gradients, in evaluation mode.

    Args:
        model: a causal language model; left as it was.
        rollouts: on any device; the result is on the same.
        scoring: how; see `Scoring`.
        progress: called with (tokens done, tokens in all) after each microbatch.
        **options: fields of `Scoring`, as a shorthand: `score(model, rollouts, temperature=0.7)`.

    Raises:
        NonFiniteLogitsError: the model's logits were NaN or infinite; names the sequence and the column.
        InputError: a token id is outside the vocabulary.
    """
    scoring = replace(scoring or Scoring(), **options)
    scorer = Scorer(model, rollouts, scoring)
    shape = rollouts.tokens.shape
    logprob: Tensor | None = None
    entropy: Tensor | None = None
    executed: list[tuple[int, ...]] = []
    total = int(scorer.dense.input_lengths.sum())
    done = 0
    with torch.no_grad(), evaluation_mode(model), scorer.scope():
        for batch, stats in scorer.run():
            if logprob is None:
                logprob = stats.logprob.new_zeros(shape, device=rollouts.tokens.device)
                entropy = torch.zeros_like(logprob) if scoring.entropy else None
            rows, columns = scorer.target_of(batch)
            logprob[rows, columns] = stats.logprob.to(logprob.device)
            if entropy is not None:
                entropy[rows, columns] = stats.entropy.to(logprob.device)
            executed.append(tuple(batch.sequences.tolist()))
            done += int(batch.lengths.sum())
            if progress is not None:
                progress(done, total)
    assert logprob is not None
    _require_finite(logprob, entropy, scorer.masks)
    return Scores(logprob, entropy, scorer.masks, Layout(tuple(executed)))


class Scorer:
    """One model and one set of rollouts, ready to be run with or without gradients.

    Args:
        model: a causal language model.
        rollouts: what is scored.
        scoring: how.
    """

    def __init__(self, model: nn.Module, rollouts: Rollouts, scoring: Scoring) -> None:
        self.model = model
        self.scoring = scoring
        self.head = find_head(model)
        rollouts.check_vocabulary(self.head.vocab_size)
        counting = scoring.counting or Counting(eos_token_ids(model))
        self.masks = token_masks(rollouts.tokens, rollouts.generated, counting)
        self.dense = DenseRollouts.pack(rollouts, self.masks)
        self.device = input_embedding(model).device
        self.layout = scoring.layout or Layout.by_tokens(
            self.dense.input_lengths, self._token_budget(), scoring.max_sequences
        )
        self._result_device = rollouts.tokens.device
        self._kwargs = forward_kwargs(unwrap(model))

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """The precision that the model runs in; enter it around `run`."""
        return _scope(self.model, self.scoring, self.device)

    def run(self) -> Iterator[tuple[Microbatch, TokenStats]]:
        """The microbatches with the statistics of their active positions, in row-major order ((R,) each).

        A microbatch that does not fit in memory is halved and tried again; what is finished stays finished.
        """
        for batch in microbatches(self.dense, self.layout, self.device):
            yield from self._run(batch)

    def target_of(self, batch: Microbatch) -> tuple[Tensor, Tensor]:
        """(row, column) of the rollouts for every active position of `batch`, on the rollouts' device."""
        rows = batch.sequences[:, None].expand_as(batch.active)[batch.active]
        return rows.to(self._result_device), batch.columns[batch.active].to(self._result_device)

    def stats(self, batch: Microbatch) -> TokenStats:
        """Log-prob and entropy of the active positions of one microbatch, differentiable where gradients are on."""
        targets = batch.targets[batch.active]
        if self.head.mode == "logits":
            logits = self.model(input_ids=batch.input_ids, **self._kwargs).logits
            return token_stats(logits[batch.active], targets, temperature=self.scoring.temperature)
        with self.head.capture() as captured:
            self.model(input_ids=batch.input_ids, **self._kwargs)
        hidden = captured[0][batch.active]
        if self.head.mode == "fused":
            return self._fused(hidden, targets)
        return self._by_module(hidden, targets)

    def _fused(self, hidden: Tensor, targets: Tensor) -> TokenStats:
        module: Any = self.head.module
        transform = self.head.transform
        weight, bias = module.weight[: transform.vocab_size], module.bias
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        return linear_token_stats(
            hidden.to(dtype),
            weight.to(dtype),
            targets.to(hidden.device),
            None if bias is None else bias[: transform.vocab_size].to(dtype),
            temperature=self.scoring.temperature,
            scale=transform.scale,
            softcap=transform.softcap,
        )

    def _by_module(self, hidden: Tensor, targets: Tensor) -> TokenStats:
        assert self.head.module is not None
        transform = self.head.transform

        def chunk(h: Tensor, y: Tensor) -> TokenStats:
            logits = self.head.module(h[None])[0, :, : transform.vocab_size]  # type: ignore[misc]
            return token_stats(
                logits, y, temperature=self.scoring.temperature, scale=transform.scale, softcap=transform.softcap
            )

        pairs = zip(hidden.split(_HEAD_ROWS), targets.to(hidden.device).split(_HEAD_ROWS), strict=True)
        # checkpointed, so that a backward pass holds the logits of one chunk and not of all
        parts = [checkpoint(chunk, h, y, use_reentrant=False) for h, y in pairs]
        return TokenStats(torch.cat([p.logprob for p in parts]), torch.cat([p.entropy for p in parts]), None)

    def _token_budget(self) -> int:
        budget = self.scoring.token_budget or DEFAULT_TOKEN_BUDGET.get(self.device.type, DEFAULT_TOKEN_BUDGET["cpu"])
        if self.head.mode == "logits":
            budget = min(budget, max(1, _LOGITS_BYTES // (4 * self.head.vocab_size)))
        return budget

    def _run(self, batch: Microbatch) -> Iterator[tuple[Microbatch, TokenStats]]:
        try:
            stats: TokenStats | None = self.stats(batch)
        except torch.OutOfMemoryError as error:
            if len(batch.sequences) == 1:
                raise InputError(
                    f"sequence {int(batch.sequences[0])} alone, {batch.input_ids.shape[1]} tokens, does not fit in "
                    f"the memory of {self.device}; free memory there or score shorter sequences ({error})"
                ) from None
            stats = None
        if stats is not None:
            yield batch, stats
            return
        # outside the except block: there, the exception's traceback would keep the failed pass's tensors alive
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        for half in batch.halves():
            yield from self._run(half)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` while entered; every module gets its own training flag back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _scope(model: nn.Module, scoring: Scoring, device: torch.device) -> Iterator[None]:
    autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if scoring.autocast is not None:
        autocast = torch.autocast(device.type, dtype=scoring.autocast)
    with model_precision(model, scoring.precision), autocast:
        yield


def _require_finite(logprob: Tensor, entropy: Tensor | None, masks: TokenMasks) -> None:
    bad = logprob.isnan()
    if entropy is not None:
        bad = bad | entropy.isnan()
    bad = bad & masks.generated
    if bad.any():
        i, j = bad.nonzero()[0].tolist()
        raise NonFiniteLogitsError(
            f"the model's logits for the token in column {j} of sequence {i} are NaN, +inf or all −inf "
            f"({int(bad.sum())} such positions); check the weights, or run with memory_config.precision: float32"
        )
