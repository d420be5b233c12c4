"""A calibration for the terminal: the noise of each precision, in the units of what it disturbs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from entropy_fast.calibration import PrecisionNoise


def render(noises: Sequence[PrecisionNoise]) -> RenderableType:
    """One row a precision."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("precision", no_wrap=True)
    for heading in ("floor/seq", "floor/token", "noise of S", "ESS", "S − S₃₂", "repeats"):
        table.add_column(heading, justify="right", no_wrap=True)
    for noise in noises:
        gap = noise.gap_to_float32
        table.add_row(
            noise.precision.replace("_", " "),
            f"{noise.floors['sequence/sampled'].floor:.1e}",
            f"{noise.floors['per_token/sampled'].floor:.1e}",
            f"{noise.log_weight_rms:.1e}",
            f"{noise.ess_fraction:.0%}",
            "" if gap is None else f"{gap:.1e}",
            "exactly" if noise.repeatable else "NO",
        )
    explanation = (
        "floor: a smaller |ΔH| says nothing. noise of S: what another batch layout does to a sequence's log-prob, "
        "root mean square. ESS: what that alone leaves of the weights. S₃₂: S in float32. All in nats."
    )
    return Group(table, Text(), Text(explanation, style="dim"))
