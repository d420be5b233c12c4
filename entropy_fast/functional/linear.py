"""Differentiable token statistics from hidden states and a language-model head, without the logits."""

from __future__ import annotations

import torch

from entropy_fast.errors import InputError
from entropy_fast.functional import linear_operators
from entropy_fast.functional import validation as check
from entropy_fast.functional.linear_saving import linear_stats_saving, memory_for
from entropy_fast.functional.token import as_tensor
from entropy_fast.functional.types import TokenStats

PRECISIONS = linear_operators.PRECISIONS


class FilteredTokenStats(TokenStats):
    """The TokenStats of `linear_token_stats(max_dropped_mass=...)`, which know what the gradient will leave out.

    Attributes:
        dropped_mass: probability in the slabs of the vocabulary that the position's gradient skips, like the others.
    """

    dropped_mass: torch.Tensor


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
    precision: str = "exact",
    return_lse: bool = False,
    max_dropped_mass: float = 0.0,
    backward_memory: str | int = "gradient",
) -> TokenStats:
    """Log-prob of each target and entropy of each position, straight from hidden states and the head.

    The logits are z = softcap · tanh(scale · (hidden Wᵀ + bias) / softcap) / temperature (without a softcap,
    z = scale · (hidden Wᵀ + bias) / temperature). They are never rounded to the inputs' dtype and never stored; beside
    inputs and gradients the memory does not grow with rows × vocabulary. On a GPU a position's bits do not depend on
    the positions around it (on a CPU, and with precision="exact", they are as the library's GEMM makes them).

    Args:
        hidden: (..., width), bf16, fp16, float32 or float64: the input of the head.
        weight: (vocab, width), the head, in hidden's dtype.
        targets: (...), int32 or int64 token ids.
        bias: (vocab,), optional; −inf removes a token from the vocabulary.
        mask: (...), bool, optional; positions with False are never read and get 0 everywhere, gradients too. On a GPU
            a mask waits once for the number of active positions.
        temperature: divides the logits; above 0.
        scale: multiplies the head's product; above 0 (Cohere, Granite).
        softcap: bound of the tanh (Gemma 2), None for none.
        precision: of float32 inputs on a GPU. "exact" (default): IEEE float32 products, whatever torch's TF32 setting.
            "accurate": three fp16 products of halves on the tensor cores, summed in short runs; float32-grade (where
            there is no such kernel, as "exact"). "fast": the same halves in one sum, error below 1e-4 nats. Gradients
            of both: relative error 1e-5. Other dtypes and devices have one precision: exact products, summed in
            float32 (float64 for float64).
        return_lse: also return the log-sum-exp of the logits.
        max_dropped_mass: opt-in filtering of the gradient, in [0, 1): a position's dz is taken for 0 in slabs of the
            vocabulary that hold at most this much probability together, never the target's. Confident positions then
            cost almost nothing in the backward. 0 (default) is exact.
        backward_memory: where the forward leaves exponentials that the backward need not compute again, up to one GEMM
            of four (with a frozen head of three). "gradient" (default): in the memory that the head's gradient will
            take, allocated in the forward already; it has room for about width / rows of the vocabulary. A number: so
            many bytes beside; 2 · rows · vocab holds everything. 0: nowhere, which is for many forwards before their
            backward, each of which would hold such memory until then. For 16-bit heads on a GPU, where a gradient
            is wanted, outside torch.compile; elsewhere nothing changes, and with max_dropped_mass a number is refused.

    Returns:
        TokenStats(logprob, entropy, lse), each (...), nats, float32 (float64 for float64 inputs); lse is None unless
        asked for. All are differentiable with respect to hidden, weight and bias, once; gradients accumulate in
        float32, and nothing is computed for an input that needs none. With max_dropped_mass above 0, a
        FilteredTokenStats, whose attribute `dropped_mass` is the mass dropped from each position.

    Raises:
        InputError: shapes or dtypes that do not fit, or a parameter out of range. A target outside the vocabulary on an
            active position: on a CPU the error names it; on a GPU, where looking would stall the stream, its logprob,
            entropy and gradient are NaN.
    """
    _check(hidden, weight, targets, bias, mask, temperature, scale, softcap, precision, backward_memory)
    if not 0.0 <= max_dropped_mass < 1.0:
        raise InputError(f"max_dropped_mass must be in [0, 1), got {max_dropped_mass}; 0 computes every gradient")
    filtered = max_dropped_mass > 0
    if filtered and backward_memory not in ("gradient", 0):
        raise InputError(
            f"backward_memory={backward_memory} and max_dropped_mass={max_dropped_mass} do not go together: a "
            "filtered backward needs few of the exponentials; leave one of them out"
        )
    shape = targets.shape
    # each operation spared is a twentieth of a small call
    if hidden.ndim != 2:
        hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        mask = None if mask is None else mask.reshape(-1)
    inputs = (hidden, weight, targets, bias, mask, as_tensor(temperature), scale, softcap, precision)
    dropped = None
    memory = None if filtered else memory_for(backward_memory, hidden, weight, bias, precision)
    if memory is not None:
        logprob, entropy, peak, log_sum = linear_stats_saving(memory, *inputs)
    else:
        logprob, entropy, peak, log_sum, dropped, _ = linear_operators.linear_stats(
            *inputs, max_dropped_mass, for_backward=return_lse
        )
    lse = peak + log_sum if return_lse else None
    if len(shape) != 1:
        logprob, entropy = logprob.view(shape), entropy.view(shape)
        lse = None if lse is None else lse.view(shape)
    if dropped is None or not filtered:
        return TokenStats(logprob, entropy, lse)
    stats = FilteredTokenStats(logprob, entropy, lse)
    stats.dropped_mass = dropped.view(shape)
    return stats


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
    backward_memory: str | int,
) -> None:
    if hidden.dtype not in check.FLOATING or hidden.ndim < 1:
        raise InputError(
            f"hidden must be bf16, fp16, float32 or float64 with shape (..., width), got {check.describe(hidden)}; "
            "pass the input of the head, not token ids"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        raise InputError(
            f"weight must have shape (vocab, {hidden.shape[-1]}) to fit hidden {check.describe(hidden)}, got "
            f"{check.describe(weight)}; pass the head's weight as nn.Linear stores it"
        )
    if weight.dtype != hidden.dtype:
        raise InputError(
            f"weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}; convert one of them "
            "(under autocast the hidden states are narrower than the head)"
        )
    check.check_positions(targets, mask, hidden.shape[:-1], "hidden")
    check.check_bias(bias, weight.shape[0])
    check.check_devices(hidden.device, "hidden", weight=weight, targets=targets, bias=bias, mask=mask)
    check.check_transform(temperature, scale, softcap)
    if not (backward_memory == "gradient" or (isinstance(backward_memory, int) and backward_memory >= 0)):
        raise InputError(
            f'backward_memory must be "gradient" or a number of bytes, got {backward_memory!r}; 0 for none'
        )
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
