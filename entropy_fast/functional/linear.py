"""Differentiable token statistics from hidden states and a language-model head, without the logits.

The operator `entropy_fast::linear_stats` and its derivative `entropy_fast::linear_stats_backward` choose between Triton
and plain torch by device; torch.compile sees each as a whole.
"""

from __future__ import annotations

from typing import Any

import torch

from entropy_fast.errors import InputError
from entropy_fast.functional.types import TokenStats
from entropy_fast.reference import linear as reference
from entropy_fast.reference.transform import Transform

PRECISIONS = ("exact", "accurate", "fast")


def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    precision: str = "accurate",
    return_lse: bool = False,
) -> TokenStats:
    """Log-prob of each target and entropy of each position, straight from hidden states and the head.

    The logits are z = softcap · tanh(scale · (hidden Wᵀ + bias) / softcap) / temperature (without a softcap,
    z = scale · (hidden Wᵀ + bias) / temperature). They are never rounded to the inputs' dtype and never stored; beside
    inputs and gradients the memory does not grow with rows × vocabulary.

    Args:
        hidden: (..., width), bf16, fp16, float32 or float64: the input of the head.
        weight: (vocab, width), the head, in hidden's dtype.
        targets: (...), int32 or int64 token ids.
        bias: (vocab,), optional; −inf removes a token from the vocabulary.
        mask: (...), bool, optional; positions with False are never read and get 0 everywhere, gradients too.
        temperature: divides the logits; above 0.
        scale: multiplies the head's product (Cohere, Granite).
        softcap: bound of the tanh (Gemma 2), None for none.
        precision: of float32 inputs on a GPU. "exact": IEEE float32 products. "accurate" (default): float32-grade
            logits on the tensor cores, error below 1e-5 nats. "fast": error below 1e-4 nats. Inputs of other dtypes
            and other devices have one precision: exact products, accumulated in float32 (float64 for float64).
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        TokenStats(logprob, entropy, lse), each (...), nats, float32 (float64 for float64 inputs); lse is None unless
        asked for. logprob and entropy are differentiable with respect to hidden, weight and bias; float32 accumulation;
        nothing is computed for an input that needs no gradient.

    Raises:
        InputError: shapes or dtypes that do not fit, a parameter out of range, or a target outside the vocabulary.
    """
    _check(hidden, weight, targets, bias, mask, temperature, scale, softcap, precision)
    shape = targets.shape
    logprob, entropy, lse = torch.ops.entropy_fast.linear_stats(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        bias,
        None if mask is None else mask.reshape(-1),
        float(temperature),
        float(scale),
        None if softcap is None else float(softcap),
        precision,
    )
    return TokenStats(logprob.view(shape), entropy.view(shape), lse.view(shape) if return_lse else None)


_LIBRARY = torch.library.Library("entropy_fast", "FRAGMENT")
_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? mask, "
    "float temperature, float scale, float? softcap, str precision"
)
_LIBRARY.define(f"linear_stats({_INPUTS}) -> (Tensor, Tensor, Tensor)")
_LIBRARY.define(
    f"linear_stats_backward({_INPUTS}, Tensor lse, Tensor entropy, Tensor? grad_logprob, Tensor? grad_entropy, "
    "bool needs_hidden, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)"
)


def _stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    transform = Transform(temperature, scale, softcap)
    rows = None if mask is None else mask.nonzero()[:, 0]
    x, y = (hidden, targets) if rows is None else (hidden[rows], targets[rows])
    _check_range(y, weight.shape[0], rows)
    stats = reference.linear_stats(x, weight, y, bias, transform)
    return tuple(_spread(t, rows, hidden.shape[0]) for t in stats)  # type: ignore[return-value]


def _stats_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
    precision: str,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    transform = Transform(temperature, scale, softcap)
    rows = None if mask is None else mask.nonzero()[:, 0]

    def active(t: torch.Tensor | None) -> Any:
        return t if t is None or rows is None else t[rows]

    gradients = reference.linear_backward(
        active(hidden),
        weight,
        active(targets),
        bias,
        transform,
        active(lse),
        active(entropy),
        active(grad_logprob),
        active(grad_entropy),
        (needs_hidden, needs_weight, needs_bias),
    )
    empty = hidden.new_empty(0)
    d_hidden = empty if gradients.hidden is None else _spread(gradients.hidden, rows, hidden.shape[0])
    return (
        d_hidden,
        hidden.new_empty(0) if gradients.weight is None else gradients.weight,
        hidden.new_empty(0) if gradients.bias is None else gradients.bias,
    )


def _spread(values: torch.Tensor, rows: torch.Tensor | None, total: int) -> torch.Tensor:
    """Values of the active rows put back in place, zeros elsewhere."""
    if rows is None:
        return values
    return values.new_zeros(total, *values.shape[1:]).index_copy_(0, rows, values)


