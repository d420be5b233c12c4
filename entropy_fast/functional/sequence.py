"""`sequence_stats`: log-prob and entropy sums, lengths and EOS of padded sequences, differentiable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from entropy_fast.errors import InputError
from entropy_fast.functional import validation as check
from entropy_fast.functional.token import as_tensor, check_in_place, check_logits, logits_gradient, saved_tensors
from entropy_fast.functional.types import SequenceStats
from entropy_fast.reference.masks import generated_columns


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
    check_logits(logits, bias, temperature, scale, softcap)
    _check(logits, tokens, attention_mask, prompt_lens, bias)
    inputs = (logits, tokens, attention_mask, prompt_lens, list(eos_token_ids), include_eos, stop_at_eos)
    transform = (bias, as_tensor(temperature), scale, softcap)
    if not (torch.is_grad_enabled() and (logits.requires_grad or (bias is not None and bias.requires_grad))):
        logprob, entropy, _, _, *found, sums = torch.ops.entropy_fast.sequence_stats(*inputs, *transform)
        return _assemble(logprob, entropy, *found, *sums.unbind())
    if inplace_backward:
        check_in_place(logits)
    return _assemble(*_SequenceStats.apply(*inputs, *transform, inplace_backward))


def _assemble(
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    lengths: torch.Tensor,
    eos_column: torch.Tensor,
    runs_past_eos: torch.Tensor,
    s: torch.Tensor,
    r: torch.Tensor,
    emitted: torch.Tensor,
) -> SequenceStats:
    return SequenceStats(s, r, lengths, emitted, eos_column, runs_past_eos, logprob, entropy)


class _SequenceStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments):
        *inputs, in_place = arguments
        *stats, lengths, eos_column, runs_past_eos, sums = torch.ops.entropy_fast.sequence_stats(*inputs)
        logits, tokens, attention_mask, prompt_lens, _, include_eos, stop_at_eos, bias, temperature, *options = inputs
        ctx.save_for_backward(logits, tokens, attention_mask, prompt_lens, bias, temperature, eos_column, *stats)
        ctx.mark_non_differentiable(lengths, eos_column, runs_past_eos)
        ctx.options = options
        ctx.rules = (include_eos, stop_at_eos)
        ctx.in_place = in_place
        return *stats[:2], lengths, eos_column, runs_past_eos, *(row.clone() for row in sums)

    @staticmethod
    def backward(ctx: Any, g_logprob, g_entropy, _lengths, _eos, _runs_past, g_sum, g_entropy_sum, g_emitted):
        logits, tokens, attention_mask, prompt_lens, bias, temperature, eos_column, *stats = saved_tensors(ctx)
        include_eos, stop_at_eos = ctx.rules
        emitted = generated_columns(attention_mask != 0, prompt_lens.clamp(min=1))
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        eos = eos_column[:, None]
        if stop_at_eos:
            emitted = emitted & ((eos < 0) | (columns <= eos))
        counts = (columns != eos) | include_eos
        dtype = stats[0].dtype
        g_logprob = g_logprob + (g_sum[:, None] * counts + g_emitted[:, None]).to(dtype)
        g_entropy = g_entropy + (g_entropy_sum[:, None] * counts).to(dtype)
        # from the column of a token to that of the logits which score it, the one before
        shifted = (torch.nn.functional.pad(t[:, 1:], (0, 1)) for t in (tokens, emitted, *stats, g_logprob, g_entropy))
        tokens, emitted, *stats, g_logprob, g_entropy = shifted
        d_logits, d_bias = logits_gradient(
            ctx,
            logits,
            *(tokens, emitted, bias, temperature, *ctx.options),
            *stats,
            *(g_logprob, g_entropy, None),
            needs_bias=ctx.needs_input_grad[7],
        )
        needs_logits = ctx.needs_input_grad[0]
        return d_logits if needs_logits else None, *(None,) * 6, d_bias, *(None,) * 4


def _check(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor,
    prompt_lens: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
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
    check.check_devices(
        logits.device, "logits", tokens=tokens, attention_mask=attention_mask, prompt_lens=prompt_lens, bias=bias
    )
