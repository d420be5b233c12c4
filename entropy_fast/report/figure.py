"""`report.png`: by how much, whether to believe it, where in the sequence, and what of it is length."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor

if TYPE_CHECKING:
    from entropy_fast.report import Report

ORIGINAL, UPDATED, INK, FAINT, BAND = "#3b6fb6", "#e07b39", "#333333", "#8a8a8a", "#e9e9e9"
_MAX_POINTS = 4000  # in the scatter; more make a blot
_MAX_BINS = 60  # along the sequence
_MIN_RUNNING = 8  # sequences that a mean by position needs
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
_LABELS = {"sampled": "sampled", "rao_blackwell": "token entropies", "prefix": "prefix weights"}
_VERDICT = {"believable": "#2e7d4f", "caution": "#b07d00", "not believable": "#b3372f"}


def draw(report: Report, path: str | Path) -> None:
    """Draw the report as a PNG of 1760 × 1360 pixels.

    Args:
        report: what to draw.
        path: the file, written in place; give a temporary one for whole-or-nothing.
    """
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.05, hspace=0.05)
        figure = Figure(figsize=(11, 8.5), dpi=160, layout=layout)
        FigureCanvasAgg(figure)  # no pyplot: no global state, no display
        status = report.change.verdict.status
        figure.suptitle(report.title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        figure.text(0.99, 0.985, status, ha="right", va="top", color=_VERDICT[status], fontsize=12, fontweight="bold")
        grid = figure.add_gridspec(2, 2)
        _draw_change(report, figure, grid[0, 0])
        _draw_weights(report, figure.add_subplot(grid[0, 1]))
        _draw_positions(report, figure.add_subplot(grid[1, 0]))
        _draw_lengths(report, figure.add_subplot(grid[1, 1]))
        figure.savefig(path, format="png")


def _draw_change(report: Report, figure: Figure, cell: Any) -> None:
    """ΔH with its interval, one axis a unit, for every estimator."""
    change = report.change
    rows = cell.subgridspec(2, 1)
    for row, (unit, noun) in enumerate((("sequence", "sequence"), ("per_token", "token"))):
        axes = figure.add_subplot(rows[row])
        estimates = {n.split("/")[1]: e for n, e in change.estimates.items() if n.startswith(f"{unit}/")}
        for y, e in enumerate(reversed(estimates.values())):
            chosen = e.integrand == change.headline.integrand and e.estimator == change.headline.estimator
            error = [[e.value - e.interval[0]], [e.interval[1] - e.value]] if math.isfinite(e.se) else None
            axes.errorbar(
                e.value,
                y,
                xerr=error,
                fmt="o",
                ms=6 if chosen else 4.5,
                color=UPDATED if chosen else FAINT,
                lw=2 if chosen else 1.4,
                capsize=3,
            )
        axes.axvline(0, color=INK, lw=1)
        if change.floor is not None and unit == change.headline.unit:
            axes.axvspan(-change.floor.floor, change.floor.floor, color=BAND, zorder=0)
        axes.set_yticks(range(len(estimates)), [_LABELS[name] for name in reversed(estimates)])
        axes.set_ylim(-0.6, len(estimates) - 0.4)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
        axes.set_xlabel(f"nats per {noun}", labelpad=1)
        if row == 0:
            e = change.headline
            headline = (
                f"{_signed(e.value, '.3g')} ± {e.se:.2g} nats per {'token' if e.unit == 'per_token' else 'sequence'}"
            )
            title(axes, "Entropy change ΔH", f"{headline}; bars are {e.confidence:.0%} intervals")


def _draw_weights(report: Report, axes: Any) -> None:
    """How far the log weights spread, and whether their tail is tame."""
    change, d = report.change, report.change.diagnostics
    log_weight = change.headline.log_weight.cpu()
    finite = log_weight[log_weight.isfinite()]
    axes.hist(finite.numpy(), bins=min(60, max(10, int(len(finite) ** 0.5) * 2)), color=ORIGINAL, alpha=0.85)
    axes.axvline(0, color=INK, lw=1)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("log importance weight of a sequence, nats")
    axes.set_ylabel("sequences")
    axes.margins(x=0.02)
    facts = (
        f"ESS {d.ess_fraction:.0%} of {d.n_sequences:,}",
        f"k̂ {d.khat:.2f} (good below {d.khat_threshold:.2f})",
        f"mean {d.mean_weight:.3f} (z = {_signed(d.mean_weight_z, '.1f')})",
    )
    title(axes, "Importance weights", ", ".join(facts))


def _draw_positions(report: Report, axes: Any) -> None:
    """Entropy by position among the sequences that are still running, under both policies."""
    change = report.change
    generated = change.original.masks.generated.cpu()
    values0, values1, what = _per_token(report)
    ratio = (change.updated.logprob - change.original.logprob).cpu().double().masked_fill(~generated, 0)
    before = ratio.cumsum(1) - ratio  # the log weight of the prefix before each token
    position = (generated.cumsum(1) - 1).clamp_min(0)
    longest = int(position[generated].max()) + 1
    width = math.ceil(longest / _MAX_BINS)
    bins = -(-longest // width)
    index = (position // width)[generated]
    weight = (before[generated] - before[generated].max()).exp()

    def mean(values: Tensor, w: Tensor) -> Tensor:
        total = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, w)
        return torch.zeros_like(total).index_add_(0, index, w * values[generated].double()) / total

    centres = (torch.arange(bins) * width + (width + 1) / 2).numpy()
    count = torch.bincount(index, minlength=bins) / width
    shown = max(1, int((count >= _MIN_RUNNING).sum()))
    running = count / len(generated)
    alive = axes.twinx()
    alive.bar(centres[:shown], running[:shown].numpy(), width=width, color=BAND, zorder=0)
    alive.set_ylim(0, 1)
    alive.set_yticks([0, 0.5, 1], ["0", "50%", "100%"], color=FAINT)
    alive.set_ylabel("sequences still running", color=FAINT)
    alive.tick_params(length=0)
    axes.set_zorder(alive.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.plot(
        centres[:shown], mean(values0, torch.ones_like(weight))[:shown].numpy(), color=ORIGINAL, lw=2, label="original"
    )
    axes.plot(
        centres[:shown], mean(values1, weight)[:shown].numpy(), color=UPDATED, lw=1.6, label="updated, reweighted"
    )
    axes.set_ylim(0, axes.get_ylim()[1] * 1.2)
    axes.set_xlim(0.5, shown * width + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("position in the completion, tokens")
    axes.set_ylabel(f"{what}, nats per token")
    axes.legend(loc="upper right", ncols=2)
    title(axes, "Entropy by position", "mean over the sequences still running (grey: their share)")


def _draw_lengths(report: Report, axes: Any) -> None:
    """−S against L: the part of a sequence's entropy that is only its length."""
    change, length = report.change, report.length
    surprisal, lengths = -change.original.S.cpu(), change.original.lengths.cpu()
    stride = math.ceil(len(lengths) / _MAX_POINTS)
    axes.scatter(lengths[::stride].numpy(), surprisal[::stride].numpy(), s=9, color=ORIGINAL, alpha=0.35, lw=0)
    per_token = change.estimates[f"per_token/{change.headline.integrand}"]
    end = float(lengths.max())
    for h, color, name in ((per_token.original, ORIGINAL, "original"), (per_token.updated, UPDATED, "updated")):
        axes.plot([0, end], [0, h * end], color=color, lw=1.8, label=f"{name}: {h:.3f} nats/token")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("length L, tokens")
    axes.set_ylabel("−S of a sequence, nats")
    axes.legend(loc="upper left")
    parts = (
        f"ΔH per sequence  {_signed(length.change, '.2f')}",
        f"by length  {_signed(length.length_part, '.2f')}",
        f"per token  {_signed(length.per_token_part, '.2f')}",
    )
    axes.text(0.98, 0.03, "\n".join(parts), transform=axes.transAxes, ha="right", va="bottom", linespacing=1.4)
    shares = f"{length.sequence_r2:.0%} of the variance of −S and {length.per_token_r2:.0%} of that of −S/L"
    title(axes, "What is only length", f"L explains {shares}")


def title(axes: Any, heading: str, subtitle: str) -> None:
    """A bold heading with a pale line under it."""
    axes.set_title(heading, pad=22)
    note = axes.annotate(subtitle, (0, 1), (0, 7), "axes fraction", "offset points", color=FAINT, fontsize=9.5)
    note.set_in_layout(False)  # a long one may run over the margin rather than squeeze the panels


def _signed(value: float, form: str) -> str:
    return format(value, "+" + form).replace("-", "−")


def _per_token(report: Report) -> tuple[Tensor, Tensor, str]:
    original, updated = report.change.original, report.change.updated
    if original.entropy is not None and updated.entropy is not None:
        return original.entropy.cpu(), updated.entropy.cpu(), "entropy"
    return -original.logprob.cpu(), -updated.logprob.cpu(), "−log p"
