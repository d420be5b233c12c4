"""`linear_token_stats` with the head's gradient allocated ahead, for the forward to leave its exponentials in."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from entropy_fast.functional.linear_operators import compute_gradients, compute_stats, implementation
from entropy_fast.functional.operators import nobody_looks
from entropy_fast.reference import linear as reference


def can_reuse(hidden: torch.Tensor, weight: torch.Tensor, precision: str) -> bool:
    """Whether there will be a gradient of the head, in 16 bits, by kernels that know what to do with its memory."""
    narrow = weight.dtype in (torch.bfloat16, torch.float16)
    wanted = narrow and weight.requires_grad and torch.is_grad_enabled() and nobody_looks(hidden)
    return wanted and implementation(hidden, precision) is not reference


def linear_stats_reusing(*inputs: Any) -> tuple[torch.Tensor, ...]:
    """(logprob, entropy, peak, log_sum) from the operator's inputs, differentiable.

    The memory becomes dWeight in the first backward; a second one of the same graph computes everything anew.
    """
    return _Reusing.apply(*inputs)


class _Reusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, targets, bias, mask, temperature, *options):
        ctx.memory = torch.empty_like(weight, memory_format=torch.contiguous_format)
        stats = compute_stats(hidden, weight, targets, bias, mask, temperature, *options, 0.0, memory=ctx.memory)[:4]
        ctx.save_for_backward(hidden, weight, targets, bias, mask, temperature, *stats)
        ctx.mark_non_differentiable(stats[2])
        ctx.set_materialize_grads(False)
        ctx.options = options
        return stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob, grad_entropy, _grad_peak, grad_lse):
        not_inputs = (None,) * len(ctx.options)
        if grad_logprob is None and grad_entropy is None and grad_lse is None:
            return (None,) * 6 + not_inputs
        memory, ctx.memory = ctx.memory, None
        inputs, stats = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        needs = [needs_hidden, needs_weight, needs_bias]
        nothing_filtered = stats[0].new_empty(0)
        grads = (grad_logprob, grad_entropy, grad_lse)
        d_hidden, d_weight, d_bias = compute_gradients(
            *inputs, *ctx.options, *stats, nothing_filtered, *grads, needs, memory
        )
        return (
            d_hidden if needs_hidden else None,
            d_weight if needs_weight else None,
            None,
            d_bias if needs_bias else None,
            None,
            None,
            *not_inputs,
        )
