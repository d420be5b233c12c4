"""`token_stats`: log-prob and entropy of each position from logits, differentiable."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from entropy_fast.errors import InputError
from entropy_fast.functional import operators, remembered
from entropy_fast.functional import validation as check
from entropy_fast.functional.types import TokenStats


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
    differentiable = torch.is_grad_enabled() and (logits.requires_grad or (bias is not None and bias.requires_grad))
    call = (logits, targets, mask, bias, temperature, scale, softcap, differentiable or return_lse)
    key = remembered.call_key(*call)
    forward = remembered.find(key)
    if forward is None:
        check_logits(logits, bias, temperature, scale, softcap)
        check.check_positions(targets, mask, logits.shape[:-1], "logits")
        check.check_devices(logits.device, "logits", targets=targets, mask=mask, bias=bias)
        forward = remembered.remember(key, *call)
    if forward is not None and not differentiable:
        logprob, entropy, peak, log_sum = forward(logits, targets, mask, bias)
        return TokenStats(logprob, entropy, _lse(peak, log_sum, temperature, scale, softcap) if return_lse else None)
    heat = as_tensor(temperature)
    if not differentiable:
        logprob, entropy, peak, log_sum = operators.row_stats(
            logits, targets, mask, bias, heat, scale, softcap, for_backward=return_lse
        )
        return TokenStats(logprob, entropy, _lse(peak, log_sum, heat, scale, softcap) if return_lse else None)
    if inplace_backward:
        check_in_place(logits)
    return TokenStats(
        *_TokenStats.apply(logits, targets, mask, bias, heat, scale, softcap, return_lse, inplace_backward, forward)
    )


def as_tensor(temperature: float) -> torch.Tensor:
    """A float64 tensor on the CPU; under torch.compile a product, which keeps the number a variable."""
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64, device="cpu") * temperature
    return _remembered(temperature)


@lru_cache(maxsize=64)
def _remembered(temperature: float) -> torch.Tensor:
    return torch.tensor(temperature, dtype=torch.float64, device="cpu")


def _lse(
    peak: torch.Tensor, log_sum: torch.Tensor, temperature: torch.Tensor | float, scale: float, softcap: float | None
) -> torch.Tensor:
    factor = (scale if softcap is None else softcap) / temperature
    if isinstance(factor, torch.Tensor):
        factor = factor.to(peak.dtype)  # or one row's, without a dimension, would be float64
    return log_sum + peak * factor


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, targets, mask, bias, temperature, scale, softcap, return_lse, in_place, forward):
        if forward is not None:
            stats = forward(logits, targets, mask, bias)
        else:
            stats = operators.row_stats(logits, targets, mask, bias, temperature, scale, softcap)
        ctx.save_for_backward(logits, targets, mask, bias, temperature, *stats)
        ctx.set_materialize_grads(False)
        ctx.options = (scale, softcap)
        ctx.in_place = in_place
        logprob, entropy, peak, log_sum = stats
        if return_lse:
            return logprob, entropy, _lse(peak, log_sum, temperature, scale, softcap)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprob, grad_entropy, grad_lse=None):
        unused = (None,) * 6
        if grad_logprob is None and grad_entropy is None and grad_lse is None:
            return None, None, None, None, *unused
        logits, targets, mask, bias, temperature, *stats = saved_tensors(ctx)
        d_logits, d_bias = logits_gradient(
            ctx,
            logits,
            *(targets, mask, bias, temperature, *ctx.options),
            *stats,
            *(grad_logprob, grad_entropy, grad_lse),
            needs_bias=ctx.needs_input_grad[3],
        )
        return d_logits if ctx.needs_input_grad[0] else None, None, None, d_bias, *unused


def logits_gradient(ctx: Any, logits: torch.Tensor, *rest: Any, needs_bias: bool) -> tuple[torch.Tensor, Any]:
    """(gradient of the logits, of the bias or None); `rest` follows the operator's schema."""
    if ctx.in_place:
        d_bias = torch.ops.entropy_fast.row_stats_backward_.default(logits, *rest, needs_bias)
        torch.autograd.graph.increment_version(logits)
        return logits, d_bias if needs_bias else None
    d_logits, d_bias = torch.ops.entropy_fast.row_stats_backward.default(logits, *rest, needs_bias)
    return d_logits, d_bias if needs_bias else None


def saved_tensors(ctx: Any) -> tuple[torch.Tensor, ...]:
    """What the forward saved; says so when an in-place backward has destroyed it."""
    if not ctx.in_place:
        return ctx.saved_tensors
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        raise InputError(
            "the logits were written over before this backward, by an earlier backward of "
            "inplace_backward=True or by something else; use inplace_backward on logits that one call reads and one "
            "backward passes, or leave it off"
        ) from error


def check_in_place(logits: torch.Tensor) -> None:
    """Refuse `inplace_backward` where it cannot be right."""
    if torch.compiler.is_compiling():
        raise InputError("inplace_backward does not work under torch.compile; leave it off in compiled code")
    if logits.is_leaf:
        raise InputError(
            "inplace_backward needs logits that are an intermediate result, got a leaf whose values the backward "
            "would destroy; leave it off, or pass what the model computes"
        )


def check_logits(
    logits: torch.Tensor, bias: torch.Tensor | None, temperature: float, scale: float, softcap: float | None
) -> None:
    """Logits, bias and transform fit together."""
    if logits.dtype not in check.FLOATING or logits.ndim < 1 or logits.shape[-1] < 1:
        raise InputError(
            f"logits must be bf16, fp16, float32 or float64 with shape (..., vocab), got {check.describe(logits)}; "
            "pass what the head returns, before any softmax"
        )
    check.check_bias(bias, logits.shape[-1])
    check.check_transform(temperature, scale, softcap)
