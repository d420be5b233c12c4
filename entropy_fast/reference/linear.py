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
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from entropy_fast.reference.rows import FUSED_VOCAB, LOWEST, RowGradients, arithmetic_dtype, stats_of
from entropy_fast.reference.transform import Transform

# (rows, columns) of a tile of logits. On a CPU it stays in cache while the statistics are taken; on an accelerator it
# fills the device (512 MiB of float32).
CPU_TILE = (512, 2048)
ACCELERATOR_TILE = (4096, 32768)
# Logits up to which starting operations takes longer than what they do.
FEW_LOGITS = 2**15


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


def combine_shards(shards: Sequence[LinearStats]) -> LinearStats:
    """The statistics of a whole vocabulary from those of its parts; each row's target is in one of the parts.

    With w_i the mass of part i: lse = log Σ e^(lse_i), and H = Σ w_i (H_i − log w_i), the chain rule of entropy.
    A part without finite logits in a row is NaN there and counts for nothing; a target in no part leaves NaN.
    """
    peaks, sums = (torch.stack([getattr(s, name) for s in shards]) for name in ("peak", "log_sum"))
    peaks = torch.where(sums.isnan() & (peaks == -math.inf), -math.inf, peaks)
    top = peaks.amax(0)
    parts = torch.where(peaks == -math.inf, -math.inf, peaks - top + sums)
    log_sum = torch.logsumexp(parts, 0)
    log_w = parts - log_sum
    w = log_w.exp()
    entropies = torch.stack([s.entropy for s in shards])
    entropy = torch.where(w > 0, w * (entropies - log_w), torch.where(w.isnan(), w, 0.0)).sum(0)
    z = torch.stack([s.logprob + s.log_sum + (s.peak - top) for s in shards])
    z = torch.where(z.isnan(), -math.inf, z).amax(0)
    found = torch.stack([~s.logprob.isnan() for s in shards]).any(0)
    return LinearStats(torch.where(found, z - log_sum, math.nan), entropy, top, log_sum)


