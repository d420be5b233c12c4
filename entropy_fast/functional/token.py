"""`token_stats`: log-prob and entropy of each position from logits, differentiable."""

from __future__ import annotations

from typing import Any

import torch

from entropy_fast.errors import InputError
from entropy_fast.functional import operators  # noqa: F401  (defines the operators)
from entropy_fast.functional import validation as check
from entropy_fast.functional.types import TokenStats
from entropy_fast.reference.transform import Transform


def token_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
    inplace_backward: bool = False,
) -> TokenStats:
    """Log-prob of each target and entropy of each position, in one read of the logits.

    The statistics are those of the softmax of z = softcap · tanh(scale · (logits + bias) / softcap) / temperature
    (without a softcap, z = scale · (logits + bias) / temperature):

        lse = log Σ e^z        logprob = z[target] − lse        entropy = lse − Σ softmax(z) z

    Nothing of the size of the logits is allocated in the forward. Arithmetic is float32 (float64 for float64 logits),
    whatever the logits' dtype. A row's bits do not depend on the rows around it.

    Args:
        logits: (..., vocab), bf16, fp16, float32 or float64; the rows may have any strides (`logits[:, :-1]` is not
            copied). −inf removes a token from the vocabulary.
        targets: (...), int32 or int64 token ids.
        mask: (...), bool, optional; positions with False are never read and get 0 everywhere, gradients too.
        temperature: divides the logits; above 0. The one that the tokens were sampled at.
        scale: multiplies the logits before the softcap; above 0 (Cohere, Granite).
        softcap: bound of the tanh (Gemma 2), None for none.
        bias: (vocab,), floating point, optional; added first.
        return_lse: also return the log-sum-exp of z.
        inplace_backward: let the backward write the gradient over the logits instead of allocating a second tensor
            of that size. The logits are lost: they must be an intermediate result that nothing else needs, and
            backward can run once.

    Returns:
        TokenStats(logprob, entropy, lse), each (...), nats, float32 (float64 for float64 logits); lse is None unless
        asked for. All are differentiable with respect to logits and bias. A target at −inf has logprob −inf. A row
        with NaN, with +inf, or with nothing but −inf is NaN.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or a parameter out of range. A target outside the
            vocabulary on an active row: on a CPU the error names the row; on a GPU, where looking would stall the
            stream, that row's logprob, entropy and gradient are NaN.
    """
    _check(logits, targets, mask, temperature, scale, softcap, bias)
    differentiable = torch.is_grad_enabled() and (logits.requires_grad or (bias is not None and bias.requires_grad))
    if not differentiable:
        logprob, entropy, peak, log_sum = torch.ops.entropy_fast.row_stats(
            logits, targets, mask, bias, temperature, scale, softcap
        )
        lse = _lse(peak, log_sum, Transform(temperature, scale, softcap)) if return_lse else None
        return TokenStats(logprob, entropy, lse)
    if inplace_backward:
        _check_in_place(logits)
    return TokenStats(
        *_TokenStats.apply(logits, targets, mask, bias, temperature, scale, softcap, return_lse, inplace_backward)
    )


def _lse(peak: torch.Tensor, log_sum: torch.Tensor, transform: Transform) -> torch.Tensor:
    return torch.add(log_sum, peak, alpha=transform.factor)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, targets, mask, bias, temperature, scale, softcap, return_lse, in_place):
        options = (temperature, scale, softcap)
        logprob, entropy, peak, log_sum = torch.ops.entropy_fast.row_stats(logits, targets, mask, bias, *options)
        ctx.save_for_backward(logits, targets, mask, bias, logprob, entropy, peak, log_sum)
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.in_place = in_place
        if return_lse:
            return logprob, entropy, _lse(peak, log_sum, Transform(*options))
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprob, grad_entropy, grad_lse=None):
        if grad_logprob is None and grad_entropy is None and grad_lse is None:
            return (None,) * 9
        needs_logits, _, _, needs_bias = ctx.needs_input_grad[:4]
        logits, targets, mask, bias, *stats = _saved(ctx)
        rest = (targets, mask, bias, *ctx.options, *stats, grad_logprob, grad_entropy, grad_lse, needs_bias)
        if ctx.in_place:
            d_bias = torch.ops.entropy_fast.row_stats_backward_(logits, *rest)
            torch.autograd.graph.increment_version(logits)
            d_logits = logits
        else:
            d_logits, d_bias = torch.ops.entropy_fast.row_stats_backward(logits, *rest)
        return (
            d_logits if needs_logits else None,
            None,
            None,
            d_bias if needs_bias else None,
            None,
            None,
            None,
            None,
            None,
        )


def _saved(ctx: Any) -> tuple[torch.Tensor, ...]:
    if not ctx.in_place:
        return ctx.saved_tensors
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        raise InputError(
            "the logits were written over before this backward, by an earlier backward of "
            "token_stats(inplace_backward=True) or by something else; use inplace_backward on logits that one "
            "token_stats call reads and one backward passes, or leave it off"
        ) from error


def _check_in_place(logits: torch.Tensor) -> None:
    if torch.compiler.is_compiling():
        raise InputError("inplace_backward does not work under torch.compile; leave it off in compiled code")
    if logits.is_leaf:
        raise InputError(
            "inplace_backward needs logits that are an intermediate result, got a leaf whose values the backward "
            "would destroy; leave it off, or pass what the model computes"
        )


def _check(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
    bias: torch.Tensor | None,
) -> None:
    if logits.dtype not in check.FLOATING or logits.ndim < 1 or logits.shape[-1] < 1:
        raise InputError(
            f"logits must be bf16, fp16, float32 or float64 with shape (..., vocab), got {check.describe(logits)}; "
            "pass what the head returns, before any softmax"
        )
    check.check_positions(targets, mask, logits.shape[:-1], "logits")
    check.check_bias(bias, logits.shape[-1])
    check.check_devices(logits.device, "logits", targets=targets, mask=mask, bias=bias)
    check.check_transform(temperature, scale, softcap)
