"""Launching at a low cost to the host: what Triton's launcher works out anew on every call is remembered.

Triton looks at every argument to find the compiled kernel that fits; on a slow host that takes longer than many of the
kernels here run. The key below holds all that a compiled kernel depends on: its variant, the tensors' dtypes and
whether they start on 16 bytes, the descriptors' types, and whether an integer needs 64 bits. So kernels launched here
must name all their integers in `do_not_specialize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


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
) -> None:
    """Run `programs` programs of a kernel of descriptors, tensors, integers, floats and constants, in that order.

    The first tensor is not None. Multiply-adds are fused, whatever Triton's default, unless the variant says otherwise.
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
    compiled = _compiled.get(key)
    if compiled is not None:
        # addresses rather than tensors: the launcher asks the driver about every tensor
        compiled[(programs, 1, 1)](*descriptors, *addresses, *integers, *floats, *variant.values)
        return None
    arguments = (*descriptors, *tensors, *integers, *floats)
    compiled = kernel[(programs,)](*arguments, **variant.constants, **({"enable_fp_fusion": True} | variant.options))
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled
    return None
