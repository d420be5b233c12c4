"""The elementwise layers of a transformer, one pass over their data each: norms, gated activations, rotary positions.

Written out in PyTorch a norm is eight kernels, a rotation ten; at the rate of a GPU's memory they take a third of a
small model's forward pass, and on a slow host their launches take longer than that. Here every value is read once and
rounded to the layer's dtype where PyTorch would round it, so that in 16 bits a result differs only where float32
sums in another order tip a rounding. A row's bits depend on the row alone. No gradients.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import triton
import triton.language as tl

from entropy_fast.kernels.launch import Variant, ceil_div, launch
from entropy_fast.kernels.tanh import tanh

# How a norm applies its weight w to the normed row y: w · round(y), round(w · y), or round((1 + w) · y).
NormForm = Literal["rounded", "wide", "shifted"]
Activation = Literal["silu", "gelu", "gelu_tanh"]

# Entries a program holds at once, 16 for each of 128 lanes; a row of a norm is never split.
_ENTRIES = 2048
MAX_NORM_WIDTH = 16384
# Entries of a gated activation come in whole vectors of any dtype.
GATED_STEP = 16


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x as it comes back from memory."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    rows,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FORM: tl.constexpr,
):
    """ROWS rows of WIDTH entries; BLOCK is the power of two that holds WIDTH."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    at = row * WIDTH + column
    inside = (row < rows) & (column < WIDTH)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)[:, None]
    if FORM == "rounded":
        y = rounded(y, dtype)
    elif FORM == "shifted":
        weight += 1.0
    tl.store(out_ptr + at, (weight * y).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["steps"])
def gated_kernel(
    out_ptr,
    gate_ptr,
    up_ptr,
    steps,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
):
    """activation(gate) · up of BLOCK of the STEP · steps entries; out may be gate.

    Rows of WIDTH entries start PITCH apart in gate and up; WIDTH is None where they follow each other.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < steps.to(tl.int64) * STEP
    source = at
    if WIDTH is not None:
        source = at // WIDTH * PITCH + at % WIDTH
    x = tl.load(gate_ptr + source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + source, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    tl.store(out_ptr + at, (rounded(y, dtype) * up).to(dtype), mask=inside)


@triton.jit
def rotate(
    out_ptr,
    x_ptr,
    start,
    i,
    real,
    inside,
    cos,
    cos2,
    sin,
    sin2,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """x · cos + (−second half, first half) · sin of one head of some tokens; what is not rotated is copied."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + start + i, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + start + HALF + i, mask=inside, other=0.0).to(tl.float32)
    y = rounded(x * cos, dtype) - rounded(x2 * sin, dtype)
    y2 = rounded(x2 * cos2, dtype) + rounded(x * sin2, dtype)
    tl.store(out_ptr + start + i, y.to(dtype), mask=inside)
    tl.store(out_ptr + start + HALF + i, y2.to(dtype), mask=inside)
    if REST_BLOCK > 0:
        j = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        rest = real & (j < WIDTH)
        tl.store(out_ptr + start + j, tl.load(x_ptr + start + j, mask=rest, other=0.0), mask=rest)


