"""Token statistics straight from hidden states and a language-model head, in plain torch.

The logits `x Wᵀ + bias` exist only as tiles of a bounded size. A slab of vocabulary rows is widened to the arithmetic
dtype once and serves every row of hidden states, so a bf16 head is converted once per pass and never as a whole; each
row carries its running maximum m, Σ e^(z−m) without the maximum's own 1, and Σ e^(z−m) (z−m) from slab to slab: the
online softmax, with both sums in a form that keeps its digits when a confident row's are tiny.

The backward recomputes each tile and turns it into

    dz = g (1[y] − p) − gH p (log p + H),

which feeds dHidden += dz W and dWeight += dzᵀ x, both accumulated in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from entropy_fast.reference.rows import LOWEST, RowGradients, arithmetic_dtype
from entropy_fast.reference.transform import Transform

# (rows, columns) of a tile of logits. On a CPU it stays in cache while the statistics are taken; on an accelerator it
# fills the device (512 MiB of float32). Constant, because a row's bits must not depend on how many rows there are.
CPU_TILE = (512, 2048)
ACCELERATOR_TILE = (4096, 32768)


class LinearStats(NamedTuple):
    """What the forward leaves for each row, in nats; float32, or float64 for float64 inputs.

    The log-sum-exp is peak + log_sum: the largest logit, and log Σ e^(z − peak). Their sum has lost the digits that a
    confident row needs.
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    peak: torch.Tensor
    log_sum: torch.Tensor


class Gradients(NamedTuple):
    """Gradients in the inputs' dtypes; None where none was asked for."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


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
) -> LinearStats:
    """Log-prob of the target, entropy and log-sum-exp of every row.

    Args:
        hidden: (rows, width), any floating dtype.
        weight: (vocab, width), the head.
        targets: (rows,), integer; a target outside the vocabulary gives NaN.
        bias: (vocab,) or None.
        transform: what turns `x Wᵀ + bias` into the logits of the softmax.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    dtype = arithmetic_dtype(hidden.dtype)
    tile_rows, tile_columns = _tile_shape(hidden.device)
    x = hidden.to(dtype)
    m = torch.full((rows,), -math.inf, dtype=dtype, device=hidden.device)
    rest = torch.zeros_like(m)
    e = torch.zeros_like(m)
    z_target = torch.full_like(m, math.nan)
    for columns in _slabs(vocab, tile_columns):
        w = weight[columns].to(dtype)
        b = None if bias is None else bias[columns].to(dtype)
        for r in _slabs(rows, tile_rows):
            z = transform.apply_(_logits(x[r], w, b))
            column = targets[r] - columns.start
            inside = (column >= 0) & (column < z.shape[1])
            picked = z.gather(1, column.clamp(0, z.shape[1] - 1).long()[:, None])[:, 0]
            z_target[r] = torch.where(inside, picked, z_target[r])
            m_tile, largest = z.max(1)
            # a row of only −inf so far has no maximum to shift by: shift by 0, and every term is e^(−inf) = 0
            d = z.sub_(torch.where(m_tile == -math.inf, 0.0, m_tile)[:, None])
            p = d.exp()
            # p is exactly 0 far below the maximum; the clamp keeps 0 · (−inf) out
            d.clamp_(min=LOWEST)
            e_tile = torch.einsum("nv,nv->n", p, d)
            rest_tile = p.scatter_(1, largest[:, None], 0.0).sum(1)
            m[r], rest[r], e[r] = merge(m[r], rest[r], e[r], m_tile, rest_tile, e_tile)
    return finish(m, rest, e, z_target)


def merge(
    m: torch.Tensor, rest: torch.Tensor, e: torch.Tensor, m2: torch.Tensor, rest2: torch.Tensor, e2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two parts of a row's vocabulary as one: maximum, Σ e^(z − max) less the maximum's own 1, and Σ e^(z − max) (z − max).

    A part without finite logits has maximum −inf.
    """
    first = m >= m2
    top, gap = torch.where(first, m, m2), torch.where(m == m2, 0.0, -(m - m2).abs())
    rest_top, rest_low = torch.where(first, rest, rest2), torch.where(first, rest2, rest)
    e_top, e_low = torch.where(first, e, e2), torch.where(first, e2, e)
    c = gap.exp()
    shift = gap.clamp(min=LOWEST)
    return top, rest_top + c * (1.0 + rest_low), e_top + c * (e_low + shift * (1.0 + rest_low))


def finish(m: torch.Tensor, rest: torch.Tensor, e: torch.Tensor, z_target: torch.Tensor) -> LinearStats:
    """A row's merged parts, and the target's logit (NaN where no part holds the target), as its statistics."""
    # no finite logit, so no distribution; or no target: NaN throughout
    log_sum = torch.where((m == -math.inf) | z_target.isnan(), math.nan, rest).log1p()
    return LinearStats(z_target - m - log_sum, log_sum - e / (1.0 + rest), m, log_sum)


def linear_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: Transform,
    stats: LinearStats,
    grads: RowGradients,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients to hidden states, head and bias, for incoming gradients (rows,) of log-prob, entropy and log-sum-exp.

    `needs` says which of (hidden, weight, bias) to compute; the others cost nothing. Shapes as in `linear_stats`.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    dtype = arithmetic_dtype(hidden.dtype)
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
                LinearStats(*(t[r] for t in stats)),
                RowGradients(*(None if t is None else t[r] for t in grads)),
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
    raw: torch.Tensor, column: torch.Tensor, transform: Transform, stats: LinearStats, grads: RowGradients
) -> torch.Tensor:
    """Gradient to `x Wᵀ + bias` of one tile, whose values `raw` are consumed; `column` is the target's, in the tile."""
    z, slope = transform.apply_with_slope_(raw)
    logprob, entropy, peak, log_sum = (t[:, None] for t in stats)
    zero = torch.zeros_like(peak)
    g, g_entropy, g_lse = (zero if t is None else t[:, None].to(z.dtype) for t in grads)
    logp = z.sub_(peak).sub_(log_sum)
    dz = logp.exp()
    # −p (g − gL + gH (log p + H)); where p is 0 the clamp keeps 0 · (−inf) out
    if grads.entropy is None:
        dz.mul_(g_lse - g)
    else:
        dz.mul_(logp.clamp_(min=LOWEST).mul_(-g_entropy).add_(g_lse - g - g_entropy * entropy))
    # 1 − p of the target is −expm1(log p), which keeps its digits where p → 1
    p_target = logprob.exp()
    at_target = p_target * (g_lse - g_entropy * (logprob.clamp(min=LOWEST) + entropy)) - g * torch.expm1(logprob)
    inside = ((column >= 0) & (column < dz.shape[1]))[:, None]
    column = column.clamp(0, dz.shape[1] - 1).long()[:, None]
    dz.scatter_(1, column, torch.where(inside, at_target, dz.gather(1, column)))
    return dz.mul_(slope)
