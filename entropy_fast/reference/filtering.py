"""Which slabs of the vocabulary a row's gradient can do without, by probability mass."""

from __future__ import annotations

import torch


def choose_slabs(
    slab_lse: torch.Tensor, lse: torch.Tensor, target_slab: torch.Tensor, bound: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slabs to keep, (slabs, rows) bool, and the mass of the others, (rows,).

    Each row drops its lightest slabs as long as their mass adds up to at most `bound`; the target's slab stays. A
    threshold on single probabilities would instead lose the whole tail of a flat row. A row of NaN keeps everything.

    Args:
        slab_lse: (slabs, rows), the log-sum-exp of the row's logits in each slab.
        lse: (rows,), of all its logits.
        target_slab: (rows,), the slab of the target; outside [0, slabs) there is none.
        bound: the largest mass to drop from a row, in [0, 1).
    """
    mass = (slab_lse - lse).exp()
    slabs = torch.arange(len(mass), device=mass.device)[:, None]
    ordered, order = torch.where(slabs == target_slab, float("inf"), mass).sort(dim=0, stable=True)
    kept = torch.ones_like(mass, dtype=torch.bool).scatter_(0, order, ~(ordered.cumsum(0) <= bound))
    return kept, torch.where(kept, 0.0, mass).sum(0)
