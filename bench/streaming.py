"""The read floor: what a kernel that only reads takes, so that nobody has to believe a datasheet."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# (elements of a block, blocks of a program, warps)
SHAPES = ((4096, 1, 8), (4096, 2, 8), (4096, 4, 8), (8192, 2, 8), (2048, 4, 4), (2048, 8, 4))


@triton.jit(do_not_specialize=["n"])
def read_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Sum STEPS blocks of int32 words into one word, so that no load can be left out."""
    first = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for step in tl.static_range(STEPS):
        place = first + step * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + place, mask=place < n // 4 * 4, other=0, eviction_policy="evict_first")
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


def read(words: torch.Tensor, block: int, steps: int, warps: int) -> None:
    """Read a flat int32 tensor once; 4 bytes out for each block · steps words in."""
    programs = triton.cdiv(words.numel(), block * steps)
    out = torch.empty(programs, dtype=torch.int32, device=words.device)
    read_kernel[(programs,)](words, out, words.numel(), BLOCK=block, STEPS=steps, num_warps=warps)
