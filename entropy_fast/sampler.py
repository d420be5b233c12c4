"""`ImportanceSampler`: by how much an update changes the policy's entropy, from rollouts of the original policy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from entropy_fast.change import Change, measure_change, measure_noise_floor
from entropy_fast.component import Component
from entropy_fast.config import Config
from entropy_fast.parts import Attribution, attribute, update_parts
from entropy_fast.rollouts import Rollouts
from entropy_fast.scoring import score
from entropy_fast.sweep import Sweep, sweep
from entropy_fast.update import StepReport


class ImportanceSampler(Component):
    """Scores rollouts before and after one optimizer step and reports the change of entropy with its uncertainty.

    The arguments are those of `Component`.
    """

    def compute_entropy_change(
        self, batch_data: Mapping[str, Any], optimizer: torch.optim.Optimizer | None = None
    ) -> dict[str, Any]:
        """Score, step, score, restore: ΔH of one optimizer step, evaluated and taken on the same batch.

        Args:
            batch_data: see `Rollouts.from_batch`.
            optimizer: takes the step; None makes an AdamW with the configuration's `learning_rate`.

        Returns:
            `original_entropy`, `updated_entropy` and `deltaH_snis` in nats, in the configured unit (`deltaH_snis`
            keeps its name whatever the weighting); `ESS`; `psis_k`; `timing` in seconds; `diagnostics`; and, new,
            `sequence` and `per_token` (estimate, standard errors, interval, jackknife, in nats and bits), `verdict`,
            `noise_floor` and `update`.

        Raises:
            InputError: the batch does not fit, or `training_loss: rl` without advantages.
        """
        rollouts = Rollouts.from_batch(batch_data)
        change, step, timing = self._change_by_step(self.model, rollouts, rollouts, optimizer, self.config)
        return self._result(change, step, timing)

    def entropy_change_two_batch(
        self,
        model: nn.Module | None,
        E_batch: Mapping[str, Any],
        U_batch: Mapping[str, Any],
        optimizer: torch.optim.Optimizer | None = None,
        cfg_importance: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """ΔH evaluated on one batch, of a step taken on another.

        Args:
            model: None takes the sampler's own.
            E_batch: rollouts that the entropy is evaluated on.
            U_batch: rollouts that the step is taken on.
            optimizer: see `compute_entropy_change`.
            cfg_importance: keys of the `importance_sampling` section (and microbatch sizes of `memory_config`) that
                override the configuration.

        Returns:
            `H_orig`, `H_upd`, `deltaH_true` in nats per sequence, `H_orig_tok`, `H_upd_tok`, `deltaH_true_tok` in
            nats per token, `timing`, `diagnostics`, and what `compute_entropy_change` adds.
        """
        config = self._with_importance(cfg_importance)
        evaluated, stepped = Rollouts.from_batch(E_batch), Rollouts.from_batch(U_batch)
        change, step, timing = self._change_by_step(
            self.model if model is None else model, evaluated, stepped, optimizer, config
        )
        sequence, token = (change.estimates[f"{unit}/{config.entropy.integrand}"] for unit in ("sequence", "per_token"))
        return {
            "H_orig": sequence.original,
            "H_upd": sequence.updated,
            "deltaH_true": sequence.value,
            "H_orig_tok": token.original,
            "H_upd_tok": token.updated,
            "deltaH_true_tok": token.value,
        } | self._result(change, step, timing)

    def validate_importance_sampling(
        self, batch_data: Mapping[str, Any], optimizer: torch.optim.Optimizer | None = None
    ) -> bool:
        """Whether the machinery holds on this batch: True, or False with the reasons logged.

        Checks that the same policy scored twice gives exactly the same log-probs, that model and optimizer come back
        bit for bit, and that the verdict on the measured change finds no fault with the rollouts.
        """
        rollouts = Rollouts.from_batch(batch_data)
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        result = self.compute_entropy_change(batch_data, optimizer)
        first = score(self.model, rollouts, self._scoring())
        second = score(self.model, rollouts, replace(self._scoring(), layout=first.layout))
        faults = []
        if not torch.equal(first.logprob, second.logprob):
            faults.append("scoring the same policy twice gave different log-probs")
        changed = [name for name, tensor in self.model.state_dict().items() if not _same_bits(tensor, before[name])]
        if changed:
            faults.append(f"{changed[0]} was not restored")
        faults += [f["message"] for f in result["verdict"]["findings"] if f["severity"] == "fail"]
        for fault in faults:
            self.logger.warning("importance sampling: %s", fault)
        return not faults

    def entropy_change_between(
        self,
        batch_data: Mapping[str, Any],
        updated: nn.Module | AbstractContextManager[Any],
        original: AbstractContextManager[Any] | None = None,
    ) -> dict[str, Any]:
        """ΔH between two policies that exist already, no step taken.

        Args:
            batch_data: rollouts drawn from the original policy.
            updated: another model, or a context manager that makes the sampler's own model the updated policy while
                it is entered: `policies.with_state`, `policies.moved`, ...
            original: likewise for the original policy: `policies.adapter_off(model)` with
                `updated=contextlib.nullcontext()` compares a LoRA adapter with its base. None takes the model as it is.

        Returns:
            As `compute_entropy_change`, without `update`.
        """
        rollouts = Rollouts.from_batch(batch_data)
        clock = _Clock(self.model)
        scoring = self._scoring()
        with original or nullcontext():
            first = score(self.model, rollouts, scoring)
            clock.lap("score_original")
            floor = measure_noise_floor(self.model, rollouts, first, self.config, scoring)
            clock.lap("noise_floor")
        other, policy = (updated, nullcontext()) if isinstance(updated, nn.Module) else (self.model, updated)
        with policy:
            second = score(other, rollouts, replace(scoring, layout=first.layout))
            clock.lap("score_updated")
        change = measure_change(rollouts, first, second, self.config, noise_floor=floor)
        clock.lap("statistics")
        return self._result(change, None, clock.laps | {"total": sum(clock.laps.values())})

    def sweep(
        self,
        batch_data: Mapping[str, Any],
        optimizer: torch.optim.Optimizer | None = None,
        etas: Sequence[float] = (0.1, 0.3, 1.0, 3.0),
        U_batch: Mapping[str, Any] | None = None,
    ) -> Sweep:
        """ΔH at θ + η v, with v the step that `optimizer` would take, for a list of η.

        Args:
            batch_data: rollouts that the entropy is evaluated on.
            optimizer: see `compute_entropy_change`.
            etas: in units of that step.
            U_batch: rollouts that the step is taken on; None takes `batch_data`.
        """
        rollouts = Rollouts.from_batch(batch_data)
        stepped = rollouts if U_batch is None else Rollouts.from_batch(U_batch)
        with self._one_step(self._optimizer(self.model, optimizer), stepped) as (_, snapshot):
            direction = snapshot.difference()
        return sweep(
            self.model,
            rollouts,
            direction,
            etas,
            self.config,
            tokenizer=self.tokenizer,
            in_sample=stepped is rollouts,
        )

    def attribute(self, batch_data: Mapping[str, Any], optimizer: torch.optim.Optimizer | None = None) -> Attribution:
        """Which part of the step moves the entropy, to first order: momentum, weight decay, each sequence.

        Args:
            batch_data: rollouts that the step is taken on.
            optimizer: a torch AdamW, Adam or SGD; None as for `compute_entropy_change`.
        """
        rollouts = Rollouts.from_batch(batch_data)
        settings = self.config.importance_sampling
        parts = update_parts(
            self.model,
            self._optimizer(self.model, optimizer),
            rollouts,
            self._scoring(gradients=True),
            loss=settings.training_loss,
            max_grad_norm=settings.max_grad_norm,
        )
        return attribute(self.model, rollouts, parts, self._scoring())

    def _compute_logprobs_for_sequences(
        self, sequences: Tensor, prompt_lens: Tensor, attention_masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sequence log-prob sums S (B, G), float32, in nats, and lengths L (B, G), int32, of the counted tokens.

        Args:
            sequences: (B, G, T) token ids.
            prompt_lens: (B,) the column at which generation starts.
            attention_masks: (B, G, T).
        """
        batch = {"sequences": sequences, "prompt_lens": prompt_lens, "attention_masks": attention_masks}
        rollouts = Rollouts.from_batch(batch)
        scores = score(self.model, rollouts, replace(self._scoring(), entropy=False))
        return rollouts.reshape(scores.S.float()), rollouts.reshape(scores.lengths)

    def _change_by_step(
        self,
        model: nn.Module,
        evaluated: Rollouts,
        stepped: Rollouts,
        optimizer: torch.optim.Optimizer | None,
        config: Config,
    ) -> tuple[Change, StepReport, dict[str, float]]:
        optimizer = self._optimizer(model, optimizer)
        clock = _Clock(model)
        scoring = self._scoring(config, model)
        original = score(model, evaluated, scoring)
        clock.lap("score_original")
        floor = measure_noise_floor(model, evaluated, original, config, scoring)
        clock.lap("noise_floor")
        with self._one_step(optimizer, stepped, config, model) as (step, _):
            clock.lap("update")
            updated = score(model, evaluated, replace(scoring, layout=original.layout))
            clock.lap("score_updated")
        clock.lap("restore")
        change = measure_change(evaluated, original, updated, config, noise_floor=floor, in_sample=evaluated is stepped)
        clock.lap("statistics")
        return change, step, clock.laps | {"total": sum(clock.laps.values())}

    def _optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
        if optimizer is not None:
            return optimizer
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=self.config.learning_rate)

    def _with_importance(self, overrides: Mapping[str, Any] | None) -> Config:
        sections = self.config.to_dict()
        for key, value in (overrides or {}).items():
            section = "memory_config" if key in sections["memory_config"] else "importance_sampling"
            sections[section][key] = value
        return Config.from_dict(sections, strict=True)

    def _result(self, change: Change, step: StepReport | None, timing: dict[str, float]) -> dict[str, Any]:
        report = change.to_dict()
        headline = change.headline
        if change.low_ess:
            self.logger.warning(
                "effective sample size %.1f of %d sequences is below the threshold; %s",
                change.diagnostics.ess,
                len(change.rollouts),
                "draw fresh rollouts from the updated policy"
                if self.config.importance_sampling.resample_on_low_ess
                else "the estimate rests on few sequences",
            )
        result = {
            "deltaH_snis": headline.value,
            "ESS": change.diagnostics.ess,
            "psis_k": change.diagnostics.khat,
            "original_entropy": headline.original,
            "updated_entropy": headline.updated,
            "unit": headline.unit,
            "timing": timing,
        } | ({} if step is None else {"update": asdict(step)})
        return result | {key: report[key] for key in report if key not in result}


class _Clock:
    """Seconds between laps; on a GPU, of finished work."""

    def __init__(self, model: nn.Module) -> None:
        self._cuda = any(p.is_cuda for p in model.parameters())
        self.laps: dict[str, float] = {}
        self._last = self._now()

    def lap(self, name: str) -> None:
        now = self._now()
        self.laps[name] = now - self._last
        self._last = now

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )
