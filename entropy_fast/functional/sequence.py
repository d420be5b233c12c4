"""`sequence_stats`: log-prob and entropy sums, lengths and EOS of padded sequences, differentiable."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from entropy_fast.errors import InputError
from entropy_fast.functional import validation as check
from entropy_fast.functional.token import token_stats
from entropy_fast.functional.types import SequenceStats
from entropy_fast.reference.masks import Counting, generated_columns, token_masks


def sequence_stats(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor,
    prompt_lens: torch.Tensor,
    *,
    eos_token_ids: Iterable[int] = (),
    include_eos: bool = True,
    stop_at_eos: bool = False,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    inplace_backward: bool = False,
) -> SequenceStats:
    """Log-prob sum S, entropy sum R and length L of each sequence, in one read of the logits that matter.

    The token in column j is scored by the logits of column j − 1. Emitted are the columns from the prompt's end on
    that the attention mask keeps, never inferred from token values (padding may equal the EOS); logits of other
    columns are not read.

    Args:
        logits: (N, T, vocab), the model's output for `tokens`; see `token_stats` for dtypes and strides.
        tokens: (N, T), int32 or int64, prompt and completion, padded on either side.
        attention_mask: (N, T), bool or integer, 0 on padding.
        prompt_lens: (N,), integer, the column at which generation starts, at least 1 (left padding included).
        eos_token_ids: the ids that end a sequence.
        include_eos: True counts the EOS as any other token. False leaves the first EOS out of S, R and L; it stays in
            `emitted_logprob`.
        stop_at_eos: False trusts the attention mask. True drops what follows the first EOS.
        temperature: as in `token_stats`, and so are `scale`, `softcap`, `bias` and `inplace_backward`.
        scale: see there.
        softcap: see there.
        bias: see there.
        inplace_backward: see there.

    Returns:
        SequenceStats; S, R, emitted_logprob, logprob and entropy are differentiable with respect to logits and bias.

    Raises:
        InputError: as in `token_stats`; on a CPU also a prompt_lens outside 1..T.
    """
    _check(logits, tokens, attention_mask, prompt_lens)
    counting = Counting(tuple(eos_token_ids), include_eos, stop_at_eos)
    masks = token_masks(tokens, generated_columns(attention_mask != 0, prompt_lens), counting)
    stats = token_stats(
        logits[:, :-1],
        tokens[:, 1:],
        mask=masks.generated[:, 1:],
        temperature=temperature,
        scale=scale,
        softcap=softcap,
        bias=bias,
        inplace_backward=inplace_backward,
    )
    logprob, entropy = (torch.nn.functional.pad(t, (1, 0)) for t in (stats.logprob, stats.entropy))
    return SequenceStats(
        S=torch.where(masks.counted, logprob, 0.0).sum(1, dtype=torch.float64),
        R=torch.where(masks.counted, entropy, 0.0).sum(1, dtype=torch.float64),
        L=masks.lengths,
        emitted_logprob=logprob.sum(1, dtype=torch.float64),
        eos_column=masks.eos_column,
        runs_past_eos=masks.runs_past_eos,
        logprob=logprob,
        entropy=entropy,
    )


def _check(logits: torch.Tensor, tokens: torch.Tensor, attention_mask: torch.Tensor, prompt_lens: torch.Tensor) -> None:
    if logits.ndim != 3 or logits.shape[1] < 1:
        raise InputError(
            f"logits must have shape (sequences, columns, vocab), got {check.describe(logits)}; "
            "score flat rows with token_stats"
        )
    n, t = logits.shape[:2]
    if tokens.dtype not in (torch.int32, torch.int64) or tokens.shape != (n, t):
        raise InputError(
            f"tokens must be int32 or int64 with shape {(n, t)} to fit logits, got {check.describe(tokens)}; pass "
            "prompt and completion, as the model was given them"
        )
    if attention_mask.shape != (n, t) or attention_mask.is_floating_point():
        raise InputError(
            f"attention_mask must be bool or integer with shape {(n, t)} to fit tokens, got "
            f"{check.describe(attention_mask)}"
        )
    if prompt_lens.dtype not in (torch.int32, torch.int64) or prompt_lens.shape != (n,):
        raise InputError(
            f"prompt_lens must be int32 or int64 with shape {(n,)}, one per sequence, got {check.describe(prompt_lens)}"
        )
    check.check_devices(logits.device, "logits", tokens=tokens, attention_mask=attention_mask, prompt_lens=prompt_lens)
    if prompt_lens.device.type == "cpu":
        outside = (prompt_lens < 1) | (prompt_lens > t)
        if outside.any():
            i = int(outside.nonzero()[0])
            raise InputError(
                f"prompt_lens must be in 1..{t}, got {int(prompt_lens[i])} for sequence {i}; it is the column at "
                "which generation starts, after at least one prompt token"
            )
