"""The operators behind `token_stats` and `sequence_stats`: schemas, implementations by device, shapes to compile.

`row_stats` takes logits (..., vocab) and gives (logprob, entropy, peak, log_sum), each (...); the last two are what the
backward needs (see `reference.rows.RowStats`). `row_stats_backward` returns the gradient of the logits,
`row_stats_backward_` writes it over them; both also return the gradient of the bias, empty unless asked for.
`sequence_stats` takes whole sequences and adds (lengths, eos_column, runs_past_eos, sums); see `SequenceStats`.

The temperature travels as a float64 tensor without dimensions on the CPU: the compiler would specialise on a number
and compile again for each one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, wraps
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from entropy_fast.functional.validation import check_prompt_lens, check_target_range
from entropy_fast.reference import rows as reference
from entropy_fast.reference.masks import Counting, generated_columns, token_masks
from entropy_fast.reference.rows import RowGradients, RowStats, arithmetic_dtype, is_expanded
from entropy_fast.reference.transform import Transform

_TRANSFORM = "Tensor? bias, Tensor temperature, float scale, float? softcap"
_INPUTS = f"Tensor targets, Tensor? mask, {_TRANSFORM}"
_SAVED = "Tensor logprob, Tensor entropy, Tensor peak, Tensor log_sum"
_GRADS = "Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_lse, bool needs_bias"

LIBRARY = torch.library.Library("entropy_fast", "FRAGMENT")
LIBRARY.define(f"row_stats(Tensor logits, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(f"row_stats_backward(Tensor logits, {_INPUTS}, {_SAVED}, {_GRADS}) -> (Tensor, Tensor)")
LIBRARY.define(f"row_stats_backward_(Tensor(a!) logits, {_INPUTS}, {_SAVED}, {_GRADS}) -> Tensor")
LIBRARY.define(
    "sequence_stats(Tensor logits, Tensor tokens, Tensor attention_mask, Tensor prompt_lens, int[] eos_token_ids, "
    f"bool include_eos, bool stop_at_eos, {_TRANSFORM}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _transform(temperature: torch.Tensor, scale: float, softcap: float | None) -> Transform:
    return Transform(temperature.item(), scale, softcap)


def outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with autocast off for its first argument's device: these statistics keep float32 whatever is on."""

    @wraps(function)
    def run(first: torch.Tensor, *rest: Any, **options: Any) -> Any:
        device = first.device.type
        if not torch.is_autocast_enabled(device):
            return function(first, *rest, **options)
        with torch.autocast(device, enabled=False):
            return function(first, *rest, **options)

    return run


def empty_gradient(logits: torch.Tensor) -> torch.Tensor:
    """Memory for the gradient of the logits: contiguous, but for all positions but one of rows that start anywhere.

    Source and gradient are accessed in the same aligned vectors, for which their rows have to start alike; in
    `logits[:, :-1]` with an odd vocabulary every sequence starts elsewhere than it would in contiguous memory.
    """
    if logits.ndim == 3 and logits.shape[2] * logits.element_size() % 16:
        sequences, columns, vocab = logits.shape
        if logits.stride() == ((columns + 1) * vocab, vocab, 1):
            return logits.new_empty(sequences, columns + 1, vocab)[:, :-1]
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


# Plain torch


