"""The report for the terminal: the change in both units, in nats and bits, and whether to believe it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from entropy_fast.estimators import EntropyChange
    from entropy_fast.report import Report

_STYLES = {"believable": "bold green", "caution": "bold yellow", "not believable": "bold red"}
_MARKS = {"fail": ("✗", "red"), "caution": ("!", "yellow"), "note": ("·", "dim")}
_UNITS = {"sequence": "sequence", "per_token": "token"}
_ESTIMATORS = {"sampled": "sampled", "rao_blackwell": "token entropies", "prefix": "prefix weights"}


def render(report: Report) -> RenderableType:
    """The whole report, at home in 80 columns."""
    return Group(
        Text(report.title, style="bold"),
        Padding(estimates_table(report), (1, 0)),
        facts_table(report),
        Padding(verdict_text(report), (1, 0, 0, 0)),
    )


def estimates_table(report: Report) -> Table:
    """ΔH by unit and estimator. The headline is bold."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("entropy", no_wrap=True)
    for heading in ("original", "updated", "ΔH", "± se", f"{report.change.headline.confidence:.0%} interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    change = report.change
    for unit, noun in _UNITS.items():
        table.add_row(Text(f"per {noun}, nats", style="dim"))
        for name, estimate in change.estimates.items():
            if not name.startswith(f"{unit}/"):
                continue
            kind = name.split("/")[1]
            style = "bold" if _same(estimate, change.headline) else None
            table.add_row(*_row(f"  {_ESTIMATORS[kind]}", estimate.to_dict()), style=style)
            if kind == change.headline.integrand:
                table.add_row(*_row(f"  {_ESTIMATORS[kind]}, bits", estimate.bits), style=style)
    return table


def render_views(reports: list[Report]) -> RenderableType:
    """Sequence-level beside per-token, one row a report: what of ΔH is only length."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim", title="The two views, in nats")
    table.title_justify = "left"
    table.title_style = "bold"
    table.add_column("update")
    for heading in ("ΔH/sequence", "by length", "per token", "ΔH/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for report in reports:
        change, length = report.change, report.length
        cells = []
        for unit in _UNITS:
            e = change.estimates[f"{unit}/{change.headline.integrand}"]
            form = _form(e.value, e.se)
            cells.append(f"{_shown(e.value, '+' + form)} ± {_shown(e.se, form)}")
        table.add_row(report.title, cells[0], f"{length.length_part:+.2f}", f"{length.per_token_part:+.2f}", cells[1])
    return table


def facts_table(report: Report) -> Table:
    """What the estimate rests on, one fact a line."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for label, fact in _facts(report):
        table.add_row(label, fact)
    return table


def verdict_text(report: Report) -> RenderableType:
    """The verdict and its reasons, gravest first."""
    verdict = report.change.verdict
    grid = Table.grid(padding=(0, 1, 0, 0))
    for finding in verdict.findings:
        mark, style = _MARKS[finding.severity]
        grid.add_row(Text(mark, style=style), Text(finding.message))
    for note in report.change.notes:
        grid.add_row(Text("·", style="dim"), Text(note))
    heading = Text.assemble("verdict: ", (verdict.status, _STYLES[verdict.status]))
    return Group(heading, grid) if grid.row_count else heading


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    change, d, length = report.change, report.change.diagnostics, report.length
    counts = change.counts
    yield (
        "rollouts",
        f"{counts['sequences']:,} sequences of {counts['prompts']:,} prompts, {counts['counted_tokens']:,} tokens"
        f" ({counts['truncated'] / counts['sequences']:.0%} cut at the limit)",
    )
    yield (
        "weights",
        f"ESS {d.ess:,.0f} of {d.n_sequences:,} ({d.ess_fraction:.0%}), largest share {d.max_weight_share:.1%}",
    )
    yield "", f"mean {d.mean_weight:.4g} where 1 is expected (z = {d.mean_weight_z:+.1f})"
    tail = f"k̂ {d.khat:.2f}, good below {d.khat_threshold:.2f}" if math.isfinite(d.khat) else "k̂: no tail to fit"
    yield "", f"{tail}; KL {d.kl:.3g} nats/sequence"
    if change.floor is not None:
        unit = _UNITS[change.headline.unit]
        yield "noise floor", f"{change.floor.floor:.1g} nats/{unit} (the same policy scored in another layout)"
    yield "length", f"{length.length_original:.2f} → {length.length_updated:.2f} tokens a sequence on average"
    yield "", f"explains {length.sequence_r2:.0%} of the variance of −S, {length.per_token_r2:.0%} of that of −S/L"
    parts = f"{length.length_part:+.3f} by length {length.per_token_part:+.3f} per token"
    yield "", f"ΔH/sequence {length.change:+.3f} = {parts}"


def _row(label: str, e: dict[str, Any]) -> tuple[str, ...]:
    form = _form(e["value"], e["se"])
    level = ".4f" if form.endswith("e") else form
    low, high = (_shown(bound, "+" + form) for bound in e["interval"])
    interval = "–" if low == "–" else f"[{low}, {high}]"
    values = (_shown(e["original"], level), _shown(e["updated"], level), _shown(e["value"], "+" + form))
    return (label, *values, _shown(e["se"], form), interval)


def _form(value: float, se: float) -> str:
    """The format that shows two digits of the standard error; scientific where that takes many decimals."""
    scale = se if math.isfinite(se) and se > 0 else abs(value) / 10
    if not math.isfinite(scale) or scale == 0:
        return ".4f"
    decimals = max(1, 1 - math.floor(math.log10(scale)))
    return f".{decimals}f" if decimals <= 4 and abs(value) < 1e5 else ".1e"


def _shown(number: float, form: str) -> str:
    return format(number, form) if math.isfinite(number) else "–"


def _same(a: EntropyChange, b: EntropyChange) -> bool:
    return (a.unit, a.integrand, a.estimator) == (b.unit, b.integrand, b.estimator)
