"""`linear_token_stats` with memory in which the forward leaves exponentials for the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from entropy_fast.functional.linear_operators import (
    compute_gradients,
    compute_stats,
    implementation,
    in_their_places,
    is_differentiable,
    is_plain,
)
from entropy_fast.reference import linear as reference


def memory_for(
    backward_memory: str | int, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, precision: str
) -> torch.Tensor | None:
    """The memory that was asked for; None where no kernel or no gradient could use it.

    Args:
        backward_memory: "gradient" or a number of bytes; 0 for none.
        hidden: (rows, width).
        weight: (vocab, width).
        bias: (vocab,) or None.
        precision: of the call.
    """
    narrow = hidden.dtype in (torch.bfloat16, torch.float16)
    if not (narrow and backward_memory and is_differentiable(hidden, weight, bias) and is_plain(hidden, weight)):
        return None
    module = implementation(hidden, precision)
    if module is reference:
        return None
    if backward_memory == "gradient":
        return torch.empty_like(weight, memory_format=torch.contiguous_format) if weight.requires_grad else None
    return module.spare_memory(backward_memory, hidden, weight.shape[0])


def linear_stats_saving(memory: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
    """(logprob, entropy, peak, log_sum) from the operator's inputs, differentiable.

    The first backward uses the memory up; a second one of the same graph computes everything anew.
    """
    return _Saving.apply(memory, *inputs)


class _Saving(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, memory, hidden, weight, targets, bias, mask, temperature, *options):
        stats = compute_stats(hidden, weight, targets, bias, mask, temperature, *options, 0.0, memory=memory)[:4]
        ctx.memory = memory
        ctx.save_for_backward(hidden, weight, targets, bias, mask, temperature, *stats)
        ctx.mark_non_differentiable(stats[2])
        ctx.set_materialize_grads(False)
        ctx.options = options
        return stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob, grad_entropy, _grad_peak, grad_lse):
        if grad_logprob is None and grad_entropy is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        memory, ctx.memory = ctx.memory, None
        inputs, stats = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        needs_hidden, needs_weight, _, needs_bias, *_ = needs = ctx.needs_input_grad[1:]
        nothing_filtered = stats[0].new_empty(0)
        gradients = compute_gradients(
            *inputs,
            *ctx.options,
            *stats,
            nothing_filtered,
            *(grad_logprob, grad_entropy, grad_lse),
            [needs_hidden, needs_weight, needs_bias],
            memory,
        )
        return None, *in_their_places(gradients, needs)
