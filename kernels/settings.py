"""Launch settings by GPU, size of a row and how it can be loaded; measured once, never tuned at run time."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from entropy_fast.kernels.launch import ceil_div

# segments begin at multiples of so many elements: at cache lines, where rows do
ALIGNED = 64


class Settings(NamedTuple):
    """Block shape and launch parameters of the forward over rows of logits.

    Attributes:
        unroll: 16-byte loads of a lane in a block, at most; fewer where numbers are softcapped or not in words.
        lanes: independent running sums of a program, 32 for each warp.
        segment: most bytes of a row that a program takes; part of the result's bits.
        depth: blocks that are loaded ahead; more where they hold fewer loads than `unroll`.
        resident: programs that a multiprocessor runs at once.
        registers: most registers of a thread, where the compiler's own choice costs residency.
        words: whether 16-bit rows that may start on any 2 bytes are read as aligned words.
        together: rows side by side that a program takes where some may be masked; a power of two.
    """

    unroll: int
    lanes: int
    segment: int
    depth: int
    resident: int
    registers: int | None = None
    words: bool = False
    together: int = 1

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return self.lanes // 32

    def segments(self, vocab: int, itemsize: int) -> tuple[int, int]:
        """How many segments a row is cut into, and elements of each but the last: never by the number of rows."""
        pieces = ceil_div(vocab * itemsize, self.segment)
        if pieces == 1:
            return 1, vocab
        length = ceil_div(vocab, pieces * ALIGNED) * ALIGNED
        return ceil_div(vocab, length), length


class BackwardSettings(NamedTuple):
    """Elements of a row that a program of the backward takes, and its warps."""

    block: int
    warps: int


# (largest row in bytes, loads of less than 8 bytes or None for either, settings), the first that fits; bf16 shapes
# chose them, timed as by `python -m bench tune`, few and masked rows too; explained in bench/NOTES.md.
# What all GPUs share:
TINY = (4096, None, Settings(4, 32, 65536, 1, 32, 64, together=4))
WHOLE = (
    (16384, None, Settings(8, 128, 65536, 0, 8, 64)),
    (32768, None, Settings(8, 128, 65536, 0, 5, 96)),
    (65536, None, Settings(4, 256, 65536, 2, 3, 80)),
)
FORWARD = {
    "sm90": (
        TINY,
        (2**40, True, Settings(4, 128, 24576, 1, 8, 64, True)),
        *WHOLE,
        (2**40, None, Settings(8, 128, 16384, 0, 8, 64)),
    ),
    # longer segments: fewer programs that masked rows start in vain, and enough of them for faster memory
    "H200": (
        TINY,
        (2**40, True, Settings(4, 128, 36864, 0, 10, 48, True)),
        *WHOLE,
        (2**40, None, Settings(8, 128, 32768, 0, 8, 64)),
    ),
}
# `block` for 2-byte logits; wider ones take as many bytes.
BACKWARD = {"sm90": BackwardSettings(2048, 4)}


def vector_width(logits: torch.Tensor) -> int:
    """The most elements that one load can take, up to 16 bytes, given where the rows of `logits` start."""
    itemsize = logits.element_size()
    starts = logits.data_ptr() | 16
    for stride in logits.stride()[:-1]:
        starts |= stride * itemsize
    # the lowest bit that any of them has: the largest power of two that divides all
    return (starts & -starts) // itemsize


def is_flat(logits: torch.Tensor) -> bool:
    """Whether the rows of (outer, inner, vocab) are a constant apart, so that one number says which row it is."""
    outer, inner, _ = logits.shape
    return outer == 1 or logits.stride(0) == inner * logits.stride(1)


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 off the GPU, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def packed_instructions(device: torch.device) -> int:
    """The major compute capability that the device has NVIDIA's packed instructions of, or 0."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device)[0] if nvidia else 0


def registers(most: int | None, device: torch.device) -> dict[str, int]:
    """Triton's option for a limit on registers, where there is one to set."""
    return {"maxnreg": most} if most is not None and device.type == "cuda" and torch.version.hip is None else {}


def forward_settings(logits: torch.Tensor) -> Settings:
    """The table's entry for these logits."""
    itemsize = logits.element_size()
    return _forward_settings(gpu(), logits.shape[-1] * itemsize, vector_width(logits) * itemsize < 8)


@cache
def _forward_settings(name: str, row_bytes: int, narrow: bool) -> Settings:
    table = FORWARD.get(name, FORWARD["sm90"])
    return next(settings for most, takes, settings in table if row_bytes <= most and takes in (narrow, None))


def backward_settings(itemsize: int) -> BackwardSettings:
    """The table's entry for logits of `itemsize` bytes."""
    settings = BACKWARD.get(gpu(), BACKWARD["sm90"])
    return settings._replace(block=settings.block * 2 // itemsize)


@cache
def gpu() -> str:
    """The tables' name for the GPU in use: its own where it has an entry, else its architecture's.

    What has neither uses the entry of sm90.
    """
    if not torch.cuda.is_available():
        return "sm90"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties().gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    named = (name for name in FORWARD if name in torch.cuda.get_device_name())
    return next(named, f"sm{major}{minor}")
