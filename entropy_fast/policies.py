"""Policies that come and go: other weights in the same model for as long as a `with` lasts.

Weights are never written over: each parameter's data is replaced and the old tensor put back, so restoring is exact
and costs no copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from entropy_fast.errors import InputError


@contextlib.contextmanager
def replaced(new: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """While entered, each parameter holds the given data (its own device; the dtype may differ from its own)."""
    old = {parameter: parameter.data for parameter in new}
    try:
        for parameter, data in new.items():
            parameter.data = data.to(parameter.device)
        yield
    finally:
        for parameter, data in old.items():
            parameter.data = data


@contextlib.contextmanager
def moved(direction: Mapping[nn.Parameter, Tensor], eta: float, *, round_to_dtype: bool = True) -> Iterator[None]:
    """While entered, the weights are θ + η v.

    Args:
        direction: v, by parameter, in float32 or wider; parameters that it lacks stay.
        eta: the step along v.
        round_to_dtype: keep each parameter's dtype. False leaves low-precision weights in v's dtype, so that a small
            step is not rounded away; score with `precision="float32"` then.
    """

    def target(parameter: nn.Parameter, v: Tensor) -> Tensor:
        wide = torch.promote_types(parameter.dtype, v.dtype)
        result = parameter.data.to(wide) + eta * v.to(parameter.device, wide)
        return result.to(parameter.dtype) if round_to_dtype else result

    with replaced({parameter: target(parameter, v) for parameter, v in direction.items()}):
        yield


@contextlib.contextmanager
def with_state(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """While entered, `model` has the weights of `state` (a state dict; keys that it lacks stay as they are).

    Raises:
        InputError: a key that the model doesn't have, another shape, or a buffer with other values.
    """
    new = {parameter: tensor.to(parameter.dtype) for parameter, tensor in _matched(model, state).items()}
    with replaced(new):
        yield


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """While entered, a model wrapped by peft runs without its adapters: the base policy.

    Raises:
        InputError: the model has no adapter to switch off.
    """
    switch = getattr(model, "disable_adapter", None)
    if switch is None:
        raise InputError(f"{type(model).__name__} has no adapter to switch off; wrap it with peft.PeftModel")
    with switch():
        yield


def adapter_direction(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """What a LoRA adapter adds to each weight of its base model, as a direction v from the base policy.

    Args:
        model: wrapped by peft, its adapter active. Run it inside `adapter_off` to move the base along v.

    Raises:
        InputError: no adapter, or one that does more than add matrices to weights.
    """
    direction: dict[nn.Parameter, Tensor] = {}
    for name, module in model.named_modules():
        if getattr(module, "modules_to_save", None) and name:  # the wrapper at the root only lists them
            raise InputError(f"the adapter replaces {name} as a whole; compare it instead of moving along it")
        delta = getattr(module, "get_delta_weight", None)
        base = getattr(module, "base_layer", None)
        if delta is None or not isinstance(base, nn.Module):
            continue
        weight = base.weight
        total = sum(delta(adapter).detach().float() for adapter in module.active_adapters)
        direction[weight] = total  # type: ignore[index]
    if not direction:
        raise InputError(f"{type(model).__name__} has no LoRA matrices to move along; give a LoRA adapter")
    return direction


def state_difference(model: nn.Module, state: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    """v = state − θ for every parameter named in `state`, in float32 or wider, to go along with `moved`.

    Raises:
        InputError: see `with_state`.
    """
    result = {}
    for parameter, tensor in _matched(model, state).items():
        wide = torch.promote_types(torch.promote_types(parameter.dtype, tensor.dtype), torch.float32)
        result[parameter] = tensor.to(parameter.device, wide) - parameter.data.to(wide)
    return result


def _matched(model: nn.Module, state: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    """The tensors of a state dict by the parameter that they are for; what does not fit is an InputError."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    matched: dict[nn.Parameter, Tensor] = {}
    for name, tensor in state.items():
        if name in buffers:
            if not torch.equal(buffers[name].cpu(), tensor.to(buffers[name].dtype).cpu()):
                raise InputError(
                    f"buffer {name} differs between the two policies; load the second as a model of its own"
                )
            continue
        if name not in parameters:
            raise InputError(f"the state dict has {name}, which {type(model).__name__} lacks; is it of the same model?")
        parameter = parameters[name]
        if parameter.shape != tensor.shape:
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)} in the state dict and {tuple(parameter.shape)} in the model"
            )
        matched[parameter] = tensor
    return matched
