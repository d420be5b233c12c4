"""How operands reach the fused-linear kernels: tile sizes by GPU, TMA or pointers, and the halves of float32 rows.

A float32 row is multiplied by a power of two that brings its largest entry to [2^14, 2^15) and split into
high + low, two fp16 numbers with 22 bits between them. Three fp16 products (high·high and the two mixed ones) then
carry float32's precision at the tensor cores' fp16 rate; low·low is below float32's own rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from entropy_fast.kernels.launch import Variant, ceil_div

SPLIT_BLOCK = 1024
# Vocabulary rows of a float32 head whose halves exist at a time: as many column tiles as an H100 has multiprocessors,
# so that none idles at the end, whatever the number of row tiles.
SPLIT_ROWS = 132 * 256


@dataclass(frozen=True)
class Tiling:
    """Tile sizes and launch options; BN and BK are the same for every number of rows, so a row's bits are too.

    `specialized` stands for the kernels of `linear_hopper`, where the operands' strides allow TMA. `run`, there: after
    so many steps along the width the tensor cores' sum is added to another in float32 registers and starts again at 0,
    because the tensor cores cut off what they add to a large sum; 0 for one run throughout.
    """

    BM: int
    BN: int
    BK: int
    GROUP: int
    num_warps: int
    num_stages: int
    tma: bool
    specialized: bool = False
    run: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """The kernels' first constants."""
        return {"BM": self.BM, "BN": self.BN, "BK": self.BK, "GROUP": self.GROUP}


# Measured on one H100: bench/NOTES.md.
HOPPER = Tiling(BM=128, BN=256, BK=64, GROUP=8, num_warps=8, num_stages=3, tma=True, specialized=True)
# reading the head is what costs: deeper pipeline
HOPPER_FEW_ROWS = Tiling(BM=128, BN=256, BK=64, GROUP=8, num_warps=8, num_stages=4, tma=True, specialized=True)
FEW_ROWS = 256
# two sums in registers leave room for half the columns
HOPPER_ACCURATE = Tiling(BM=128, BN=128, BK=64, GROUP=8, num_warps=8, num_stages=4, tma=True, specialized=True, run=4)
BLACKWELL = Tiling(BM=128, BN=256, BK=64, GROUP=8, num_warps=8, num_stages=3, tma=True)
# 160 KiB of shared memory, no TMA
AMPERE = Tiling(BM=128, BN=128, BK=64, GROUP=8, num_warps=8, num_stages=3, tma=False)
# 64 KiB of shared memory
SMALL = Tiling(BM=128, BN=128, BK=32, GROUP=8, num_warps=8, num_stages=2, tma=False)
INTERPRETED = Tiling(BM=16, BN=32, BK=16, GROUP=2, num_warps=4, num_stages=2, tma=True)


# Narrower ones would let a row skip more, but a slab takes a slow host as long to launch as it takes the device.
FILTER_COLUMNS = 8448


def filter_columns(device: torch.device) -> int:
    """Width of the slabs whose mass decides which rows' gradients need them; a multiple of every tile's."""
    return 64 if device.type == "cpu" else FILTER_COLUMNS


def has_accurate(device: torch.device) -> bool:
    """Whether this device has the kernel that sums float32 products in short runs."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


def tiling_for(rows: int, device: torch.device, precision: str = "fast") -> Tiling:
    """The tile sizes for this device."""
    if precision == "accurate" and has_accurate(device):
        return HOPPER_ACCURATE
    if device.type == "cpu":
        return INTERPRETED
    if torch.version.hip or _shared_memory(device) < 160 * 1024:
        return SMALL
    major = torch.cuda.get_device_capability(device)[0]
    if major != 9:
        return AMPERE if major < 9 else BLACKWELL
    return HOPPER_FEW_ROWS if rows <= FEW_ROWS else HOPPER


@functools.cache
def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def program_count(device: torch.device) -> int:
    """Programs that are resident at once: one per multiprocessor."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def plain_options(
    tiling: Tiling, programs: int, tma: bool, parts: bool, has_bias: bool, softcap: bool
) -> dict[str, Any]:
    """Constants and warps of the kernels in plain Triton."""
    flags = {"TMA": tma, "PARTS": parts, "HAS_BIAS": has_bias, "SOFTCAP": softcap}
    return {**tiling.sizes, "PROGRAMS": programs, **flags, "num_warps": tiling.num_warps}


