"""The mode and the precision that a model runs in while it is scored, taken back whatever happens."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from entropy_fast.forwards import forwards_replaced
from entropy_fast.fusion import float32_linear

Precision = Literal["as_loaded", "float32", "tf32"]
_LOW = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` while entered; every module gets its own training flag back."""
    training = [module for module in model.modules() if module.training]
    if training:  # setting the flag of a thousand modules takes milliseconds
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def one_at_a_time(model: nn.Module) -> Iterator[None]:
    """Threads that score the same model take turns: while it is scored, its modules are not as they were."""
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        yield


_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@contextlib.contextmanager
def one_cpu_thread(device: torch.device) -> Iterator[None]:
    """While a GPU does the work, the CPU's part in it, small tensors of indices, is done by one thread.

    More would only wake each other for every operation, which can take longer than the GPU's whole pass.
    """
    threads = torch.get_num_threads()
    if device.type != "cuda" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def model_precision(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Run `model` in a precision.

    Args:
        model: its weights keep their dtype and their bits.
        precision: `as_loaded` changes nothing. `float32` raises low-precision weights one module at a time, while
            that module runs, and allows no TF32; the model's own code then computes in float32 throughout. Where
            kernels may be used (`fusion`), linear layers take bfloat16 weights as they are. `tf32` is as loaded with
            TF32 matrix products allowed.
    """
    if precision == "as_loaded":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    try:
        with _raised(model) if precision == "float32" else contextlib.nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _raised(model: nn.Module) -> Iterator[None]:
    """Hooks that hold a module's own low-precision tensors as float32 while its forward runs; linear layers do so."""
    handles = []
    linears = []
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        low = [t for t in own if t.dtype in _LOW]
        if type(module) is nn.Embedding and low:
            # a row looked up and then raised has the same bits, without a raised copy of the whole vocabulary
            handles.append(module.register_forward_hook(lambda _, __, output: output.float()))
        elif type(module) is nn.Linear and low and "forward" not in vars(module):
            linears.append((module, functools.partial(float32_linear, module)))
        elif low:
            stack: list[list[Tensor]] = []

            def raise_(_: nn.Module, __: object, low: list[Tensor] = low, stack: list[list[Tensor]] = stack) -> None:
                stack.append([t.data for t in low])
                for t in low:
                    t.data = t.data.float()

            def lower(
                _: nn.Module, __: object, ___: object, low: list[Tensor] = low, stack: list[list[Tensor]] = stack
            ) -> None:
                for t, data in zip(low, stack.pop(), strict=True):
                    t.data = data

            handles.append(module.register_forward_pre_hook(raise_))
            # always_call: the weights come back also when the forward raises
            handles.append(module.register_forward_hook(lower, always_call=True))
    try:
        with forwards_replaced(linears):
            yield
    finally:
        for handle in handles:
            handle.remove()
