"""The operators behind `token_stats`: one schema, an implementation by device, and shapes for the compiler.

`entropy_fast::row_stats` takes logits (..., vocab) and gives (logprob, entropy, peak, log_sum), each (...); the last
two are what the backward needs (see `reference.rows.RowStats`). `row_stats_backward` returns the gradient of the
logits, `row_stats_backward_` writes it over them; both also return the gradient of the bias, empty unless asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from entropy_fast.functional.validation import check_target_range
from entropy_fast.reference import rows as reference
from entropy_fast.reference.rows import RowGradients, RowStats, arithmetic_dtype
from entropy_fast.reference.transform import Transform

_INPUTS = "Tensor targets, Tensor? mask, Tensor? bias, float temperature, float scale, float? softcap"
_SAVED = "Tensor logprob, Tensor entropy, Tensor peak, Tensor log_sum"
_GRADS = "Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_lse, bool needs_bias"

LIBRARY = torch.library.Library("entropy_fast", "FRAGMENT")
LIBRARY.define(f"row_stats(Tensor logits, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(f"row_stats_backward(Tensor logits, {_INPUTS}, {_SAVED}, {_GRADS}) -> (Tensor, Tensor)")
LIBRARY.define(f"row_stats_backward_(Tensor(a!) logits, {_INPUTS}, {_SAVED}, {_GRADS}) -> Tensor")


def _matrices(*tensors: torch.Tensor, start: int = 0) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Tensors of one shape (..., vocab) as matrices (rows, vocab) without a copy, with the flat rows each covers."""
    if tensors[0].ndim <= 2 or all(t.is_contiguous() for t in tensors):
        matrices = [t if t.ndim == 2 else t.view(-1, t.shape[-1]) for t in tensors]
        yield slice(start, start + len(matrices[0])), matrices
        return
    rows = tensors[0][0].numel() // tensors[0].shape[-1]
    for i, parts in enumerate(zip(*tensors, strict=True)):
        yield from _matrices(*parts, start=start + i * rows)


def _row_stats_torch(logits, targets, mask, bias, temperature, scale, softcap):
    check_target_range(targets, mask, logits.shape[-1])
    transform = Transform(temperature, scale, softcap)
    y = targets.reshape(-1)
    active = None if mask is None else mask.reshape(-1)
    out = [
        reference.row_stats(matrix, y[at], None if active is None else active[at], bias, transform)
        for at, (matrix,) in _matrices(logits)
    ]
    joined = out[0] if len(out) == 1 else (torch.cat(field) for field in zip(*out, strict=True))
    return tuple(t.view(targets.shape) for t in joined)


def _backward_torch(
    out,
    logits,
    targets,
    mask,
    bias,
    temperature,
    scale,
    softcap,
    logprob,
    entropy,
    peak,
    log_sum,
    grad_logprob,
    grad_entropy,
    grad_lse,
    needs_bias,
):
    transform = Transform(temperature, scale, softcap)
    d_bias = None
    if needs_bias:
        d_bias = torch.zeros(bias.shape, dtype=arithmetic_dtype(logits.dtype), device=logits.device)
    for at, (matrix, written) in _matrices(logits, out):

        def part(t, at=at):
            return None if t is None else t.reshape(-1)[at]

        reference.row_stats_backward(
            matrix,
            part(targets),
            part(mask),
            bias,
            transform,
            RowStats(part(logprob), part(entropy), part(peak), part(log_sum)),
            RowGradients(part(grad_logprob), part(grad_entropy), part(grad_lse)),
            written,
            d_bias,
        )
    return logits.new_empty(0) if d_bias is None else d_bias.to(bias.dtype)


def _row_stats_backward_torch(logits, *args):
    out = torch.empty_like(logits)
    return out, _backward_torch(out, logits, *args)


def _row_stats_backward_in_place_torch(logits, *args):
    return _backward_torch(logits, logits, *args)


for _device in ("CPU", "CUDA", "XPU"):
    LIBRARY.impl("row_stats", _row_stats_torch, _device)
    LIBRARY.impl("row_stats_backward", _row_stats_backward_torch, _device)
    LIBRARY.impl("row_stats_backward_", _row_stats_backward_in_place_torch, _device)


@torch.library.register_fake("entropy_fast::row_stats")
def _row_stats_fake(logits, targets, *_):
    dtype = arithmetic_dtype(logits.dtype)
    return tuple(logits.new_empty(targets.shape, dtype=dtype) for _ in range(4))


@torch.library.register_fake("entropy_fast::row_stats_backward")
def _row_stats_backward_fake(logits, targets, mask, bias, *rest):
    return torch.empty_like(logits), _row_stats_backward_in_place_fake(logits, targets, mask, bias, *rest)


@torch.library.register_fake("entropy_fast::row_stats_backward_")
def _row_stats_backward_in_place_fake(logits, targets, mask, bias, *rest):
    needs_bias = rest[-1]
    return bias.new_empty(bias.shape) if needs_bias else logits.new_empty(0)
