"""Token statistics of rows of logits, in plain torch.

For a row of logits z = k · w (w is the row after bias and softcap, k what is left of scale and temperature) with peak
M = max w, and d = w − M:

    s = Σ e^(k d)        logprob = k d_y − log s
    e = Σ e^(k d) d      entropy = log s − k e / s

Rows are taken a few at a time through buffers that stay in cache, so nothing of the size of the logits is ever held
beside them, in the backward neither: it recomputes e^(k d) from the saved M and log s.

Two things keep a confident row (entropy → 0) exact: both terms of the entropy are positive and shifted by the peak,
and s, which is 1 + (something tiny), is summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from entropy_fast.reference.transform import Transform

# Elements of a chunk: on a CPU its two buffers stay in cache, on an accelerator they fill the device.
CPU_CHUNK = 2**20
ACCELERATOR_CHUNK = 2**26
# Sums run over blocks of this width and then over the blocks, so that a row's bits do not depend on how torch splits
# the work over threads, which it does differently for one row and for many.
BLOCK = 4096
# Far below any difference of logits, and finite: 0 · LOWEST is 0 where 0 · (−inf) would be NaN.
LOWEST = -1e30


class RowStats(NamedTuple):
    """What the forward leaves for each row; float32, or float64 for float64 logits.

    lse = k · peak + log_sum; the two are kept apart because their sum has lost the digits that a confident row needs.
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    peak: torch.Tensor
    log_sum: torch.Tensor


class RowGradients(NamedTuple):
    """Incoming gradients of logprob, entropy and lse, each shaped like the targets; None is 0."""

    logprob: torch.Tensor | None
    entropy: torch.Tensor | None
    lse: torch.Tensor | None


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything narrower becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    transform: Transform,
) -> RowStats:
    """Log-prob of the target and entropy of every row.

    Args:
        logits: (rows, vocab), floating point, any strides.
        targets: (rows,), integer; one outside the vocabulary makes its row NaN.
        mask: (rows,), bool, or None; rows with False are not read and give 0.
        bias: (vocab,) or None.
        transform: what turns `logits + bias` into the logits of the softmax.
    """
    dtype = arithmetic_dtype(logits.dtype)
    total = len(targets)
    out = None
    for rows, w in _chunks(logits, mask, bias, transform):
        part = _chunk_stats(w, targets[rows], transform.factor)
        if len(w) == total:
            return part
        if out is None:
            out = RowStats(*(torch.zeros(total, dtype=dtype, device=logits.device) for _ in part))
        for whole, values in zip(out, part, strict=True):
            whole[rows] = values
    return out or RowStats(*(torch.zeros(total, dtype=dtype, device=logits.device) for _ in RowStats._fields))


def _chunk_stats(w: torch.Tensor, targets: torch.Tensor, k: float) -> RowStats:
    """`row_stats` of rows whose exponentials fit beside them; `w` is left alone.

    Nothing is done here for rows of NaN, of −inf alone or with +inf: w − M is NaN in them, and so is all that follows.
    """
    peak = w.amax(1)
    d = w - peak[:, None]
    y = targets.clamp(0, w.shape[1] - 1)
    d_y = d.gather(1, y.long()[:, None])[:, 0]
    p = d.exp() if k == 1.0 else (d * k).exp_()
    s = _row_sums(p, torch.float64)
    e = _row_sums(p.mul_(d.clamp_min_(LOWEST)), w.dtype)
    log_sum = (s - 1.0).log1p_().to(w.dtype)
    if k != 1.0:
        d_y, e = d_y * k, e * k
    logprob, entropy = d_y - log_sum, log_sum - (e / s).to(w.dtype)
    if targets.device.type != "cpu" or not torch.equal(targets, y):
        inside = targets == y
        logprob, entropy = torch.where(inside, logprob, math.nan), torch.where(inside, entropy, math.nan)
    return RowStats(logprob, entropy, peak, log_sum)


def row_stats_backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    transform: Transform,
    stats: RowStats,
    gradients: RowGradients,
    out: torch.Tensor,
    d_bias: torch.Tensor | None,
) -> None:
    """Gradient of Σ (g · logprob + gH · entropy + gl · lse), written to `out`; `out` may be `logits` itself.

        dz = g (1[y] − p) − gH p (log p + H) + gl p

    The target's 1 − p is −expm1(logprob), which does not cancel. Masked rows get 0. `out` is (rows, vocab); `d_bias`,
    (vocab,) in the arithmetic dtype or None, is added to.
    """
    k = transform.factor
    if mask is not None:
        out[~mask] = 0
    for rows, w in _chunks(logits, mask, bias, transform):
        logprob, entropy, peak, log_sum = (t[rows][:, None] for t in stats)
        zero = torch.zeros_like(peak)
        g, g_entropy, g_lse = (zero if t is None else t[rows][:, None].to(w.dtype) for t in gradients)
        slope = None if transform.squeeze is None else 1.0 - w * w
        d = torch.sub(w, peak)
        p = torch.mul(d, k).sub_(log_sum).exp_()
        y = targets[rows].clamp(0, w.shape[1] - 1).long()[:, None]
        p_y = logprob.exp()
        at_target = g * -torch.expm1(logprob) + p_y * (g_lse - g_entropy * (logprob.clamp(min=LOWEST) + entropy))
        # p (gl − g − gH (log p + H)) with log p = k d − log s
        if gradients.entropy is not None:
            p.mul_(d.clamp_(min=LOWEST).mul_(-k * g_entropy).add_(g_lse - g - g_entropy * (entropy - log_sum)))
        else:
            p.mul_(g_lse - g)
        dw = p.scatter_(1, y, at_target.to(p.dtype)).mul_(k)
        if slope is not None:
            assert transform.squeeze is not None
            dw.mul_(slope.mul_(transform.squeeze))
        out[rows] = dw.to(out.dtype)
        if d_bias is not None:
            d_bias += dw.sum(0)


def _chunks(
    logits: torch.Tensor, mask: torch.Tensor | None, bias: torch.Tensor | None, transform: Transform
) -> Iterator[tuple[slice | torch.Tensor, torch.Tensor]]:
    """(which rows, w) for a few active rows at a time; w may be a view of the logits and must not be written."""
    dtype = arithmetic_dtype(logits.dtype)
    active = None if mask is None or bool(mask.all()) else mask.nonzero()[:, 0]
    total = logits.shape[0] if active is None else len(active)
    size = max(1, (CPU_CHUNK if logits.device.type == "cpu" else ACCELERATOR_CHUNK) // max(1, logits.shape[1]))
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total)) if active is None else active[start : start + size]
        w = logits[rows].to(dtype)
        if bias is not None:
            w = w + bias.to(dtype)
        if transform.squeeze is not None:
            w = (w * transform.squeeze).tanh_()
        yield rows, w


def _row_sums(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    whole = t.shape[1] // BLOCK * BLOCK
    rest = t[:, whole:].sum(1, dtype=dtype)
    return t[:, :whole].unflatten(1, (-1, BLOCK)).sum(2, dtype=dtype).sum(1).add_(rest) if whole else rest
