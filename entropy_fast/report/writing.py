"""A folder with one JSON file and, where matplotlib is installed, one picture; each whole or not at all."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from entropy_fast.errors import InputError
from entropy_fast.files import atomic_path, atomic_text


def write_json_and_picture(report: Any, folder: str | Path, name: str, figure: str) -> list[Path]:
    """Write `name`.json from `report.to_dict()` and `name`.png from the `draw` of the module `figure`.

    Returns:
        The files that were written; without matplotlib, which is an extra, the first alone.

    Raises:
        InputError: `folder` is a file.
    """
    folder = check_folder(folder)
    written = [folder / f"{name}.json"]
    with atomic_text(written[0]) as stream:
        json.dump(report.to_dict(), stream, indent=2, ensure_ascii=False, allow_nan=False)
        stream.write("\n")
    try:
        draw = importlib.import_module(figure).draw
    except ImportError:
        return written
    written.append(folder / f"{name}.png")
    with atomic_path(written[1]) as partial:
        draw(report, partial)
    return written


def check_folder(folder: str | Path) -> Path:
    """Return `folder` when a report can go there, else raise InputError: checked before the work, too."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for the report")
    return folder