@functools.cache
def hopper_variant(
    tiling: Tiling,
    programs: int,
    stages: int,
    parts: bool,
    has_bias: bool,
    softcap: bool,
    has_entropy: bool,
    backward: bool,
) -> Variant:
    """Of the kernel of `linear_hopper`."""
    constants = {
        **tiling.sizes,
        "PROGRAMS": programs,
        "STAGES": stages,
        "RUN": tiling.run,
        "PARTS": parts,
        "HAS_BIAS": has_bias,
        "SOFTCAP": softcap,
        "HAS_ENTROPY": has_entropy,
        "BACKWARD": backward,
    }
    return Variant(constants, num_warps=4)


def slabs(vocab: int, tiling: Tiling, parts: bool) -> Iterator[slice]:
    """The whole vocabulary at once, or, where its rows have to be split in halves first, some of it at a time."""
    step = ceil_div(SPLIT_ROWS, tiling.BN) * tiling.BN if parts else vocab
    for start in range(0, vocab, step):
        yield slice(start, min(start + step, vocab))


@dataclass(frozen=True)
class Operand:
    """A matrix (rows, width) as the kernels read it.

    Attributes:
        data: the rows, or their fp16 halves [low | high].
        width: entries of a row, or of a half.
        scale: (rows,) float32, the power of two that undoes the split's; None without a split.
    """

    data: torch.Tensor
    width: int
    scale: torch.Tensor | None

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Operand:
        """Float32 is split; narrower dtypes are taken as they are, copied only if their rows are not contiguous."""
        if matrix.dtype == torch.float32:
            halves, scale = split_halves(matrix)
            return cls(halves, halves.shape[1] // 2, scale)
        return cls(matrix if matrix.stride(1) == 1 else matrix.contiguous(), matrix.shape[1], None)

    @property
    def parts(self) -> bool:
        """Whether `data` holds halves."""
        return self.scale is not None

    @property
    def stride(self) -> int:
        """Entries from one row to the next."""
        return self.data.stride(0)

    @property
    def tma(self) -> bool:
        """Whether the tensor memory accelerator can address the rows: 16-byte strides and start."""
        return self.data.data_ptr() % 16 == 0 and self.stride * self.data.element_size() % 16 == 0

    def source(self, rows: int, columns: int, tma: bool) -> Any:
        """What the kernels' loads take: a descriptor of tiles (rows, columns), or the tensor itself."""
        return TensorDescriptor.from_tensor(self.data, [rows, columns]) if tma else self.data

    def gluon_source(self, rows: int, columns: int) -> Any:
        """The same descriptor for the Gluon kernels, which want the layout of the tile in shared memory too."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        layout = _shared_layout(rows, columns, self.data.dtype)
        return GluonDescriptor.from_tensor(self.data, [rows, columns], layout)


@functools.cache
def _shared_layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


@triton.jit
def split_kernel(
    x_ptr,
    halves_ptr,
    scale_ptr,
    stride,
    D,
    K,
    BLOCK: tl.constexpr,
):
    """One row of float32 to fp16 halves [low | high], and the scale that undoes the split's power of two."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + k, mask=k < D, other=0.0)
        largest = tl.maximum(largest, tl.abs(x))
    exponent = (tl.max(largest, 0).to(tl.int32, bitcast=True) >> 23) - 127
    # 2^shift and 2^−shift both have to be normal float32 numbers
    shift = tl.minimum(tl.maximum(14 - exponent, -126), 126)
    up = ((shift + 127) << 23).to(tl.float32, bitcast=True)
    down = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + row, down)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + k, mask=k < D, other=0.0) * up
        high = x.to(tl.float16)
        low = (x - high.to(tl.float32)).to(tl.float16)
        tl.store(halves_ptr + row * 2 * K + k, low, mask=k < K)
        tl.store(halves_ptr + row * 2 * K + K + k, high, mask=k < K)


def split_halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, 2 K) fp16 of [low | high], zeros from the width up to K, and (rows,) the scales that undo the split's."""
    rows, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    padded = ceil_div(width, 64) * 64
    halves = torch.empty(rows, 2 * padded, dtype=torch.float16, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    split_kernel[(rows,)](x, halves, scale, x.stride(0), width, padded, BLOCK=SPLIT_BLOCK)
    return halves, scale
