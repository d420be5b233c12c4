"""Calls that are like an earlier one: on a GPU, what an earlier call has checked and worked out is used again.

A call's key holds all that checks and launches depend on, which is everything but the numbers in the tensors. Under it
stands the kernel's forward, made for tensors of that layout. Calls that a tracer, a transform or a mode looks at have
no key, and neither have those with tensors of other classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from entropy_fast.functional.operators import as_rows, nobody_looks
from entropy_fast.reference.rows import RowStats
from entropy_fast.reference.transform import Transform

DEVICES = ("cuda",)
MOST = 256
_forwards: dict[tuple[Any, ...], Callable[..., RowStats]] = {}


def call_key(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
    for_backward: bool,
) -> tuple[Any, ...] | None:
    """The key of a call of the operator `row_stats`, None where it has none."""
    if logits.device.type not in DEVICES or not nobody_looks(logits) or type(targets) is not torch.Tensor:
        return None
    if mask is not None and type(mask) is not torch.Tensor:
        return None
    if bias is not None and type(bias) not in (torch.Tensor, torch.nn.Parameter):
        return None
    return (
        _layout(logits),
        _layout(targets),
        None if mask is None else _layout(mask),
        None if bias is None else _layout(bias),
        temperature,
        scale,
        softcap,
        for_backward,
    )


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16


def find(key: tuple[Any, ...] | None) -> Callable[..., RowStats] | None:
    """The forward of (logits, targets, mask, bias) that is remembered under a key."""
    return None if key is None else _forwards.get(key)


def remember(
    key: tuple[Any, ...] | None,
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    temperature: float,
    scale: float,
    softcap: float | None,
    for_backward: bool,
) -> Callable[..., RowStats] | None:
    """Remember the forward of a call that has passed all checks; None where the kernel cannot take it as it is."""
    if key is None or not all(type(n) in (int, float, type(None)) for n in (temperature, scale, softcap)):
        return None
    from entropy_fast.kernels.rows import Forward

    rows = as_rows(logits)
    if rows.data_ptr() != logits.data_ptr() or not all(t is None or t.is_contiguous() for t in (targets, mask, bias)):
        return None
    if len(_forwards) >= MOST:
        _forwards.clear()
    forward = Forward(rows, targets, mask, bias, Transform(temperature, scale, softcap), for_backward=for_backward)
    _forwards[key] = forward
    return forward
