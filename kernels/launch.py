"""Launching at a low cost to the host: what Triton's launcher works out anew on every call is remembered.

Triton looks at every argument to find the compiled kernel that fits; on a slow host that takes longer than many of the
kernels here run. The key below holds all that a compiled kernel depends on: constants, options, the tensors' dtypes
and whether they start on 16 bytes, and whether an integer needs 64 bits. So kernels launched here must name all their
integers in `do_not_specialize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    programs: int,
    tensors: Sequence[torch.Tensor | None],
    integers: Sequence[int],
    floats: Sequence[float],
    constants: dict[str, Any],
    descriptors: Sequence[Any] = (),
    **options: Any,
) -> None:
    """Run `programs` programs of a kernel of descriptors, tensors, integers, floats and constants, in that order.

    A descriptor's type must follow from the constants and the tensors' dtypes; None for none. `options` are Triton's
    (num_warps and so on). Multiply-adds are fused, whatever Triton's default.
    """
    device = next(t.device for t in tensors if t is not None)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, tensors, integers, floats, constants, descriptors, **options)
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    key = (
        id(kernel),
        device,
        *[None if t is None else t.dtype for t in tensors],
        *[None if a is None else a % 16 == 0 for a in addresses],
        *[n.bit_length() > 31 for n in integers],
        *[d is None for d in descriptors],
        *constants.values(),
        *options.values(),
    )
    compiled = _compiled.get(key)
    if compiled is not None:
        # addresses rather than tensors: the launcher asks the driver about every tensor
        compiled[(programs, 1, 1)](*descriptors, *addresses, *integers, *floats, *constants.values())
        return None
    arguments = (*descriptors, *tensors, *integers, *floats)
    compiled = kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True, **options)
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled
    return None
