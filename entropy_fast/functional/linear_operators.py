"""The operators behind `linear_token_stats`: one schema, an implementation by device, and shapes for the compiler.

`entropy_fast::linear_stats` gives (logprob, entropy, peak, log_sum), each (rows,), the last two for the backward (see
`reference.linear.LinearStats`), and with `max_dropped_mass` above 0 the mass dropped from each row's gradient, (rows,),
and the slabs kept, (slabs, rows); `linear_stats_backward` gives the gradients of hidden, weight and bias, empty where
none was asked for. Masked rows are taken out before the product, which on a GPU waits once for their number. The
temperature is a tensor for the compiler's sake, as in `operators`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from entropy_fast.functional.operators import nobody_looks, outside_autocast
from entropy_fast.functional.validation import check_target_range
from entropy_fast.reference import linear as reference
from entropy_fast.reference.filtering import choose_slabs
from entropy_fast.reference.linear import LinearStats
from entropy_fast.reference.rows import RowGradients, arithmetic_dtype
from entropy_fast.reference.transform import Transform

PRECISIONS = ("exact", "accurate", "fast")

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? mask, "
    "Tensor temperature, float scale, float? softcap, str precision"
)
_SAVED = "Tensor logprob, Tensor entropy, Tensor peak, Tensor log_sum"
_GRADS = "Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_lse, bool[3] needs"

LIBRARY = torch.library.Library("entropy_fast", "FRAGMENT")
LIBRARY.define(f"linear_stats({_INPUTS}, float max_dropped_mass) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(f"linear_stats_backward({_INPUTS}, {_SAVED}, Tensor kept, {_GRADS}) -> (Tensor, Tensor, Tensor)")


def implementation(hidden: torch.Tensor, precision: str) -> Any:
    """The module whose `linear_stats` and `linear_backward` serve these inputs: Triton kernels or plain torch.

    float64 and exact float32 are the library's GEMMs whatever the device; so is everything where Triton has no kernels.
    """
    if hidden.device.type != "cuda" or hidden.dtype == torch.float64 or not has_triton(hidden.device):
        return reference
    from entropy_fast.kernels import linear

    exact = precision == "exact" or (precision == "accurate" and not linear.has_accurate(hidden.device))
    return reference if hidden.dtype == torch.float32 and exact else linear


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for this GPU."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _stats(
    hidden,
    weight,
    targets,
    bias,
    mask,
    temperature,
    scale,
    softcap,
    precision,
    max_dropped_mass,
    *,
    for_backward=True,
    memory=None,
):
    """The operator; `memory` is for the kernels' forward to save exponentials in, see `kernels.linear_forward`."""
    total, filtered = hidden.shape[0], max_dropped_mass > 0
    # of few logits the statistics themselves find a target outside
    few = not filtered and total * weight.shape[0] <= reference.FEW_LOGITS
    if not few:
        check_target_range(targets, mask, weight.shape[0])
    rows = _active(mask)
    x, y = (hidden, targets) if rows is None else (hidden[rows], targets[rows])
    dropped = kept = None
    if len(x) == 0:
        zeros = [torch.zeros(total, dtype=arithmetic_dtype(hidden.dtype), device=hidden.device) for _ in range(5)]
        stats, dropped = tuple(zeros[:4]), zeros[4] if filtered else None
    else:
        module = implementation(hidden, precision)
        transform = Transform(temperature.item(), scale, softcap)
        options = {"for_backward": for_backward} if module is reference else {"memory": memory}
        try:
            with ieee_products(hidden):
                stats, slab_lse = module.linear_stats(
                    x, weight, y, bias, transform, filtered=filtered, precision=precision, **options
                )
        except RuntimeError:
            check_target_range(targets, mask, weight.shape[0])
            raise
        if slab_lse is not None:
            target_slab = y // module.filter_columns(hidden.device)
            kept, dropped = choose_slabs(slab_lse, stats.peak + stats.log_sum, target_slab, max_dropped_mass)
            dropped = _in_place_of(dropped, rows, total)
        if rows is not None:
            stats = tuple(_in_place_of(t, rows, total) if len(t) else t for t in stats)
    if not for_backward:
        return *stats, dropped, kept
    if dropped is None:
        dropped = stats[0].new_empty(0)
    return *stats, dropped, torch.empty(0, 0, dtype=torch.bool, device=hidden.device) if kept is None else kept


compute_stats = outside_autocast(_stats)


def is_plain(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether operators on these may be passed by: no subclass of tensors, nobody looks."""
    return type(weight) in (torch.Tensor, torch.nn.Parameter) and nobody_looks(hidden)


def is_differentiable(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether what is computed from these will have a gradient."""
    tensors = (hidden, weight) if bias is None else (hidden, weight, bias)
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def linear_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    *rest: Any,
    for_backward: bool = True,
) -> tuple[Any, ...]:
    """The operator; where no gradient is wanted and nothing looks at operators, past the dispatcher.

    Without `for_backward`, what only the backward needs (all but the first two, and the dropped mass) may be missing or
    empty.
    """
    device = hidden.device.type
    alone = is_plain(hidden, weight) and device in ("cpu", "cuda") and not torch.is_autocast_enabled(device)
    if alone and not is_differentiable(hidden, weight, bias):
        return _stats(hidden, weight, targets, bias, *rest, for_backward=for_backward)
    return torch.ops.entropy_fast.linear_stats.default(hidden, weight, targets, bias, *rest)