def _slabs(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def filter_columns(device: torch.device) -> int:
    """Width of the slabs that `filtered` and `kept` speak of."""
    return _tile_shape(device)[1]


def _tile_shape(device: torch.device) -> tuple[int, int]:
    return CPU_TILE if device.type == "cpu" else ACCELERATOR_TILE


def _tile_for(rows: int, weight: torch.Tensor, filtered: bool, slab_copies: bool = False) -> tuple[int, int]:
    """The tile; a few rows take more columns at a time, except where slabs have a meaning of their own."""
    tile_rows, tile_columns = _tile_shape(weight.device)
    widening = 1 if filtered else max(1, min(tile_rows // max(rows, 1), _most_slabs(weight, slab_copies)))
    return tile_rows, widening * tile_columns


def _most_slabs(weight: torch.Tensor, slab_copies: bool) -> int:
    """How many slabs may be one where rows are few.

    What is as large as a slab of the head, a widened one or its gradient (`slab_copies`), sets a bound beside the tile.
    """
    return 32 if slab_copies or arithmetic_dtype(weight.dtype) != weight.dtype else _tile_shape(weight.device)[0]


def _is_one_tile(rows: int, weight: torch.Tensor) -> bool:
    """Whether the logits are one tile, or in another shape so few that they need no second."""
    tile_rows, tile_columns = _tile_shape(weight.device)
    vocab, most = weight.shape[0], tile_rows * tile_columns
    fits = rows * vocab <= (most if rows <= tile_rows else most // 4)
    return fits and vocab <= _most_slabs(weight, False) * tile_columns


def linear_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: Transform,
    shard: bool = False,
    filtered: bool = False,
    precision: str = "exact",
    for_backward: bool = True,
) -> tuple[LinearStats, torch.Tensor | None]:
    """Statistics of every row; with `filtered`, also the log-sum-exp of its logits in each slab, (slabs, rows).

    Args:
        hidden: (rows, width), any floating dtype.
        weight: (vocab, width), the head.
        targets: (rows,), integer; one outside the vocabulary makes its row NaN, or, of a shard, its log-prob alone. On
            a CPU, of a whole head with few logits (`FEW_LOGITS`), it raises RuntimeError.
        bias: (vocab,) or None.
        transform: what turns `x Wᵀ + bias` into the logits of the softmax.
        shard: the head is a part of a larger one (`combine_shards`).
        filtered: the backward will want to know where the mass is; slabs are `filter_columns` tokens wide.
        precision: for the kernels; the products here are exact whatever it says.
        for_backward: without it, peak and log_sum may be left empty.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    dtype = arithmetic_dtype(hidden.dtype)
    few = rows * vocab <= FEW_LOGITS
    if rows and hidden.is_cpu and not (shard or filtered) and (few or _is_one_tile(rows, weight)):
        if hidden.dtype != dtype:
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        z = _logits(hidden, weight, bias if bias is None else bias.to(dtype))
        fused = few and vocab <= FUSED_VOCAB
        return LinearStats(*stats_of(transform.apply_(z), targets, 1.0, fused, for_backward, consume=True)), None
    tile_rows, tile_columns = _tile_for(rows, weight, filtered)
    x = hidden.to(dtype)
    parts = list(_slabs(rows, tile_rows)) or [slice(0, 0)]
    found: list[_Running | None] = [None] * len(parts)
    slab_lse = torch.empty(-(-vocab // tile_columns), rows, dtype=dtype, device=hidden.device) if filtered else None
    for slab, columns in enumerate(_slabs(vocab, tile_columns)):
        w = weight[columns].to(dtype)
        b = None if bias is None else bias[columns].to(dtype)
        for i, r in enumerate(parts):
            z = transform.apply_(_logits(x[r], w, b))
            tile = _tile_stats(z, targets[r] - columns.start if columns.start else targets[r], tile_columns < vocab)
            if slab_lse is not None:
                slab_lse[slab, r] = tile.peak + tile.rest.log1p()
            before = found[i]
            found[i] = tile if before is None else _merge(before, tile)
    stats = [_finish(state, shard) for state in found if state is not None]
    whole = stats[0] if len(stats) == 1 else LinearStats(*(torch.cat(field) for field in zip(*stats, strict=True)))
    return whole, slab_lse


class _Running(NamedTuple):
    """What a row carries from slab to slab; without finite logits so far, its peak is −inf.

    `rest` is Σ e^(z − peak) less the peak's own 1, `moment` Σ e^(z − peak) (z − peak), `target` the target's logit,
    NaN where it has not been met.
    """

    peak: torch.Tensor
    rest: torch.Tensor
    moment: torch.Tensor
    target: torch.Tensor


def _tile_stats(z: torch.Tensor, column: torch.Tensor, of_many: bool) -> _Running:
    """Of one tile of logits, which is consumed; `column` is the target's, in the tile, `of_many` whether others follow.

    A row of only −inf has no peak to shift by. If it is the whole row, NaN is right; one of many tiles is shifted by 0,
    and every term is e^(−inf) = 0.
    """
    y = column.clamp(0, z.shape[1] - 1)
    target = torch.where(column == y, z.gather(1, y.long()[:, None])[:, 0], math.nan)
    peak = z.amax(1)
    d = z.sub_((torch.where(peak == -math.inf, 0.0, peak) if of_many else peak)[:, None])
    p = d.exp()
    rest = _sum_less_peak(p)
    # p is exactly 0 far below the peak; the clamp keeps 0 · (−inf) out
    return _Running(peak, rest, p.mul_(d.clamp_min_(LOWEST)).sum(1), target)


def _finish(state: _Running, shard: bool) -> LinearStats:
    # no finite logit, so no distribution; or no target: NaN throughout
    nothing = state.peak == -math.inf if shard else (state.peak == -math.inf) | state.target.isnan()
    log_sum = state.rest.log1p().masked_fill_(nothing, math.nan)
    entropy = log_sum - state.moment / (1.0 + state.rest)
    return LinearStats(state.target - state.peak - log_sum, entropy, state.peak, log_sum)


def _sum_less_peak(p: torch.Tensor) -> torch.Tensor:
    """Σ p less the 1 of the row's largest entry, with its digits where that 1 is nearly all."""
    rest = p.sum(1).sub_(1.0)
    few = (rest < 2.0**-4).nonzero()[:, 0]
    if len(few):
        q = p[few]
        rest[few] = q.scatter_(1, q.argmax(1, keepdim=True), 0.0).sum(1)
    return rest


def _merge(one: _Running, two: _Running) -> _Running:
    """Two parts of a row's vocabulary as one."""
    first = one.peak >= two.peak
    gap = torch.where(one.peak == two.peak, 0.0, -(one.peak - two.peak).abs())
    rest_top, rest_low = torch.where(first, one.rest, two.rest), torch.where(first, two.rest, one.rest)
    top, low = torch.where(first, one.moment, two.moment), torch.where(first, two.moment, one.moment)
    c = gap.exp()
    return _Running(
        torch.where(first, one.peak, two.peak),
        rest_top + c * (1.0 + rest_low),
        top + c * (low + gap.clamp_min_(LOWEST) * (1.0 + rest_low)),
        torch.where(two.target.isnan(), one.target, two.target),
    )


def linear_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: Transform,
    stats: LinearStats,
    grads: RowGradients,
    needs: tuple[bool, bool, bool],
    kept: torch.Tensor | None = None,
    precision: str = "exact",
) -> Gradients:
    """Gradients to hidden states, head and bias, for incoming gradients (rows,) of log-prob, entropy and log-sum-exp.

    `needs` says which of (hidden, weight, bias) to compute; the others cost nothing. `kept`, (slabs, rows) bool, says
    which rows' dz to compute in each slab; elsewhere it is taken for 0. Shapes as in `linear_stats`.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    dtype = arithmetic_dtype(hidden.dtype)
    tile_rows, tile_columns = _tile_for(rows, weight, kept is not None, needs[1])
    x = hidden.to(dtype)
    d_hidden = torch.zeros_like(x) if needs[0] else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
    d_bias = torch.empty(vocab, dtype=weight.dtype if bias is None else bias.dtype, device=x.device)
    for slab, columns in enumerate(_slabs(vocab, tile_columns)):
        w = weight[columns].to(dtype)
        b = None if bias is None else bias[columns].to(dtype)
        dw = torch.zeros_like(w) if d_weight is not None else None
        db = torch.zeros(w.shape[0], dtype=dtype, device=x.device)
        active = None if kept is None else kept[slab].nonzero()[:, 0]
        for part in _slabs(rows if active is None else len(active), tile_rows):
            r = part if active is None else active[part]
            dz = _dlogits(
                _logits(x[r], w, b),
                targets[r] - columns.start,
                transform,
                LinearStats(*(t[r] for t in stats)),
                RowGradients(*(None if t is None else t[r] for t in grads)),
            )
            if d_hidden is not None:
                if isinstance(r, slice):
                    d_hidden[r].addmm_(dz, w)
                else:
                    d_hidden.index_add_(0, r, dz @ w)
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
    # a row without its target has no gradient to give
    g = torch.where(logprob.isnan(), math.nan, g)
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
