"""What the two drop-in classes have in common: a model, a checked configuration, a logger."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from entropy_fast.config import Config
from entropy_fast.rollouts import Rollouts
from entropy_fast.scoring import Scoring
from entropy_fast.update import Snapshot, StepReport, one_step


class Component:
    """A model with a configuration.

    Args:
        model: a causal language model; every method leaves it, and the optimizer, bit for bit as they were.
        config: the proposal's configuration (a mapping, or a `Config`); see `Config.from_dict`.
        logger: a `logging.Logger`; None takes the package's.
        tokenizer: its EOS ids join the model's; optional.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Mapping[str, Any] | Config | None = None,
        logger: logging.Logger | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.model = model
        self.config = config if isinstance(config, Config) else Config.from_dict(config, strict=False)
        self.logger = logger or logging.getLogger("entropy_fast")
        self.tokenizer = tokenizer

    def _scoring(self, config: Config | None = None, model: nn.Module | None = None, **options: Any) -> Scoring:
        """The scoring that the configuration asks for; options as in `Scoring.from_config`."""
        return Scoring.from_config(config or self.config, model or self.model, self.tokenizer, **options)

    def _one_step(
        self,
        optimizer: torch.optim.Optimizer,
        rollouts: Rollouts,
        config: Config | None = None,
        model: nn.Module | None = None,
    ) -> AbstractContextManager[tuple[StepReport, Snapshot]]:
        """The configured training step on these rollouts; see `one_step`."""
        settings = (config or self.config).importance_sampling
        return one_step(
            model or self.model,
            optimizer,
            rollouts,
            self._scoring(config, model, gradients=True),
            loss=settings.training_loss,
            master_weights=settings.master_weights,
            max_grad_norm=settings.max_grad_norm,
            snapshot_device=settings.snapshot_device,
        )