@outside_autocast
def compute_gradients(
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
    kept,
    grad_logprob,
    grad_entropy,
    grad_lse,
    needs,
    memory=None,
):
    """`linear_stats_backward`; `memory` is what the forward filled, for this to use up."""
    rows = _active(mask)
    x, y = _rows_of((hidden, targets), rows)
    if len(x) == 0:
        like = (hidden, weight, weight[:, 0] if bias is None else bias)
        return tuple(t.new_zeros(t.shape if needed else 0) for t, needed in zip(like, needs, strict=True))
    with ieee_products(hidden):
        gradients = implementation(hidden, precision).linear_backward(
            x,
            weight,
            y,
            bias,
            Transform(temperature.item(), scale, softcap),
            LinearStats(*_rows_of((logprob, entropy, peak, log_sum), rows)),
            RowGradients(*_rows_of((grad_logprob, grad_entropy, grad_lse), rows)),
            tuple(needs),
            kept if kept.numel() else None,
            precision,
            **({} if memory is None else {"memory": memory}),
        )
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if t is None else t for t in gradients)
    return _in_place_of(d_hidden, rows, hidden.shape[0]) if needs[0] else d_hidden, d_weight, d_bias


def ieee_products(hidden: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Float32 library GEMMs on a GPU multiply float32, whatever torch's TF32 setting."""
    if hidden.dtype != torch.float32 or hidden.device.type != "cuda":
        return contextlib.nullcontext()
    return _without_tf32()


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    setting = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(setting)


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
    LIBRARY.impl("linear_stats", compute_stats, _device)
    LIBRARY.impl("linear_stats_backward", compute_gradients, _device)


@torch.library.register_fake("entropy_fast::linear_stats")
def _stats_fake(hidden, weight, _targets, _bias, mask, *rest):
    dtype = arithmetic_dtype(hidden.dtype)
    stats = [hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(4)]
    if rest[-1] <= 0:
        return *stats, hidden.new_empty(0, dtype=dtype), hidden.new_empty((0, 0), dtype=torch.bool)
    columns = implementation(hidden, rest[-2]).filter_columns(hidden.device)
    active = hidden.shape[0] if mask is None else torch.library.get_ctx().new_dynamic_size()
    kept = hidden.new_empty((-(-weight.shape[0] // columns), active), dtype=torch.bool)
    return *stats, hidden.new_empty(hidden.shape[0], dtype=dtype), kept


@torch.library.register_fake("entropy_fast::linear_stats_backward")
def _stats_backward_fake(hidden, weight, _targets, bias, *rest):
    like = (hidden, weight, weight[:, 0] if bias is None else bias)
    needs = rest[-1]
    return tuple(t.new_empty(t.shape if needed else 0) for t, needed in zip(like, needs, strict=True))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets, bias, mask, temperature, *ctx.options = inputs
    logprob, entropy, peak, log_sum, dropped, kept = output
    ctx.save_for_backward(hidden, weight, targets, bias, mask, temperature, logprob, entropy, peak, log_sum, kept)
    # peak + log_sum is the log-sum-exp: log_sum carries the derivative of both
    ctx.mark_non_differentiable(peak, dropped, kept)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any,
    grad_logprob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    _grad_peak: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    *_grads_of_the_rest: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    if grad_logprob is None and grad_entropy is None and grad_lse is None:
        return (None,) * len(ctx.needs_input_grad)
    inputs, stats = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
    needs_hidden, needs_weight, _, needs_bias, *_ = needs = ctx.needs_input_grad
    gradients = torch.ops.entropy_fast.linear_stats_backward(
        *inputs,
        *ctx.options[:-1],
        *stats,
        grad_logprob,
        grad_entropy,
        grad_lse,
        [needs_hidden, needs_weight, needs_bias],
    )
    return in_their_places(gradients, needs)


def in_their_places(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor], needs: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of hidden, weight and bias as those of all inputs; None where the autograd needs none."""
    d_hidden, d_weight, d_bias = gradients
    found = (d_hidden, d_weight, None, d_bias) + (None,) * (len(needs) - 4)
    return tuple(gradient if needed else None for gradient, needed in zip(found, needs, strict=True))


def _refuse_second_derivative(_ctx: Any, *_grads: torch.Tensor) -> None:
    raise NotImplementedError("linear_token_stats has no second derivative; take it through torch.log_softmax")


torch.library.register_autograd("entropy_fast::linear_stats", _differentiate, setup_context=_save_for_backward)
torch.library.register_autograd("entropy_fast::linear_stats_backward", _refuse_second_derivative)
