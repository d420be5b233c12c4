"""`sweep.png`: ΔH against the size of the step in both units, its fits, and what first order predicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from entropy_fast.report.figure import BAND, FAINT, INK, ORIGINAL, STYLE, UPDATED, title

if TYPE_CHECKING:
    from entropy_fast.report.sweep import SweepReport


def draw(report: SweepReport, path: str | Path) -> None:
    """Draw the sweep as a PNG of 1760 × 800 pixels.

    Args:
        report: what to draw.
        path: the file, written in place; give a temporary one for whole-or-nothing.
    """
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.05)
        figure = Figure(figsize=(11, 5), dpi=160, layout=layout)
        FigureCanvasAgg(figure)  # no pyplot: no global state, no display
        figure.suptitle(report.title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        for column, (unit, noun) in enumerate((("sequence", "sequence"), ("per_token", "token"))):
            _draw_unit(report, figure.add_subplot(1, 2, column + 1), unit, noun)
        figure.savefig(path, format="png")


def _draw_unit(report: SweepReport, axes: Any, unit: str, noun: str) -> None:
    sweep, fit = report.sweep, report.sweep.fit[unit]
    estimates = [change.estimates[f"{unit}/{change.headline.integrand}"] for change in sweep.changes]
    low, high = min(0.0, *sweep.etas), max(0.0, *sweep.etas)
    margin = 0.05 * (high - low)
    grid = torch.linspace(low - margin, high + margin, 200)
    if fit.linear_range < max(abs(low), abs(high)):
        axes.axvspan(
            -fit.linear_range,
            fit.linear_range,
            facecolor=BAND,
            edgecolor=FAINT,
            lw=0.6,
            zorder=0,
            label=f"linear within {fit.tolerance:.0%}",
        )
    axes.axhline(0, color=INK, lw=1)
    axes.plot(grid.numpy(), [fit.predict(float(x)) for x in grid], color=ORIGINAL, lw=1.8, label="quadratic fit")
    if sweep.predicted is not None:
        predicted = getattr(sweep.predicted, unit)
        axes.plot(
            grid.numpy(), (predicted.value * grid).numpy(), color=FAINT, lw=1.4, ls="--", label="first order, δH₁ η"
        )
    error = [[e.value - e.interval[0] for e in estimates], [e.interval[1] - e.value for e in estimates]]
    axes.errorbar(
        sweep.etas,
        [e.value for e in estimates],
        yerr=error,
        fmt="o",
        ms=5.5,
        color=UPDATED,
        capsize=3,
        label="measured, 95% interval",
        zorder=3,
    )
    axes.set_xlim(float(grid[0]), float(grid[-1]))
    axes.set_xlabel("step η, in units of the update")
    axes.set_ylabel(f"ΔH, nats per {noun}")
    axes.legend(loc="best")
    title(
        axes, f"Per {noun}", f"slope {fit.initial_slope:+.3g} nats at η = 0; R² of a straight line {fit.linear_r2:.4f}"
    )
