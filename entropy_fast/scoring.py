"""A model and rollouts in, log-probs, entropies and lengths out, in memory bounded by a token budget."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from entropy_fast.config import Config
from entropy_fast.errors import EntropyFastWarning, InputError, NonFiniteLogitsError
from entropy_fast.functional import TokenStats, linear_token_stats, token_stats
from entropy_fast.heads import eos_token_ids, find_head, input_embedding, unwrap
from entropy_fast.layout import DenseRollouts, Layout
from entropy_fast.microbatch import Microbatch, packed, padded
from entropy_fast.precision import Precision, evaluation_mode, model_precision, one_at_a_time, one_cpu_thread
from entropy_fast.rollouts import Counting, Rollouts, TokenMasks, token_masks
from entropy_fast.trunk import Trunk

Progress = Callable[[int, int], None]

# Tokens in a microbatch when nobody chooses, where memory allows. More does not make a GPU faster, for it is full by
# then, and wastes more on padding; a CPU's caches like less.
DEFAULT_TOKEN_BUDGET = {"cuda": 8192, "cpu": 2048}
# What one token holds at the widest point of a transformer layer, in features of its hidden state and its elements'
# size: the MLP's three products of 4 to 6 times the width, attention and norms, the latter in float32.
_FEATURES_PER_TOKEN = 32
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
        token_budget: tokens in a microbatch, padding included. Memory grows with it, not with the number of rollouts.
            None takes `DEFAULT_TOKEN_BUDGET`, or on a GPU what half of the free memory holds, if that is less.
        max_sequences: a further limit on a microbatch.
        packing: lay microbatches out as one row without padding, every prompt once for all its completions. None
            does so where it was verified on the model to give what right-padded rows give; True insists, with an
            error that says why it cannot; False never does. Passes with gradients are always padded.
        fusion: run norms, gated activations and rotary positions as one kernel each, on a CUDA GPU. None does so where
            it was verified on the model to give what its own code gives; True insists, False never does. Passes with
            gradients never do.
        layout: microbatches made earlier (`Scores.layout`), so that rounding is the same; None makes them.
        precision: see `model_precision`.
        autocast: the dtype to run the model under autocast in, None for no autocast.
    """

    counting: Counting | None = None
    temperature: float = 1.0
    entropy: bool = True
    token_budget: int | None = None
    max_sequences: int | None = None
    packing: bool | None = None
    fusion: bool | None = None
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
            packing=None if memory.packing == "auto" else memory.packing,
            fusion=None if memory.fusion == "auto" else memory.fusion,
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
    device = input_embedding(model).device
    with one_at_a_time(model), torch.no_grad(), evaluation_mode(model), one_cpu_thread(device):
        scorer = Scorer(model, rollouts, scoring, packing=scoring.packing, fusion=scoring.fusion)
        finished: list[tuple[Microbatch, TokenStats]] = []
        total = int(scorer.dense.input_lengths.sum())
        done = 0
        with scorer.scope():
            for batch, stats in scorer.run():
                finished.append((batch, stats))
                done += int(scorer.dense.input_lengths[list(batch.sequences)].sum())
                if progress is not None:
                    progress(done, total)
        # only now, so that nothing waits for a GPU while it works
        logprob, entropy = _collected(scorer, finished)
    executed = replace(scorer.layout, microbatches=tuple(batch.sequences for batch, _ in finished))
    return Scores(logprob, entropy, scorer.masks, executed)


