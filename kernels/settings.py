"""Launch settings by GPU, width of the logits and size of the vocabulary; measured once, never tuned at run time."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Settings(NamedTuple):
    """Block shape and launch parameters of the forward over rows of logits.

    Attributes:
        unroll: steps of `lanes` × width elements in a block.
        lanes: independent running sums of a program.
        warps: warps of a program.
        stages: depth of the software pipeline of loads.
        segments: pieces that a row is cut into; part of the result's bits, so never a function of the number of rows.
        per_multiprocessor: programs resident on a multiprocessor.
        registers: most registers of a thread, where the compiler's own choice costs residency.
    """

    unroll: int
    lanes: int
    warps: int
    stages: int
    segments: int
    per_multiprocessor: int
    registers: int | None = None


class BackwardSettings(NamedTuple):
    """Block shape of the backward: programs of `steps` blocks of `block` elements of one row, `warps` warps each."""

    block: int
    steps: int
    warps: int


def vector_width(logits: torch.Tensor) -> int:
    """The most elements that one load can take, up to 16 bytes, given where the rows of `logits` start."""
    width = 16 // logits.element_size()
    while width > 1 and (
        logits.data_ptr() % (width * logits.element_size()) or any(n % width for n in logits.stride()[:-1])
    ):
        width //= 2
    return width


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of full size the device runs at once; 1 off the GPU, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def forward_settings(vocab: int, itemsize: int, width: int) -> Settings:
    return Settings(2, 256, 8, 3, 1 if vocab < 16384 else 4, 4)


def backward_settings(vocab: int, itemsize: int, width: int) -> BackwardSettings:
    return BackwardSettings(4096, 2, 8)
