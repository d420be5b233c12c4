"""Causal attention over the segments of a row, for what library kernels lack: float32, softcaps and attention sinks.

A segment's keys lie anywhere in the row, so a prompt that stands once is read where it stands by every completion.
Keys are taken in blocks counted from a sequence's first one, and every product is summed in the same order, so a
token's bits do not depend on how sequences were laid out. float32 products are float32's own, without tensor cores.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from entropy_fast.kernels.device import LOG2E, LOWEST
from entropy_fast.kernels.launch import Variant, launch
from entropy_fast.kernels.tanh import tanh

MAX_WIDTH = 256


@triton.jit
def dot(a, b, acc):
    """acc + a @ b; tensor cores in 16 bits alone."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["heads", "key_heads", "window"])
def attention_kernel(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    index_ptr,
    query_starts_ptr,
    key_starts_ptr,
    tile_segment_ptr,
    tile_query_ptr,
    sink_ptr,
    heads,
    key_heads,
    window,
    scale,
    softcap,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SLICE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    """One head of QUERIES queries of a segment; a query and a key are multiplied SLICE entries at a time."""
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    tile = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    segment = tl.load(tile_segment_ptr + tile)
    first = tl.load(tile_query_ptr + tile)
    query_start = tl.load(query_starts_ptr + segment)
    queries = tl.load(query_starts_ptr + segment + 1) - query_start
    key_start = tl.load(key_starts_ptr + segment)
    keys = tl.load(key_starts_ptr + segment + 1) - key_start

    query = first + tl.arange(0, QUERIES)
    # the last key is the last query's own
    position = query + (keys - queries)
    real = query < queries
    q_row = ((query_start + query).to(tl.int64) * heads + head) * WIDTH
    at_slice = tl.arange(0, SLICE)
    at_value = tl.arange(0, VALUE_BLOCK)
    key_head = head // (heads // key_heads)

    if sink_ptr is not None:
        peak = tl.zeros([QUERIES], tl.float32) + tl.load(sink_ptr + head).to(tl.float32) * LOG2E
        total = tl.zeros([QUERIES], tl.float32) + 1.0
    else:
        peak = tl.full([QUERIES], LOWEST, tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, VALUE_BLOCK], tl.float32)
    begin = 0
    if WINDOW:
        begin = tl.maximum(first + (keys - queries) - window + 1, 0) // KEYS * KEYS
    end = tl.minimum(first + QUERIES + (keys - queries), keys)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < keys
        token = key_start + key
        if index_ptr is not None:
            token = tl.load(index_ptr + token, mask=inside, other=0)
        row = token.to(tl.int64) * key_heads + key_head
        z = tl.zeros([QUERIES, KEYS], tl.float32)
        for i in tl.static_range(0, WIDTH, SLICE):
            j = at_slice + i
            q_mask = real[:, None] & (j < WIDTH)[None, :]
            k_mask = inside[None, :] & (j < WIDTH)[:, None]
            q = tl.load(q_ptr + q_row[:, None] + j[None, :], mask=q_mask, other=0.0)
            k = tl.load(k_ptr + (row * WIDTH)[None, :] + j[:, None], mask=k_mask, other=0.0)
            z = dot(q, k, z)
        z *= scale
        if SOFTCAP:
            z = softcap * tanh(z / softcap)
        visible = (key[None, :] <= position[:, None]) & inside[None, :]
        if WINDOW:
            visible &= key[None, :] > position[:, None] - window
        z = tl.where(visible, z * LOG2E, float("-inf"))
        top = tl.maximum(peak, tl.max(z, 1))
        move = tl.exp2(peak - top)
        p = tl.exp2(z - top[:, None])
        total = total * move + tl.sum(p, 1)
        v = tl.load(
            v_ptr + (row * VALUE_WIDTH)[:, None] + at_value[None, :],
            mask=inside[:, None] & (at_value < VALUE_WIDTH)[None, :],
            other=0.0,
        )
        acc = dot(p.to(dtype), v, acc * move[:, None])
        peak = top
    out_row = ((query_start + query).to(tl.int64) * heads + head) * VALUE_WIDTH
    tl.store(
        out_ptr + out_row[:, None] + at_value[None, :],
        (acc / total[:, None]).to(dtype),
        mask=real[:, None] & (at_value < VALUE_WIDTH)[None, :],
    )


def segment_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_index: torch.Tensor | None,
    starts: tuple[torch.Tensor, torch.Tensor],
    tiles: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """Σ softmax(scale · q kᵀ) v over each query's own segment, up to its own key; (T, heads, value width).

    Args:
        q: (T, heads, width), contiguous; bf16, fp16 or float32. Widths are at most `MAX_WIDTH`.
        k, v: (T, key heads, width or value width), likewise; heads are a multiple of the key heads.
        key_index: int64, where each key of the segments, one after the other, is in k and v; None for in order.
        starts: (segments + 1,) int32 each, where the segments' queries and keys begin; see `Segments`.
        tiles: int32 each, the segment and the first query of every `tile_queries(q)` queries of a segment.
        scale: multiplies the products.
        window: how many keys a query sees, its own included.
        softcap: bounds the scaled products by softcap · tanh(· / softcap).
        sink: (heads,), a further logit for each query, without a value.
    """
    out = q.new_empty(*q.shape[:2], v.shape[2])
    variant = _variant(q.dtype.itemsize, q.shape[2], v.shape[2], softcap is not None, window is not None)
    tensors = (out, q, k, v, key_index, *starts, *tiles, sink)
    integers = (q.shape[1], k.shape[1], window or 0)
    launch(attention_kernel, len(tiles[0]) * q.shape[1], tensors, integers, (scale, softcap or 1.0), variant)
    return out


def tile_queries(q: torch.Tensor) -> int:
    """Queries that a program takes."""
    return _sizes(q.dtype.itemsize)["QUERIES"]


def _sizes(itemsize: int) -> dict[str, int]:
    return {"QUERIES": 32, "KEYS": 16} if itemsize == 4 else {"QUERIES": 64, "KEYS": 32}


@cache
def _variant(itemsize: int, width: int, value_width: int, softcap: bool, windowed: bool) -> Variant:
    # float32 operands of a product are held in registers for its whole depth
    most = 16 if itemsize == 4 else MAX_WIDTH
    constants = {"WIDTH": width, "VALUE_WIDTH": value_width, "SOFTCAP": softcap, "WINDOW": windowed}
    constants |= _sizes(itemsize)
    constants |= {"SLICE": min(most, max(16, triton.next_power_of_2(width)))}
    constants |= {"VALUE_BLOCK": max(16, triton.next_power_of_2(value_width))}
    wide = max(width, value_width) > 128
    # as many registers as there are, none spilled; one stage fits into a consumer card's shared memory
    return Variant(constants, num_warps=8 if itemsize == 4 or wide else 4, num_stages=1 if itemsize == 4 or wide else 2)