@triton.jit(do_not_specialize=["tokens", "period"])
def rotary_kernel(
    q_out_ptr,
    k_out_ptr,
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    tokens,
    period,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One head of TOKENS tokens; heads of a token lie side by side, angles repeat after `period` tokens.

    The first 2 · HALF entries of a head's WIDTH are rotated.
    """
    program = tl.program_id(0)
    head = program % (Q_HEADS + K_HEADS)
    token = program // (Q_HEADS + K_HEADS) * TOKENS + tl.arange(0, TOKENS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    real = token < tokens
    inside = real & (i < HALF)
    angle = (token % period).to(tl.int64) * (2 * HALF) + i
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + HALF + angle, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + HALF + angle, mask=inside, other=0.0).to(tl.float32)
    wide = token.to(tl.int64)
    if head < Q_HEADS:
        start = (wide * Q_HEADS + head) * WIDTH
        rotate(q_out_ptr, q_ptr, start, i, real, inside, cos, cos2, sin, sin2, HALF, WIDTH, REST_BLOCK)
    else:
        start = (wide * K_HEADS + head - Q_HEADS) * WIDTH
        rotate(k_out_ptr, k_ptr, start, i, real, inside, cos, cos2, sin, sin2, HALF, WIDTH, REST_BLOCK)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, form: NormForm) -> torch.Tensor:
    """x / √(mean x² + eps) along the last dimension, times the weight.

    Args:
        x: (..., width), contiguous, bf16, fp16 or float32; width at most `MAX_NORM_WIDTH`.
        weight: (width,), of the same dtype.
        eps: added to the mean square.
        form: how the weight is applied, see `NormForm`.
    """
    out = torch.empty_like(x)
    variant = _norm_variant(x.shape[-1], form)
    rows = x.numel() // x.shape[-1]
    launch(rms_norm_kernel, ceil_div(rows, variant.constants["ROWS"]), (out, x, weight), (rows,), (eps,), variant)
    return out


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation, *, in_place: bool = False) -> torch.Tensor:
    """activation(gate) · up, contiguous, or in place of a contiguous gate where that is allowed.

    Args:
        gate, up: of one shape and dtype (bf16, fp16 or float32), contiguous, a multiple of `GATED_STEP` entries; or
            the halves of something contiguous, each a multiple of `GATED_STEP` wide.
        activation: `silu`, `gelu` (by the error function) or `gelu_tanh`.
        in_place: nobody else needs the gate.
    """
    out = gate if in_place else torch.empty_like(gate, memory_format=torch.contiguous_format)
    variant = _gated_variant(activation, None if gate.is_contiguous() else gate.shape[-1])
    programs = ceil_div(gate.numel(), variant.constants["BLOCK"])
    launch(gated_kernel, programs, (out, gate, up), (gate.numel() // GATED_STEP,), (), variant)
    return out


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary positions on queries and keys, the second half of what is rotated being the first's partner.

    Args:
        q: (B, heads, T, width), of memory (B, T, heads, width); bf16, fp16 or float32.
        k: the same with its own number of heads.
        cos, sin: (B or 1, T, rotated), contiguous, of the same dtype; the rest of the width stays as it is.
    """
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    batch, q_heads, length, width = q.shape
    tokens, period = batch * length, len(cos) * length
    variant = _rotary_variant(q_heads, k.shape[1], cos.shape[-1] // 2, width)
    programs = ceil_div(tokens, variant.constants["TOKENS"]) * (q_heads + k.shape[1])
    launch(rotary_kernel, programs, (q_out, k_out, q, k, cos, sin), (tokens, period), (), variant)
    return q_out, k_out


@cache
def _norm_variant(width: int, form: NormForm) -> Variant:
    block = triton.next_power_of_2(width)
    constants = {"WIDTH": width, "BLOCK": block, "ROWS": max(1, _ENTRIES // block), "FORM": form}
    return Variant(constants, num_warps=max(4, min(16, block // 512)))


@cache
def _gated_variant(activation: Activation, half: int | None) -> Variant:
    constants = {"BLOCK": _ENTRIES, "STEP": GATED_STEP, "ACTIVATION": activation}
    return Variant(constants | {"WIDTH": half, "PITCH": half and 2 * half}, num_warps=4)


@cache
def _rotary_variant(q_heads: int, k_heads: int, half: int, width: int) -> Variant:
    block, rest = triton.next_power_of_2(half), width - 2 * half
    constants = {"Q_HEADS": q_heads, "K_HEADS": k_heads, "HALF": half, "WIDTH": width, "BLOCK": block}
    constants |= {"REST_BLOCK": triton.next_power_of_2(rest) if rest else 0}
    # a product fused with the sum would not be rounded between them
    return Variant(constants | {"TOKENS": max(1, _ENTRIES // 2 // block)}, num_warps=4, enable_fp_fusion=False)