def _matrices(*tensors: torch.Tensor, start: int = 0) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Tensors of one shape (..., vocab) as matrices (rows, vocab) without a copy, with the flat rows each covers."""
    if tensors[0].ndim <= 2 or all(t.is_contiguous() for t in tensors):
        matrices = [t if t.ndim == 2 else t.view(-1, t.shape[-1]) for t in tensors]
        yield slice(start, start + len(matrices[0])), matrices
        return
    rows = tensors[0][0].numel() // tensors[0].shape[-1]
    for i, parts in enumerate(zip(*tensors, strict=True)):
        yield from _matrices(*parts, start=start + i * rows)


def _row_stats_torch(logits, targets, mask, bias, temperature, scale, softcap, for_backward=True):
    transform = _transform(temperature, scale, softcap)
    try:
        if logits.ndim == 2:
            return reference.row_stats(logits, targets, mask, bias, transform, for_backward)
        y = targets.reshape(-1)
        active = None if mask is None else mask.reshape(-1)
        out = [
            reference.row_stats(matrix, y[at], None if active is None else active[at], bias, transform)
            for at, (matrix,) in _matrices(logits)
        ]
    except RuntimeError:
        check_target_range(targets, mask, logits.shape[-1])
        raise
    joined = out[0] if len(out) == 1 else (torch.cat(field) for field in zip(*out, strict=True))
    return tuple(t.view(targets.shape) for t in joined)


def _write_gradient_torch(
    out: torch.Tensor, logits: torch.Tensor, targets, mask, bias, temperature, scale, softcap, *rest: Any
) -> torch.Tensor:
    """Fill `out` with the gradient of the logits; returns that of the bias."""
    *stats_and_gradients, needs_bias = rest
    transform = _transform(temperature, scale, softcap)
    d_bias = None
    if needs_bias:
        d_bias = torch.zeros(bias.shape, dtype=arithmetic_dtype(logits.dtype), device=logits.device)
    for at, (matrix, written) in _matrices(logits, out):
        part: list[Any] = [None if t is None else t.reshape(-1)[at] for t in (targets, mask, *stats_and_gradients)]
        y, active, *values = part
        stats, gradients = RowStats(*values[:4]), RowGradients(*values[4:])
        reference.row_stats_backward(matrix, y, active, bias, transform, stats, gradients, written, d_bias)
    return logits.new_empty(0) if d_bias is None else d_bias.to(bias.dtype)


def _row_stats_backward_torch(logits, *rest):
    out = empty_gradient(logits)
    return out, _write_gradient_torch(out, logits, *rest)


def _row_stats_backward_in_place_torch(logits, *rest):
    return _write_gradient_torch(logits, logits, *rest)


def _sequence_stats_torch(
    logits, tokens, attention_mask, prompt_lens, eos_token_ids, include_eos, stop_at_eos, bias, *transform
):
    check_prompt_lens(prompt_lens, tokens.shape[1])
    masks = token_masks(
        tokens,
        generated_columns(attention_mask != 0, prompt_lens),
        Counting(tuple(eos_token_ids), include_eos, stop_at_eos),
    )
    stats = _row_stats_torch(logits[:, :-1], tokens[:, 1:], masks.generated[:, 1:], bias, *transform)
    stats = RowStats(*(torch.nn.functional.pad(t, (1, 0)) for t in stats))
    sums = torch.stack(
        [
            torch.where(masks.counted, stats.logprob, 0.0).sum(1, dtype=torch.float64),
            torch.where(masks.counted, stats.entropy, 0.0).sum(1, dtype=torch.float64),
            stats.logprob.sum(1, dtype=torch.float64),
        ]
    )
    return (*stats, masks.lengths, masks.eos_column, masks.runs_past_eos, sums)


# Triton. The kernels are imported when a GPU first needs them.


def as_rows(logits: torch.Tensor) -> torch.Tensor:
    """A view (outer, inner, vocab); a copy only for layouts that two row strides cannot describe."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.ndim == 3:
        return logits
    if logits.ndim < 3:
        return logits[(None,) * (3 - logits.ndim)]
    return logits.reshape(-1, *logits.shape[-2:])


def _contiguous(tensor: Any) -> Any:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _row_stats_triton(logits, targets, mask, bias, temperature, scale, softcap, for_backward=True):
    from entropy_fast.kernels.rows import row_stats

    return row_stats(
        as_rows(logits),
        _contiguous(targets),
        _contiguous(mask),
        _contiguous(bias),
        _transform(temperature, scale, softcap),
        for_backward=for_backward,
    )


def _write_gradient_triton(out, logits, targets, mask, bias, temperature, scale, softcap, *rest):
    from entropy_fast.kernels.rows_backward import row_stats_backward

    *values, needs_bias = rest
    stats = [_contiguous(t) for t in values[:4]]
    gradients = [t if t is None or is_expanded(t) else _contiguous(t) for t in values[4:]]
    row_stats_backward(
        as_rows(logits),
        _contiguous(targets),
        _contiguous(mask),
        _contiguous(bias),
        _transform(temperature, scale, softcap),
        RowStats(*stats),
        RowGradients(*gradients),
        as_rows(out),
    )
    if not needs_bias:
        return logits.new_empty(0)
    return out.reshape(-1, out.shape[-1]).sum(0, dtype=arithmetic_dtype(out.dtype)).to(bias.dtype)


