"""Token statistics straight from hidden states and a language-model head, in plain torch.

The logits `x Wᵀ + bias` exist only as tiles of a bounded size. A slab of vocabulary rows is widened to the arithmetic
dtype once and serves every row of hidden states, so a bf16 head is converted once per pass and never as a whole; each
row carries its running maximum m, Σ e^(z−m) and Σ e^(z−m) (z−m) from slab to slab (the online softmax, with the
entropy's sum shifted by the maximum so that a confident row does not cancel).

The backward recomputes each tile and turns it into

    dz = g (1[y] − p) − gH p (log p + H),

which feeds dHidden += dz W and dWeight += dzᵀ x, both accumulated in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from entropy_fast.reference.transform import Transform

# (rows, columns) of a tile of logits. On a CPU it stays in cache while the statistics are taken; on an accelerator it
# fills the device (512 MiB of float32). Constant, because a row's bits must not depend on how many rows there are.
CPU_TILE = (512, 2048)
ACCELERATOR_TILE = (4096, 32768)


class RowStats(NamedTuple):
    """What the forward leaves for each row, in nats; float32, or float64 for float64 inputs."""

    logprob: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor


class Gradients(NamedTuple):
    """Gradients in the inputs' dtypes; None where none was asked for."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 stays, everything narrower becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _slabs(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _tile_shape(device: torch.device) -> tuple[int, int]:
    return CPU_TILE if device.type == "cpu" else ACCELERATOR_TILE


def linear_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: Transform,
) -> RowStats:
    """Log-prob of the target, entropy and log-sum-exp of every row.

    Args:
        hidden: (rows, width), any floating dtype.
        weight: (vocab, width), the head.
        targets: (rows,), integer; a target outside the vocabulary gives NaN.
        bias: (vocab,) or None.
        transform: what turns `x Wᵀ + bias` into the logits of the softmax.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    dtype = accumulation_dtype(hidden.dtype)
    tile_rows, tile_columns = _tile_shape(hidden.device)
    x = hidden.to(dtype)
    m = torch.full((rows,), -math.inf, dtype=dtype, device=hidden.device)
    s = torch.zeros_like(m)
    e = torch.zeros_like(m)
    z_target = torch.full_like(m, math.nan)
    for columns in _slabs(vocab, tile_columns):
        w = weight[columns].to(dtype)
        b = None if bias is None else bias[columns].to(dtype)
        for r in _slabs(rows, tile_rows):
            z = transform.apply_(_logits(x[r], w, b))
            column = targets[r] - columns.start
            inside = (column >= 0) & (column < z.shape[1])
            picked = z.gather(1, column.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
            z_target[r] = torch.where(inside, picked, z_target[r])
            m_new = torch.maximum(m[r], z.amax(1))
            # a row of only −inf so far has no maximum to shift by: shift by 0, and every term is e^(−inf) = 0
            shift = torch.where(m_new == -math.inf, 0.0, m_new)
            d = z.sub_(shift[:, None])
            p = d.exp()
            # p is exactly 0 far below the maximum; the clamp keeps 0 · (−inf) out and NaN in
            d.clamp_(min=-1e4)
            rescale = torch.exp(m[r] - shift)
            moved = torch.where(m[r] == -math.inf, 0.0, m[r] - shift)
            e[r] = rescale * (e[r] + moved * s[r]) + torch.einsum("nv,nv->n", p, d)
            s[r] = rescale * s[r] + p.sum(1)
            m[r] = m_new
    # with no finite logit s is 0, and log 0 − 0/0 makes the NaN that the contract asks for
    log_s = torch.where(s > 0, s, math.nan).log()
    return RowStats(z_target - m - log_s, log_s - e / s, m + log_s)


def linear_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: Transform,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients to hidden states, head and bias, of Σ (grad_logprob · logprob + grad_entropy · entropy).

    `needs` says which of (hidden, weight, bias) to compute; the others cost nothing. Shapes as in `linear_stats`,
    `lse`, `entropy` and the incoming gradients (rows,).
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    dtype = accumulation_dtype(hidden.dtype)
    tile_rows, tile_columns = _tile_shape(hidden.device)
    x = hidden.to(dtype)
    d_hidden = torch.zeros_like(x) if needs[0] else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    d_bias = torch.empty(vocab, dtype=weight.dtype if bias is None else bias.dtype, device=x.device)
    for columns in _slabs(vocab, tile_columns):
        w = weight[columns].to(dtype)
        b = None if bias is None else bias[columns].to(dtype)
        dw = torch.zeros_like(w) if d_weight is not None else None
        db = torch.zeros(w.shape[0], dtype=dtype, device=x.device)
        for r in _slabs(rows, tile_rows):
            dz = _dlogits(
                _logits(x[r], w, b),
                targets[r] - columns.start,
                transform,
                lse[r],
                entropy[r],
                None if grad_logprob is None else grad_logprob[r],
                None if grad_entropy is None else grad_entropy[r],
            )
            if d_hidden is not None:
                d_hidden[r].addmm_(dz, w)
            if dw is not None:
                dw.addmm_(dz.t(), x[r])
            if needs[2]:
                db += dz.sum(0)
        if dw is not None and d_weight is not None:
            d_weight[columns] = dw.to(weight.dtype)
        if needs[2]:
            d_bias[columns] = db.to(d_bias.dtype)
    return Gradients(None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias if needs[2] else None)


def _logits(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    return x @ w.t() if b is None else torch.addmm(b, x, w.t())


def _dlogits(
    raw: torch.Tensor,
    column: torch.Tensor,
    transform: Transform,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient to `x Wᵀ + bias` of one tile, whose values `raw` are consumed."""
    z, slope = transform.apply_with_slope_(raw)
    logp = z.sub_(lse[:, None])
    p = logp.exp()
    if grad_entropy is None:
        dz = p.mul_(0.0 if grad_logprob is None else -grad_logprob[:, None])
    else:
        # p (log p + H) → 0 as p → 0; the clamp keeps 0 · (−inf) out
        factor = logp.clamp_(min=-1e4).add_(entropy[:, None]).mul_(grad_entropy[:, None])
        if grad_logprob is not None:
            factor.add_(grad_logprob[:, None])
        dz = p.mul_(factor).neg_()
    if grad_logprob is not None:
        inside = (column >= 0) & (column < dz.shape[1])
        bump = torch.where(inside, grad_logprob, 0.0)
        dz.scatter_add_(1, column.clamp(0, dz.shape[1] - 1)[:, None], bump[:, None])
    return dz.mul_(slope)
