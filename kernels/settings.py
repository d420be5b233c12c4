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
        segments: pieces that a row is cut into; part of the result's bits, so never a function of the number of rows.
        resident: programs that a multiprocessor runs at once.
        split: active rows a multiprocessor below which programs share rows, a segment each.
        registers: most registers of a thread, where the compiler's own choice costs residency.
        words: whether 16-bit rows that may start on any 2 bytes are read as aligned words.
    """

    unroll: int
    lanes: int
    warps: int
    segments: int
    resident: int
    split: float
    registers: int | None = None
    words: bool = False


class BackwardSettings(NamedTuple):
    """Elements of a row that a program of the backward takes, and its warps."""

    block: int
    warps: int


# (largest vocabulary, loads of less than 8 bytes or None for either, settings), the first that fits; bf16 shapes chose
# them. Written by `python -m bench.tune`, explained in bench/NOTES.md.
FORWARD = {
    "sm90": (
        (2048, None, Settings(2, 32, 1, 1, 32, 0)),
        (2**31, True, Settings(2, 128, 4, 4, 8, 1.0, 64, True)),
        (16384, False, Settings(2, 128, 4, 1, 8, 0, 64)),
        (65536, False, Settings(4, 256, 8, 1, 4, 0, 64)),
        (2**31, None, Settings(2, 512, 16, 2, 2, 0.25, 64)),
    )
}
# `block` for 2-byte logits; wider ones take as many bytes.
BACKWARD = {"sm90": BackwardSettings(4096, 8)}


def vector_width(logits: torch.Tensor) -> int:
    """The most elements that one load can take, up to 16 bytes, given where the rows of `logits` start."""
    itemsize = logits.element_size()
    starts = logits.data_ptr() | 16
    for stride in logits.stride()[:-1]:
        starts |= stride * itemsize
    # the lowest bit that any of them has: the largest power of two that divides all
    return (starts & -starts) // itemsize


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 off the GPU, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def registers(most: int | None, device: torch.device) -> dict[str, int]:
    """Triton's option for a limit on registers, where there is one to set."""
    return {"maxnreg": most} if most is not None and device.type == "cuda" and torch.version.hip is None else {}


def forward_settings(logits: torch.Tensor) -> Settings:
    """The table's entry for these logits."""
    return _forward_settings(logits.shape[-1], vector_width(logits) * logits.element_size() < 8)


@cache
def _forward_settings(vocab: int, narrow: bool) -> Settings:
    table = FORWARD.get(gpu(), FORWARD["sm90"])
    return next(settings for most, takes, settings in table if vocab <= most and takes in (narrow, None))


def backward_settings(itemsize: int) -> BackwardSettings:
    """The table's entry for logits of `itemsize` bytes."""
    settings = BACKWARD.get(gpu(), BACKWARD["sm90"])
    return settings._replace(block=settings.block * 2 // itemsize)


@cache
def gpu() -> str:
    """The table's name for the GPU in use; what is not in the table uses the entry of sm90."""
    if not torch.cuda.is_available():
        return "sm90"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties().gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"
