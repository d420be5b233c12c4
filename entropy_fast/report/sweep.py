"""What a sweep looks like: `sweep.json`, a table for the terminal, and `sweep.png`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from entropy_fast._version import __version__
from entropy_fast.estimators.change import without_nan
from entropy_fast.report.writing import write_json_and_picture
from entropy_fast.sweep import Sweep

_NOUNS = {"sequence": "sequence", "per_token": "token"}


@dataclass(frozen=True)
class SweepReport:
    """A sweep with where it came from.

    Attributes:
        sweep: from `sweep`.
        title: one line for people.
        provenance: what was swept and how, for `sweep.json`.
    """

    sweep: Sweep
    title: str
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What `sweep.json` holds: strict JSON values, entropies in nats and bits."""
        head = {"entropy_fast": __version__, "title": self.title, "inputs": self.provenance}
        return without_nan(head | self.sweep.to_dict())

    def write(self, folder: str | Path) -> list[Path]:
        """Write `sweep.json` and, where matplotlib is installed, `sweep.png`; each whole or not at all."""
        return write_json_and_picture(self, folder, "sweep", "entropy_fast.report.sweep_figure")


def render(report: SweepReport) -> RenderableType:
    """One row a step, then the fit of each unit beside δH₁."""
    sweep = report.sweep
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("η", "ΔH/sequence", "± se", "ΔH/token", "± se", "ESS", "verdict"):
        table.add_column(heading, justify="left" if heading == "verdict" else "right", no_wrap=True)
    for eta, change in zip(sweep.etas, sweep.changes, strict=True):
        sequence, token = (change.estimates[f"{unit}/{change.headline.integrand}"] for unit in _NOUNS)
        table.add_row(
            f"{eta:g}",
            f"{sequence.value:+.4g}",
            f"{sequence.se:.2g}",
            f"{token.value:+.4g}",
            f"{token.se:.2g}",
            f"{change.diagnostics.ess_fraction:.0%}",
            change.verdict.status,
        )
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="dim")
    facts.add_column()
    for unit, noun in _NOUNS.items():
        fit = sweep.fit[unit]
        facts.add_row(
            f"per {noun}",
            f"ΔH ≈ {fit.initial_slope:+.4g} η {fit.curvature:+.3g} η²  (R² {fit.quadratic_r2:.4f}; linear alone "
            f"{fit.linear_r2:.4f})",
        )
        reach = f"up to |η| = {fit.linear_range:.3g}" if math.isfinite(fit.linear_range) else "throughout"
        facts.add_row("", f"linear within {fit.tolerance:.0%} {reach}")
        if sweep.predicted is not None:
            predicted = getattr(sweep.predicted, unit)
            facts.add_row("", f"δH₁ predicts {predicted.value:+.4g} ± {predicted.se:.2g} for η = 1")
    return Group(Text(report.title, style="bold"), Text(), table, Text(), facts)
