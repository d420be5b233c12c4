"""What models do between the head's product and the softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Transform(NamedTuple):
    """z = softcap · tanh(scale · raw / softcap) / temperature; without a softcap, z = scale · raw / temperature.

    `raw` is the head's product with the bias added. Sources of the parts: Gemma 2 (softcap), Cohere and Granite
    (scale), the temperature that the rollouts were sampled at.
    """

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    @property
    def factor(self) -> float:
        """z = factor · core(raw)."""
        return (self.scale if self.softcap is None else self.softcap) / self.temperature

    @property
    def squeeze(self) -> float | None:
        """core(raw) = tanh(squeeze · raw); None without a softcap, where core(raw) = raw."""
        return None if self.softcap is None else self.scale / self.softcap

    def apply_(self, raw: torch.Tensor) -> torch.Tensor:
        """The logits of the softmax, written over `raw`."""
        if self.softcap is not None:
            return raw.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        factor = self.scale / self.temperature
        return raw if factor == 1.0 else raw.mul_(factor)

    def apply_with_slope_(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """The logits, written over `raw`, and their derivative with respect to `raw`."""
        if self.softcap is None:
            return self.apply_(raw), self.scale / self.temperature
        t = raw.mul_(self.scale / self.softcap).tanh_()
        slope = torch.addcmul(torch.ones((), dtype=t.dtype, device=t.device), t, t, value=-1.0)
        return t.mul_(self.softcap / self.temperature), slope.mul_(self.scale / self.temperature)
