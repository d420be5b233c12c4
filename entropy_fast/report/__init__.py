"""What a measured change looks like: `report.json`, a table for the terminal, and `report.png`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from entropy_fast._version import __version__
from entropy_fast.change import Change
from entropy_fast.estimators.change import without_nan
from entropy_fast.report.length import LengthBias, length_bias
from entropy_fast.report.writing import check_folder, write_json_and_picture


@dataclass(frozen=True)
class Report:
    """A measured change with where it came from.

    Attributes:
        change: from `measure_change`.
        title: one line for people.
        provenance: what was compared and how (paths, configuration, seeds), for `report.json`.
    """

    change: Change
    title: str
    provenance: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def length(self) -> LengthBias:
        """The sequence-level against the per-token view."""
        return length_bias(self.change)

    def to_dict(self) -> dict[str, Any]:
        """What `report.json` holds: strict JSON values, entropies in nats and bits."""
        return without_nan(
            {
                "entropy_fast": __version__,
                "title": self.title,
                "inputs": self.provenance,
                **self.change.to_dict(),
                "length_bias": self.length.to_dict(),
            }
        )

    def write(self, folder: str | Path) -> list[Path]:
        """Write `report.json` and, where matplotlib is installed, `report.png`; each whole or not at all.

        Returns:
            The files that were written.
        """
        return write_json_and_picture(self, folder, "report", "entropy_fast.report.figure")


__all__ = ["LengthBias", "Report", "check_folder", "length_bias"]