for _backend in ("CPU", "CUDA", "XPU", "MPS"):
    _LIBRARY.impl("linear_stats", _stats, _backend)
    _LIBRARY.impl("linear_stats_backward", _stats_backward, _backend)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets, bias, mask, *ctx.options = inputs
    _, entropy, lse = output
    ctx.save_for_backward(hidden, weight, targets, bias, mask, lse, entropy)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_logprob: torch.Tensor | None, grad_entropy: torch.Tensor | None, _grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    not_inputs = (None,) * len(ctx.options)
    if grad_logprob is None and grad_entropy is None:
        return (None,) * 5 + not_inputs
    hidden, weight, targets, bias, mask, lse, entropy = ctx.saved_tensors
    needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
    d_hidden, d_weight, d_bias = torch.ops.entropy_fast.linear_stats_backward(
        hidden,
        weight,
        targets,
        bias,
        mask,
        *ctx.options,
        lse,
        entropy,
        grad_logprob,
        grad_entropy,
        needs_hidden,
        needs_weight,
        needs_bias,
    )
    return (
        d_hidden if needs_hidden else None,
        d_weight if needs_weight else None,
        None,
        d_bias if needs_bias else None,
        None,
        *not_inputs,
    )


def _refuse_second_derivative(_ctx: Any, *_grads: torch.Tensor) -> None:
    raise NotImplementedError("linear_token_stats has no second derivative; take it through torch.log_softmax")


torch.library.register_autograd("entropy_fast::linear_stats", _differentiate, setup_context=_save_for_backward)
torch.library.register_autograd("entropy_fast::linear_stats_backward", _refuse_second_derivative)


@torch.library.register_fake("entropy_fast::linear_stats")
def _stats_fake(hidden, weight, targets, bias, mask, temperature, scale, softcap, precision):
    dtype = reference.accumulation_dtype(hidden.dtype)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))


@torch.library.register_fake("entropy_fast::linear_stats_backward")
def _stats_backward_fake(
    hidden,
    weight,
    targets,
    bias,
    mask,
    temperature,
    scale,
    softcap,
    precision,
    lse,
    entropy,
    grad_logprob,
    grad_entropy,
    needs_hidden,
    needs_weight,
    needs_bias,
):
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        (weight if bias is None else bias).new_empty(weight.shape[0] if needs_bias else 0),
    )


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
    precision: str,
) -> None:
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64) or hidden.ndim < 1:
        raise InputError(
            f"hidden must be bf16, fp16, float32 or float64 with shape (..., width), got {_describe(hidden)}; "
            "pass the input of the head, not token ids"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise InputError(
            f"weight must have shape (vocab, {hidden.shape[-1]}) to fit hidden {_describe(hidden)}, got "
            f"{_describe(weight)}; pass the head's weight as nn.Linear stores it"
        )
    if weight.dtype != hidden.dtype:
        raise InputError(
            f"weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}; convert one of them "
            "(under autocast the hidden states are narrower than the head)"
        )
    if targets.dtype not in (torch.int32, torch.int64) or targets.shape != hidden.shape[:-1]:
        raise InputError(
            f"targets must be int32 or int64 with shape {tuple(hidden.shape[:-1])}, got {_describe(targets)}; "
            "pass one token id per position"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise InputError(f"bias must be floating point with shape ({weight.shape[0]},), got {_describe(bias)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != targets.shape):
        raise InputError(
            f"mask must be bool with shape {tuple(targets.shape)}, got {_describe(mask)}; "
            "pass mask.bool() with one entry per position"
        )
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias), ("mask", mask)):
        if tensor is not None and tensor.device != hidden.device:
            raise InputError(f"{name} must be on hidden's device {hidden.device}, got {tensor.device}; move it there")
    if not 0.0 < temperature < float("inf"):
        raise InputError(f"temperature must be above 0 and finite, got {temperature}; greedy decoding has no entropy")
    if not abs(scale) < float("inf"):
        raise InputError(f"scale must be finite, got {scale}")
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise InputError(f"softcap must be above 0 and finite, or None for none, got {softcap}")
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _check_range(targets: torch.Tensor, vocab: int, rows: torch.Tensor | None) -> None:
    """On a CPU, name the first target outside the vocabulary; elsewhere it gives NaN, because looking would wait."""
    if targets.device.type != "cpu":
        return
    outside = ((targets < 0) | (targets >= vocab)).nonzero()
    if len(outside):
        first = int(outside[0, 0])
        row = first if rows is None else int(rows[first])
        raise InputError(
            f"targets must be in [0, {vocab}), got {int(targets[first])} in row {row}; "
            "mask padding and ignored positions with `mask`"
        )
