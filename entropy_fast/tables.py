"""Per-sequence scores as a table: JSON lines, CSV or Parquet, chosen by the file's suffix."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entropy_fast.errors import InputError
from entropy_fast.files import atomic_path, atomic_text
from entropy_fast.jsonl import STDIO, RolloutFile, write_lines
from entropy_fast.scoring import Scores

Row = dict[str, Any]


def score_rows(file: RolloutFile, scores: Scores, *, per_token: bool = False) -> list[Row]:
    """One row a sequence, in the file's order.

    Columns: `sequence` (from 0), `prompt_index`, `S` (log-prob sum, nats) and `R` (entropy sum, nats) over the `L`
    counted tokens, `generated` (all emitted tokens), `truncated` (no EOS), `finish_reason`.

    Args:
        file: what was scored.
        scores: of `file.rollouts`.
        per_token: add `token_ids`, `logprob`, `entropy` (nats) and `counted`, lists over the generated tokens.
    """
    masks = scores.masks
    columns: dict[str, list[Any]] = {
        "sequence": list(range(len(file))),
        "prompt_index": [
            record.prompt_index if record.prompt_index is not None else index
            for record, index in zip(file.records, file.rollouts.prompt_index.tolist(), strict=True)
        ],
        "S": scores.S.tolist(),
        "R": [None] * len(file) if scores.R is None else scores.R.tolist(),
        "L": scores.lengths.tolist(),
        "generated": masks.generated.sum(1).tolist(),
        "truncated": masks.truncated.tolist(),
        "finish_reason": [record.finish_reason for record in file.records],
    }
    if per_token:
        sizes = columns["generated"]
        for name, values in (
            ("token_ids", file.rollouts.tokens),
            ("logprob", scores.logprob),
            ("entropy", scores.entropy),
            ("counted", masks.counted),
        ):
            if values is not None:
                columns[name] = [part.tolist() for part in values[masks.generated].split(sizes)]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def summary(scores: Scores) -> str:
    """One line: how much was scored, and its entropy per sequence and per token, by the sampled tokens."""
    tokens, n = int(scores.lengths.sum()), len(scores.lengths)
    nats = -float(scores.S.sum())
    per_token = nats / max(tokens, 1)
    return (
        f"{n:,} sequences, {tokens:,} tokens: {nats / n:.4g} nats per sequence, "
        f"{per_token:.4g} nats ({per_token / math.log(2):.4g} bits) per token"
    )


def check_table_path(path: str | Path) -> None:
    """Raise InputError unless `write_table` can write to `path`: checked before the work rather than after it."""
    if str(path) != STDIO and Path(path).suffix.lower() not in _WRITERS:
        raise InputError(f"{path}: the suffix chooses the format and must be one of {', '.join(_WRITERS)}")
    if Path(path).suffix.lower() == ".parquet":
        _pyarrow()


def write_table(path: str | Path, rows: list[Row]) -> None:
    """Write rows to `path`, whole or not at all; `-` writes JSON lines to stdout."""
    check_table_path(path)
    if str(path) == STDIO:
        write_lines(path, rows)
    else:
        _WRITERS[Path(path).suffix.lower()](path, rows)


def _write_csv(path: str | Path, rows: list[Row]) -> None:
    with atomic_text(path) as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        # lists are joined by spaces, so that a cell holds a token sequence without quoting
        writer.writerows(
            {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()} for row in rows
        )


def _write_parquet(path: str | Path, rows: list[Row]) -> None:
    pyarrow, parquet = _pyarrow()
    with atomic_path(path) as partial:
        parquet.write_table(pyarrow.Table.from_pylist(rows), partial)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("Parquet needs pyarrow: pip install entropy_fast[parquet]; or write .jsonl or .csv") from None
    return pyarrow, pyarrow.parquet


_WRITERS: dict[str, Callable[[str | Path, list[Row]], None]] = {
    ".parquet": _write_parquet,
    ".jsonl": write_lines,
    ".csv": _write_csv,
}
