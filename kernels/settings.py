"""Launch settings by GPU, width of the logits and size of the vocabulary; measured once, never tuned at run time."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Settings(NamedTuple):
    """Block shape and launch parameters of the forward over rows of logits.

    Attributes:
        unroll: 16-byte loads of a lane in a block.
        lanes: independent running sums of a program.
        warps: warps of a program.
        stages: depth of the software pipeline of loads.
        segments: pieces that a row is cut into; part of the result's bits, so never a function of the number of rows.
        resident: programs that a multiprocessor runs at once.
        split: rows a multiprocessor below which programs share rows, a segment each.
        registers: most registers of a thread, where the compiler's own choice costs residency.
    """

    unroll: int
    lanes: int
    warps: int
    stages: int
    segments: int
    resident: int
    split: int
    registers: int | None = None


class BackwardSettings(NamedTuple):
    """Elements of a row that a program of the backward takes, and its warps."""

    block: int
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
    """Multiprocessors of the device; 1 off the GPU, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def forward_settings(logits: torch.Tensor) -> Settings:
    """The table's entry for these logits."""
    vocab = logits.shape[-1]
    if vocab < 2048:
        return Settings(2, 32, 1, 3, 1, 16, 0)
    if vocab < 65536:
        return Settings(2, 64, 2, 6, 1, 16, 0)
    return Settings(2, 128, 4, 3, 4, 8, 4, 64)


def backward_settings(itemsize: int) -> BackwardSettings:
    """The table's entry for logits of `itemsize` bytes."""
    return BackwardSettings(8192 // itemsize, 8)
