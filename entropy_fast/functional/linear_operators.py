"""The operators behind `linear_token_stats`: one schema, an implementation by device, and shapes for the compiler.

`entropy_fast::linear_stats` gives (logprob, entropy, peak, log_sum), each (rows,), the last two for the backward (see
`reference.linear.LinearStats`); `linear_stats_backward` gives the gradients of hidden, weight and bias, empty where
none was asked for. Masked rows are taken out before the product, which on a GPU waits once for their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from entropy_fast.functional.validation import check_target_range
from entropy_fast.reference import linear as reference
from entropy_fast.reference.linear import LinearStats
from entropy_fast.reference.rows import RowGradients, arithmetic_dtype
from entropy_fast.reference.transform import Transform

PRECISIONS = ("exact", "accurate", "fast")

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? mask, "
    "float temperature, float scale, float? softcap, str precision"
)
_SAVED = "Tensor logprob, Tensor entropy, Tensor peak, Tensor log_sum"
_GRADS = "Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_lse, bool[3] needs"

LIBRARY = torch.library.Library("entropy_fast", "FRAGMENT")
LIBRARY.define(f"linear_stats({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(f"linear_stats_backward({_INPUTS}, {_SAVED}, {_GRADS}) -> (Tensor, Tensor, Tensor)")


def implementation(hidden: torch.Tensor, precision: str) -> ModuleType:
    """The module whose `linear_stats` and `linear_backward` serve these inputs: Triton kernels or plain torch.

    float64 and exact float32 are the library's GEMMs whatever the device; so is everything where Triton has no kernels.
    """
    exact = hidden.dtype == torch.float64 or (hidden.dtype == torch.float32 and precision == "exact")
    if hidden.device.type != "cuda" or exact or not _has_triton(hidden.device):
        return reference
    from entropy_fast.kernels import linear

    return linear


def _has_triton(device: torch.device) -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _stats(hidden, weight, targets, bias, mask, temperature, scale, softcap, precision):
    check_target_range(targets, mask, weight.shape[0])
    rows = _active(mask)
    x, y = _rows_of((hidden, targets), rows)
    if len(x) == 0:
        dtype = arithmetic_dtype(hidden.dtype)
        return tuple(torch.zeros(hidden.shape[0], dtype=dtype, device=hidden.device) for _ in range(4))
    transform = Transform(temperature, scale, softcap)
    stats = implementation(hidden, precision).linear_stats(x, weight, y, bias, transform)
    return tuple(_in_place_of(t, rows, hidden.shape[0]) for t in stats)


def _stats_backward(
    hidden,
    weight,
    targets,
    bias,
    mask,
    temperature,
    scale,
    softcap,
    precision,
    logprob,
    entropy,
    peak,
    log_sum,
    grad_logprob,
    grad_entropy,
    grad_lse,
    needs,
):
    rows = _active(mask)
    x, y = _rows_of((hidden, targets), rows)
    if len(x) == 0:
        like = (hidden, weight, weight[:, 0] if bias is None else bias)
        return tuple(t.new_zeros(t.shape if needed else 0) for t, needed in zip(like, needs, strict=True))
    gradients = implementation(hidden, precision).linear_backward(
        x,
        weight,
        y,
        bias,
        Transform(temperature, scale, softcap),
        LinearStats(*_rows_of((logprob, entropy, peak, log_sum), rows)),
        RowGradients(*_rows_of((grad_logprob, grad_entropy, grad_lse), rows)),
        tuple(needs),
    )
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if t is None else t for t in gradients)
    return _in_place_of(d_hidden, rows, hidden.shape[0]) if needs[0] else d_hidden, d_weight, d_bias


def _active(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.nonzero()[:, 0]


def _rows_of(tensors: Sequence[torch.Tensor | None], rows: torch.Tensor | None) -> tuple[Any, ...]:
    return tuple(t if t is None or rows is None else t[rows] for t in tensors)


def _in_place_of(values: torch.Tensor, rows: torch.Tensor | None, total: int) -> torch.Tensor:
    """The active rows' values where they belong, zeros elsewhere."""
    if rows is None:
        return values
    return values.new_zeros(total, *values.shape[1:]).index_copy_(0, rows, values)


for _device in ("CPU", "CUDA", "XPU"):
    LIBRARY.impl("linear_stats", _stats, _device)
    LIBRARY.impl("linear_stats_backward", _stats_backward, _device)


@torch.library.register_fake("entropy_fast::linear_stats")
def _stats_fake(hidden, *_):
    dtype = arithmetic_dtype(hidden.dtype)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(4))


@torch.library.register_fake("entropy_fast::linear_stats_backward")
def _stats_backward_fake(hidden, weight, _targets, bias, *rest):
    like = (hidden, weight, weight[:, 0] if bias is None else bias)
    needs = rest[-1]
    return tuple(t.new_empty(t.shape if needed else 0) for t, needed in zip(like, needs, strict=True))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets, bias, mask, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, mask, *output)
    # peak + log_sum is the log-sum-exp: log_sum carries the derivative of both
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any,
    grad_logprob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    _grad_peak: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    not_inputs = (None,) * len(ctx.options)
    if grad_logprob is None and grad_entropy is None and grad_lse is None:
        return (None,) * 5 + not_inputs
    inputs, stats = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
    d_hidden, d_weight, d_bias = torch.ops.entropy_fast.linear_stats_backward(
        *inputs,
        *ctx.options,
        *stats,
        grad_logprob,
        grad_entropy,
        grad_lse,
        [needs_hidden, needs_weight, needs_bias],
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