def _row_stats_backward_triton(logits, *rest):
    out = empty_gradient(logits)
    return out, _write_gradient_triton(out, logits, *rest)


def _row_stats_backward_in_place_triton(logits, *rest):
    return _write_gradient_triton(logits, logits, *rest)


@cache
def _on_device(ids: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=device)


def _sequence_stats_triton(
    logits, tokens, attention_mask, prompt_lens, eos_token_ids, include_eos, stop_at_eos, bias, *transform
):
    from entropy_fast.kernels.rows import sequence_stats

    stats, sequences = sequence_stats(
        as_rows(logits),
        _contiguous(tokens),
        _contiguous(attention_mask),
        _contiguous(prompt_lens),
        _on_device(tuple(eos_token_ids), logits.device),
        include_eos,
        stop_at_eos,
        _contiguous(bias),
        _transform(*transform),
    )
    return (*stats, sequences.lengths, sequences.eos_column, sequences.runs_past_eos, sequences.sums)


LIBRARY.impl("row_stats", outside_autocast(_row_stats_torch), "CPU")
LIBRARY.impl("row_stats_backward", outside_autocast(_row_stats_backward_torch), "CPU")
LIBRARY.impl("row_stats_backward_", outside_autocast(_row_stats_backward_in_place_torch), "CPU")
LIBRARY.impl("sequence_stats", outside_autocast(_sequence_stats_torch), "CPU")
LIBRARY.impl("row_stats", _row_stats_triton, "CUDA")
LIBRARY.impl("row_stats_backward", _row_stats_backward_triton, "CUDA")
LIBRARY.impl("row_stats_backward_", _row_stats_backward_in_place_triton, "CUDA")
LIBRARY.impl("sequence_stats", _sequence_stats_triton, "CUDA")


# Calls


def nobody_looks(tensor: torch.Tensor) -> bool:
    """Whether an operator on this tensor may be called past the dispatcher.

    So it is without a compiler, a tracer or a transform, and for a plain tensor. Autograd is the caller's concern.
    """
    plain = not torch.compiler.is_compiling() and type(tensor) is torch.Tensor
    return plain and not (is_in_torch_dispatch_mode() or torch._C._functorch.peek_interpreter_stack())


def row_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    temperature: torch.Tensor,
    scale: float,
    softcap: float | None,
    *,
    for_backward: bool = True,
) -> tuple[Any, ...]:
    """The operator; without `for_backward`, peak and log_sum may be missing or empty.

    Where nothing looks at operators the implementation is called outright: the dispatcher costs the host as much as a
    small kernel runs, or as a few rows take a CPU.
    """
    if logits.device.type in ("cpu", "cuda") and nobody_looks(logits):
        if logits.is_cuda:
            return _row_stats_triton(logits, targets, mask, bias, temperature, scale, softcap, for_backward)
        if not torch.is_autocast_enabled("cpu"):
            return _row_stats_torch(logits, targets, mask, bias, temperature, scale, softcap, for_backward)
    return torch.ops.entropy_fast.row_stats.default(logits, targets, mask, bias, temperature, scale, softcap)


# Shapes for torch.compile


def _fake_stats(logits, targets):
    dtype = arithmetic_dtype(logits.dtype)
    return tuple(logits.new_empty(targets.shape, dtype=dtype) for _ in range(4))


@torch.library.register_fake("entropy_fast::row_stats")
def _row_stats_fake(logits, targets, *_):
    return _fake_stats(logits, targets)


@torch.library.register_fake("entropy_fast::row_stats_backward")
def _row_stats_backward_fake(logits, *rest):
    out = empty_gradient(logits)
    return out, _row_stats_backward_in_place_fake(logits, *rest)


@torch.library.register_fake("entropy_fast::row_stats_backward_")
def _row_stats_backward_in_place_fake(logits, targets, mask, bias, *rest):
    needs_bias = rest[-1]
    return bias.new_empty(bias.shape) if needs_bias else logits.new_empty(0)


@torch.library.register_fake("entropy_fast::sequence_stats")
def _sequence_stats_fake(logits, tokens, *_):
    n = tokens.shape[0]
    return (
        *_fake_stats(logits, tokens),
        tokens.new_empty(n, dtype=torch.int32),
        tokens.new_empty(n, dtype=torch.int64),
        tokens.new_empty(n, dtype=torch.bool),
        tokens.new_empty(3, n, dtype=torch.float64),
    )