class Scorer:
    """One model and one set of rollouts, ready to be run with or without gradients.

    Args:
        model: a causal language model.
        rollouts: what is scored.
        scoring: how.
        packing, fusion: see `Scoring`; packed and fused passes have no gradients.

    Raises:
        InputError: a token id is outside the vocabulary, the model is not causal, or packing or fusion was asked for
            and the model cannot be packed or fused.
    """

    def __init__(
        self,
        model: nn.Module,
        rollouts: Rollouts,
        scoring: Scoring,
        *,
        packing: bool | None = False,
        fusion: bool | None = False,
    ) -> None:
        self.model = model
        self.scoring = scoring
        self.device = input_embedding(model).device
        self._result_device = rollouts.tokens.device
        self._single = _computes_in_float32(model, scoring)
        # head and layout are tried on the model
        with one_at_a_time(model):
            self.head = find_head(model)
            rollouts.check_vocabulary(self.head.vocab_size)
            counting = scoring.counting or Counting(eos_token_ids(model))
            self.masks = token_masks(rollouts.tokens, rollouts.generated, counting)
            self.dense = DenseRollouts.pack(rollouts, self.masks)
            self._trunk = Trunk(model, self.head, single=self._single)
            self.layout = self._plan(packing, fusion)
        self._most_tokens: float = float("inf")

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """The precision that the model runs in; enter it around `run`."""
        return _scope(self.model, self.scoring, self.device)

    def run(self) -> Iterator[tuple[Microbatch, TokenStats]]:
        """The microbatches with the statistics of their active positions, (R,) each.

        A microbatch that does not fit in memory is halved and tried again, and from then on none is made larger than
        its halves; what is finished stays finished.
        """
        for group in self.layout.microbatches:
            yield from self._run(group)

    def target_of(self, batch: Microbatch) -> tuple[Tensor, Tensor]:
        """(row, column) of the rollouts for every active position of `batch`, on the rollouts' device."""
        return batch.rows, batch.columns

    def stats(self, batch: Microbatch) -> TokenStats:
        """Log-prob and entropy of the active positions of one microbatch, differentiable where gradients are on."""
        states = self._trunk(batch, fused=self.layout.fused)
        if self.head.mode == "logits":
            return token_stats(states, batch.targets.to(states.device), temperature=self.scoring.temperature)
        exact = self._single and self.layout.fused and states.dtype == torch.float32
        # linear layers with a kernel are exact enough for logits then, and their bits do not depend on the layout
        if self.head.mode == "fused" and not exact:
            return self._fused(states, batch.targets)
        with self._trunk.layers(fused=self.layout.fused):
            return self._by_module(states, batch.targets)

    def _fused(self, hidden: Tensor, targets: Tensor) -> TokenStats:
        module: Any = self.head.module
        transform = self.head.transform
        weight, bias = module.weight[: transform.vocab_size], module.bias
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        return linear_token_stats(
            hidden.to(weight.device, dtype),
            weight.to(dtype),
            targets.to(weight.device),
            None if bias is None else bias[: transform.vocab_size].to(dtype),
            temperature=self.scoring.temperature,
            scale=transform.scale,
            softcap=transform.softcap,
        )

    def _by_module(self, hidden: Tensor, targets: Tensor) -> TokenStats:
        assert self.head.module is not None
        transform = self.head.transform
        # hooks that come before a plain head have run when its input was captured
        head = self.head.module.forward if self.head.mode == "fused" else self.head.module

        def chunk(h: Tensor, y: Tensor) -> TokenStats:
            logits = head(h[None])[0, :, : transform.vocab_size]
            return token_stats(
                logits, y, temperature=self.scoring.temperature, scale=transform.scale, softcap=transform.softcap
            )

        pairs = zip(hidden.split(_HEAD_ROWS), targets.to(hidden.device).split(_HEAD_ROWS), strict=True)
        # checkpointed, so that a backward pass holds the logits of one chunk and not of all
        parts = [checkpoint(chunk, h, y, use_reentrant=False) for h, y in pairs]
        return TokenStats(torch.cat([p.logprob for p in parts]), torch.cat([p.entropy for p in parts]), None)

    def _plan(self, packing: bool | None, fusion: bool | None) -> Layout:
        scoring, budget = self.scoring, self._token_budget()
        setting = (scoring.precision, scoring.autocast)
        fitness = self._trunk.fitness(self.dense, self.device, self.scope, setting, budget)
        name = type(unwrap(self.model)).__name__
        for option, wanted, what in (("packing", packing, "packed"), ("fusion", fusion, "fused")):
            obstacle = getattr(fitness, what)
            if obstacle and (wanted or getattr(scoring.layout, what, False)):
                raise InputError(
                    f"{name} cannot be {what}, because {obstacle}; score (both policies) with {option}=False"
                )
        if scoring.layout is not None:
            return scoring.layout
        fused = fusion is not False and not fitness.fused
        if packing is not False and not fitness.packed:
            return replace(Layout.by_prompt(self.dense, budget, scoring.max_sequences), fused=fused)
        if fitness.padded:
            warnings.warn(
                f"{name}: sequences are scored one at a time, because {fitness.padded}",
                EntropyFastWarning,
                stacklevel=4,
            )
        most = 1 if fitness.padded else scoring.max_sequences
        return replace(Layout.by_tokens(self.dense.input_lengths, budget, most), fused=fused)

    def _token_budget(self) -> int:
        if self.scoring.token_budget is not None:
            budget = self.scoring.token_budget
        else:
            budget = DEFAULT_TOKEN_BUDGET.get(self.device.type, DEFAULT_TOKEN_BUDGET["cpu"])
            if self.device.type == "cuda":
                budget = min(budget, max(1, _free_memory(self.device) // (2 * self._bytes_per_token())))
        if self.head.mode == "logits":
            budget = min(budget, max(1, _LOGITS_BYTES // (4 * self.head.vocab_size)))
        return budget

    def _bytes_per_token(self) -> int:
        embedding = input_embedding(self.model)
        return embedding.shape[-1] * embedding.element_size() * _FEATURES_PER_TOKEN

    def _run(self, group: tuple[int, ...]) -> Iterator[tuple[Microbatch, TokenStats]]:
        tokens = self.layout.tokens(self.dense, group)
        if tokens <= self._most_tokens or len(group) == 1:
            make = packed if self.layout.packed else padded
            batch = make(self.dense, group, self.device, self._result_device)
            try:
                stats: TokenStats | None = self.stats(batch)
            except torch.OutOfMemoryError as error:
                if len(group) == 1:
                    raise InputError(
                        f"sequence {group[0]} alone, {tokens} tokens, does not fit in the memory of {self.device}; "
                        f"free memory there or score shorter sequences ({error})"
                    ) from None
                stats = None
            if stats is not None:
                yield batch, stats
                return
            # outside the except block: there, the exception's traceback would keep the failed pass's tensors alive
            self._most_tokens = tokens / 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        middle = len(group) // 2
        for half in (group[:middle], group[middle:]):
            yield from self._run(half)


def _computes_in_float32(model: nn.Module, scoring: Scoring) -> bool:
    """Whether products are to be float32's own: neither cast nor, by the user's leave, TF32's."""
    embedding = input_embedding(model)
    if scoring.autocast is not None or torch.is_autocast_enabled(embedding.device.type):
        return False
    as_loaded = scoring.precision == "as_loaded" and embedding.dtype == torch.float32
    return scoring.precision == "float32" or (as_loaded and torch.get_float32_matmul_precision() == "highest")


def _collected(scorer: Scorer, finished: list[tuple[Microbatch, TokenStats]]) -> tuple[Tensor, Tensor | None]:
    """(N, T) log-probs and, if asked for, entropies, on the rollouts' device; 0 where nothing was generated."""
    generated = scorer.masks.generated
    logprob = torch.zeros(generated.shape, dtype=finished[0][1].logprob.dtype, device=generated.device)
    entropy = torch.zeros_like(logprob) if scorer.scoring.entropy else None
    for batch, stats in finished:
        rows, columns = scorer.target_of(batch)
        logprob[rows, columns] = stats.logprob.to(logprob.device)
        if entropy is not None:
            entropy[rows, columns] = stats.entropy.to(logprob.device)
    _require_finite(logprob, entropy, scorer.masks)
    return logprob, entropy


def _free_memory(device: torch.device) -> int:
    """Bytes that PyTorch could still take: what the driver has, and what is cached and unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


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
