"""Token statistics of rows of logits, in plain torch.

For a row of logits z = k · w (w is the row after bias and softcap, k what is left of scale and temperature) with peak
M = max w, and d = w − M:

    s = Σ e^(k d)        logprob = k d_y − log s
    e = Σ e^(k d) d      entropy = log s − k e / s

Rows are taken a few at a time through buffers that stay in cache, so nothing of the size of the logits is ever held
beside them, in the backward neither: it recomputes e^(k d) from the saved M and log s.

Two things keep a confident row (entropy → 0) exact: both terms of the entropy are positive and shifted by the peak,
and s, where it is 1 + (something tiny), is summed in float64.

A few rows of a small vocabulary take as long as operations take to start. There `log_softmax` does most of it in one,
and only the rows that would lose digits by it are computed as above. Which way a row goes depends on that row and on
the vocabulary, never on the rows around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from entropy_fast.reference.transform import Transform

# Elements of a chunk: on a CPU its two or three buffers stay in cache, on an accelerator they fill the device.
CPU_CHUNK = 2**20
ACCELERATOR_CHUNK = 2**26
# torch splits the sum of a row this long over threads if the row stands alone. So that a row's bits do not depend on
# that, longer rows are summed in blocks of half of it and then over the blocks.
SPLIT = 2**15
# Up to this vocabulary float32 `log_softmax`, which adds a row up lane by lane, is within 1e-6 of log Σ e^(z − M).
FUSED_VOCAB = 2048
# With less entropy than this (nats), log Σ e^(z − M) may be so near 0 that 1e-6 is too much of it.
CONFIDENT_ENTROPY = 0.05
# Below this Σ e^(z − M) is summed in float64, for the digits beside the peak's own 1.
NEARLY_ONE = 1.0 + 2.0**-4
# Far below any difference of logits, and finite: 0 · LOWEST is 0 where 0 · (−inf) would be NaN.
LOWEST = -1e30
# In the place of statistics that nobody asked for.
_EMPTY = torch.empty(0)


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


def is_expanded(gradient: torch.Tensor) -> bool:
    """Whether it is one number seen many times, which is what a sum gives back."""
    return not any(gradient.stride())


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything narrower becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    transform: Transform,
    for_backward: bool = True,
) -> RowStats:
    """Log-prob of the target and entropy of every row.

    Args:
        logits: (rows, vocab), floating point, any strides.
        targets: (rows,), integer; one outside the vocabulary raises RuntimeError on a CPU, elsewhere its row is NaN.
        mask: (rows,), bool, or None; rows with False are not read and give 0.
        bias: (vocab,) or None.
        transform: what turns `logits + bias` into the logits of the softmax.
        for_backward: without it, peak and log_sum may be left empty.
    """
    k, vocab = transform.factor, logits.shape[1]
    fused = vocab <= FUSED_VOCAB
    if mask is None and 0 < logits.numel() <= _chunk_size(logits.device):
        return stats_of(_core(logits, bias, transform), targets, k, fused, for_backward)
    total = len(targets)
    out = None
    for rows, w in _chunks(logits, mask, bias, transform):
        part = stats_of(w, targets[rows], k, fused, for_backward)
        if len(w) == total:
            return part
        if out is None:
            out = RowStats(*(w.new_zeros(total if len(t) else 0) for t in part))
        for values, found in zip(out, part, strict=True):
            if len(values):
                values[rows] = found
    dtype = arithmetic_dtype(logits.dtype)
    return out or RowStats(*(torch.zeros(total, dtype=dtype, device=logits.device) for _ in RowStats._fields))


def stats_of(
    w: torch.Tensor, targets: torch.Tensor, k: float, fused: bool, for_backward: bool, consume: bool = False
) -> RowStats:
    """`row_stats` of rows whose exponentials fit beside them; `w` is left alone, or consumed.

    `fused` takes the fewest operations, and twice the work for rows that turn out confident.
    """
    if not fused:
        return _exact_stats(w, targets, k, consume)
    peak = w.amax(1) if for_backward or k != 1.0 else _EMPTY
    logp = torch.log_softmax(w if k == 1.0 else (w - peak.unsqueeze(1)).mul_(k), 1)
    logprob = _picked(logp, targets)
    entropy = torch.linalg.vecdot(logp.exp(), logp).neg_()
    log_sum = logp.amax(1).neg_() if for_backward else _EMPTY
    stats = RowStats(logprob, entropy, peak, log_sum)
    # NaN is unsure too: 0 · (−inf), or what is NaN in any arithmetic
    if not (entropy if len(entropy) == 1 else entropy.min()).item() >= CONFIDENT_ENTROPY:
        unsure = (entropy >= CONFIDENT_ENTROPY).logical_not_().nonzero().squeeze(1)
        if len(unsure) == len(w):
            return _exact_stats(w, targets, k, consume)
        for values, exact in zip(stats, _exact_stats(w[unsure], targets[unsure], k, True), strict=True):
            if values is not _EMPTY:
                values.index_copy_(0, unsure, exact)
    return stats


def _exact_stats(w: torch.Tensor, targets: torch.Tensor, k: float, consume: bool) -> RowStats:
    """Nothing is done here for rows of NaN, of −inf alone or with +inf: w − M is NaN in them, and all that follows."""
    y = targets if targets.is_cpu else targets.clamp(0, w.shape[1] - 1)
    peak = w.amax(1)
    d = w.sub_(peak.unsqueeze(1)) if consume else w - peak.unsqueeze(1)
    behind = _picked(d, y)
    p = d.exp() if k == 1.0 else (d * k).exp_()
    s = _row_sums(p, w.dtype)
    log_sum = s.log()
    if not s.min().item() >= NEARLY_ONE:
        log_sum = torch.where(s < NEARLY_ONE, _row_sums(p, torch.float64).log().to(w.dtype), log_sum)
    e = _row_sums(p.mul_(d.clamp_min_(LOWEST)), w.dtype)
    behind = behind if k == 1.0 else behind * k
    logprob = behind.sub_(log_sum)
    entropy = torch.addcdiv(log_sum, e, s, value=-k)
    if not targets.is_cpu:
        inside = targets == y
        logprob, entropy = torch.where(inside, logprob, math.nan), torch.where(inside, entropy, math.nan)
    return RowStats(logprob, entropy, peak, log_sum)


def _picked(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The value in each row's column; on a CPU RuntimeError where there is none."""
    return values.gather(1, columns.long().unsqueeze(1)).squeeze(1)


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
    active = None if mask is None or bool(mask.all()) else mask.nonzero()[:, 0]
    total = logits.shape[0] if active is None else len(active)
    size = max(1, _chunk_size(logits.device) // max(1, logits.shape[1]))
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total)) if active is None else active[start : start + size]
        yield rows, _core(logits[rows], bias, transform)


def _chunk_size(device: torch.device) -> int:
    return CPU_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK


def _core(logits: torch.Tensor, bias: torch.Tensor | None, transform: Transform) -> torch.Tensor:
    """w, in the arithmetic dtype."""
    dtype = arithmetic_dtype(logits.dtype)
    w = logits if logits.dtype == dtype else logits.to(dtype)
    if bias is not None:
        w = w + bias.to(dtype)
    return w if transform.squeeze is None else (w * transform.squeeze).tanh_()


def _row_sums(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if t.shape[1] < SPLIT:
        return t.sum(1, dtype=dtype)
    block = SPLIT // 2
    whole = t.shape[1] // block * block
    blocks = t[:, :whole].unflatten(1, (-1, block)).sum(2, dtype=dtype).sum(1)
    return blocks.add_(t[:, whole:].sum(1, dtype=dtype))
