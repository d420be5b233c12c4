"""Launching at a low cost to the host: what Triton's launcher works out anew on every call is remembered.

Triton looks at every argument to find the compiled kernel that fits; on a slow host that takes longer than many of the
kernels here run. The key below holds all that a compiled kernel depends on: its variant, the tensors' dtypes and
whether they start on 16 bytes, the descriptors' types, and whether an integer needs 64 bits. So kernels launched here
must name all their integers in `do_not_specialize`.

Who launches on tensors that are alike from call to call can leave the key out as well (`Repeated`). And `empties` makes
tensors the way compiled code does, in a quarter of the time that torch.empty takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver


class Variant:
    """Constants and options with which a kernel is compiled; compared by identity, so make each one once.

    Args:
        constants: the kernel's last parameters, by name and in order.
        options: Triton's (num_warps and so on).
    """

    def __init__(self, constants: dict[str, Any], **options: Any) -> None:
        self.constants = constants
        self.values = tuple(constants.values())
        self.options = options


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉; Triton's own takes the host several microseconds."""
    return -(-a // b)


_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    programs: int,
    tensors: Sequence[torch.Tensor | None],
    integers: Sequence[int],
    floats: Sequence[float],
    variant: Variant,
    descriptors: Sequence[Any] = (),
) -> Callable[..., None] | None:
    """Run `programs` programs of a kernel of descriptors, tensors, integers, floats and constants, in that order.

    The first tensor is not None. Multiply-adds are fused, whatever Triton's default, unless the variant says otherwise.

    Returns:
        A function of the descriptors and of the tensors' addresses that launches the same again, for tensors of the
        same dtypes that start on 16 bytes where these do, while their device is the current one. None in the
        interpreter.
    """
    device = tensors[0].device  # type: ignore[union-attr]
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, tensors, integers, floats, variant, descriptors)
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    key = (
        id(kernel),
        variant,
        device,
        *[None if t is None else t.dtype for t in tensors],
        *[None if a is None else a % 16 == 0 for a in addresses],
        *[None if d is None else (d.base.dtype, *d.block_shape) for d in descriptors],
        *[n.bit_length() > 31 for n in integers],
    )
    numbers = (*integers, *floats)
    remembered = key in _compiled
    if not remembered:
        options = {"enable_fp_fusion": True} | variant.options
        compiled = kernel[(programs,)](*descriptors, *tensors, *numbers, **variant.constants, **options)
        if compiled is None:  # the interpreter compiles nothing
            return None
        _compiled[key] = compiled
    again = partial(_run, _compiled[key], device.index, programs, (*numbers, *variant.values))
    if remembered:
        again(*descriptors, *addresses)
    return again


def _run(compiled: Any, device: int, programs: int, rest: tuple[Any, ...], *arguments: Any) -> None:
    """Launch on the current stream, with addresses for tensors: the launcher asks the driver about every tensor.

    What Triton prepares for hooks, those of a profiler, is left out where there are none.
    """
    stream = driver.active.get_current_stream(device)
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        compiled[(programs, 1, 1)](*arguments, *rest, stream=stream)
    else:
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments, *rest)


class Repeated:
    """A launch on tensors that are alike from call to call: in dtypes, device and whether they start on 16 bytes."""

    def __init__(
        self, kernel: Any, programs: int, integers: Sequence[int], floats: Sequence[float], variant: Variant
    ) -> None:
        self._kernel = kernel
        self._programs = programs
        self._rest = (integers, floats, variant)
        self._again: Callable[..., None] | None = None

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Run it; the device of the tensors is the current one."""
        if self._again is not None:
            self._again(*[None if t is None else t.data_ptr() for t in tensors])
        else:
            self._again = launch(self._kernel, self._programs, tensors, *self._rest)


def empties(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    """Makes contiguous tensors with nothing in them, while `device` is the current one and no tracer looks."""
    if device.type != "cuda":
        return partial(torch.empty, shape, dtype=dtype, device=device)
    strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return partial(torch._C._dynamo.guards._empty_strided_cuda, tuple(shape), strides, dtype)


# zeros are kept up to so many, 16 MB, and beside them 4 MB on each device for graphs
KEPT, FOR_GRAPHS = 1 << 22, 1 << 20
_zeros: dict[tuple[torch.device, int], torch.Tensor] = {}
# of the zeros for graphs, those that no graph has yet
_for_graphs: dict[torch.device, torch.Tensor] = {}


def zeros_between_launches(count: int, device: torch.device) -> torch.Tensor:
    """At least `count` zeros in int32, for a kernel on the current stream that leaves them zero when it ends.

    One tensor for each stream, whose kernels run one after the other. A launch that is captured into a graph, which may
    be replayed on any stream, gets zeros that are its own for good. Where there are none left, or where a call wants
    very many, they are written for that call, which takes a launch more.
    """
    if device.type != "cuda" or count > KEPT:
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _zeros_for_a_graph(count, device)
    key = device, driver.active.get_current_stream(device.index)
    zeros = _zeros.get(key)
    if zeros is None or len(zeros) < count:
        zeros = _zeros[key] = torch.zeros(max(count, 1 << 16), dtype=torch.int32, device=device)
        if device not in _for_graphs:
            # made here because memory that is taken during a capture is the graph's, and done before any replay
            _for_graphs[device] = torch.zeros(FOR_GRAPHS, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()
    return zeros


def _zeros_for_a_graph(count: int, device: torch.device) -> torch.Tensor:
    left = _for_graphs.get(device)
    if left is None or len(left) < count:
        return torch.zeros(count, dtype=torch.int32, device=device)
    # whole cache lines, so that what is left starts at one
    _for_graphs[device] = left[ceil_div(count, 32) * 32 :]
    return left[:count]
