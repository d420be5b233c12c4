"""`ProbeComponents`: differentiable log-prob sums, the probe losses, and the first-order change δH₁."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from entropy_fast.component import Component
from entropy_fast.direction import delta_h1, norm
from entropy_fast.errors import InputError
from entropy_fast.rollouts import Rollouts
from entropy_fast.scoring import Scorer


class ProbeComponents(Component):
    """Teacher-forced log-probs with gradients, and what is built on them.

    The arguments are those of `Component`.
    """

    def _teacher_force_logprobs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Score the batch with gradients.

        Args:
            batch: see `Rollouts.from_batch`.

        Returns:
            `S` (B, G) float64, log-prob sums over the counted tokens in nats, differentiable; `L` (B, G) int32;
            and the batch's own `sequences`, `attention_masks`, `advantages` and `max_lengths` (None if absent).
        """
        rollouts = Rollouts.from_batch(batch)
        scorer = Scorer(self.model, rollouts, self._scoring(gradients=True))
        masks = scorer.masks
        with torch.enable_grad(), scorer.scope():
            placed = []
            for micro, stats in scorer.run():
                placed.append((*scorer.target_of(micro), stats.logprob.to(rollouts.tokens.device)))
        logprob = torch.zeros(rollouts.tokens.shape, dtype=torch.float64, device=rollouts.tokens.device)
        if placed:
            rows, columns, values = (torch.cat(parts) for parts in zip(*placed, strict=True))
            logprob = logprob.index_put((rows, columns), values.double())
        return {
            "S": rollouts.reshape(torch.where(masks.counted, logprob, 0.0).sum(1)),
            "L": rollouts.reshape(masks.lengths),
            "sequences": batch["sequences"],
            "attention_masks": batch["attention_masks"],
            "advantages": batch.get("advantages"),
            "max_lengths": batch.get("max_lengths"),
        }

    def _build_probe_loss_X_from_S(self, S_dict: Mapping[str, Any]) -> Tensor:
        """mean_b mean_g ((S − leave-one-out mean of S) S), the first factor without a gradient.

        Its gradient is the score-function estimate of −∇H (Williams 1992, with the leave-one-out baseline of Kool
        et al. 2019). With `entropy.length_normalize_deltah1`, S / max(L, 1) takes S's place. A prompt with a single
        sequence has no other to average, and takes 0 for the baseline.
        """
        s = self._probe_sums(S_dict)
        g = s.shape[1]
        fixed = s.detach()
        baseline = (fixed.sum(1, keepdim=True) - fixed) / (g - 1) if g > 1 else torch.zeros_like(fixed)
        return ((fixed - baseline) * s).mean()

    def _build_probe_loss_Y_from_S(self, S_dict: Mapping[str, Any]) -> Tensor:
        """mean_b mean_g (A / L_max · S): the policy-gradient objective, whose negative is the `rl` training loss.

        Raises:
            InputError: the batch had no advantages.
        """
        s = self._probe_sums(S_dict)
        if S_dict.get("advantages") is None:
            raise InputError("probe loss Y needs advantages (B, G) in the batch, and there are none")
        advantages = torch.as_tensor(S_dict["advantages"]).to(s)
        limits = S_dict.get("max_lengths")
        longest = S_dict["L"].amax(1) if limits is None else torch.as_tensor(limits)
        return (advantages / longest.to(s).clamp_min(1)[:, None] * s).mean()

    def compute_delta_h1(
        self,
        batch: Mapping[str, Any],
        optimizer: torch.optim.Optimizer,
        *,
        method: Literal["backward", "difference"] = "backward",
    ) -> dict[str, Any]:
        """First-order change of the entropy along the step that `optimizer` would take on this batch.

        δH₁ = ∇H·v, with v the optimizer's real step (moments, bias correction, weight decay, groups), by the score
        form: E[u (A − b)] per sequence, E[u (A − h L)] / E[L] per token, u = ∇S·v.

        Args:
            batch: see `Rollouts.from_batch`.
            optimizer: steps once and is put back, bit for bit.
            method: see `directional_scores`.

        Returns:
            `deltaH1` in nats in the configured unit, `deltaH1_se` over prompts, both also in bits, the same for the
            other unit, `step_norm`, and `update` (loss, gradient norm, share of weights left unchanged).
        """
        rollouts = Rollouts.from_batch(batch)
        with self._one_step(optimizer, rollouts) as (step, snapshot):
            direction = snapshot.difference()
        entropy = self.config.entropy
        result = delta_h1(
            self.model,
            rollouts,
            direction,
            self._scoring(),
            integrand=entropy.integrand,
            length_normalize=entropy.length_normalize_deltah1,
            method=method,
        )
        return result.to_dict() | {"update": vars(step) | {"step_norm": norm(direction)}}

    def _probe_sums(self, S_dict: Mapping[str, Any]) -> Tensor:
        s = S_dict["S"]
        if s.ndim != 2:
            raise InputError(f"S must have shape (B, G), got {tuple(s.shape)}")
        if self.config.entropy.length_normalize_deltah1:
            s = s / S_dict["L"].to(s).clamp_min(1)
        return s
