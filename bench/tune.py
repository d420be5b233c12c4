"""Measure the launch settings of the kernels on logits, and print the table that kernels/settings.py holds.

    python -m bench tune [--rows 8192]

For each class of the table (see `FORWARD` there) the candidates are timed on one shape of it, beside the read floor;
the line to put into the table is the last one printed for its class. Segments belong to the result's bits: candidates
of a class keep its number of segments. Whether few rows should share programs is measured at 64 and 128 rows.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch

from bench.harness import copy_ms, median_ms, read_ms
from entropy_fast.kernels.rows import row_stats
from entropy_fast.kernels.rows_backward import row_stats_backward
from entropy_fast.kernels.settings import (
    FORWARD,
    BackwardSettings,
    Settings,
    backward_settings,
    forward_settings,
    gpu,
    vector_width,
)
from entropy_fast.reference.rows import RowGradients
from entropy_fast.reference.transform import Transform

# a vocabulary of each class that bf16 logits have: small, odd, medium, large
VOCABULARIES = (1024, 50257, 32000, 128256)


def candidates(segments: int, narrow: bool, vocab: int) -> list[Settings]:
    """Shapes worth trying: 32 to 512 threads, one to eight loads a step, each at the residency that it allows."""
    found = []
    for unroll, warps in product((1, 2) if narrow else (2, 4, 8), (1, 2, 4, 8, 16)):
        lanes = 32 * warps
        if unroll * lanes * 8 > max(vocab, 512):
            continue
        for most in (64, 80, 128):
            # of 65536 registers
            resident = max(1, 2048 // (most * warps))
            found.append(Settings(unroll, lanes, warps, segments, resident, 0, most, narrow))
    return found


def problem(rows: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bf16 logits of standard deviation 3, and targets."""
    logits = (3 * torch.randn(rows, vocab, device="cuda")).to(torch.bfloat16)[None]
    return logits, torch.randint(vocab, (1, rows), device="cuda")


def tune_forward(rows: int, vocab: int) -> None:
    """Print every candidate's time, then the best line."""
    logits, targets = problem(rows, vocab)
    floor = read_ms(logits)
    now = forward_settings(logits)
    times: dict[Settings, float] = {}
    for settings in [now, *candidates(now.segments, vector_width(logits) < 4, vocab)]:
        times[settings] = median_ms(lambda s=settings: row_stats(logits, targets, None, None, Transform(), s), 15)
        print(f"  {tuple(settings)}: {times[settings]:.4f} ms, {floor / times[settings]:.3f} of the read rate")
    best = min(times, key=times.__getitem__)
    print(f"vocabulary {vocab}: {best!r}, {floor / times[best]:.3f}; the table's: {floor / times[now]:.3f}")
    for few in (64, 128) if best.segments > 1 else ():
        print(f"  {few} rows: {few_rows(logits, targets, few, best, 100):.4f} ms with programs sharing rows, ", end="")
        print(f"{few_rows(logits, targets, few, best, 0):.4f} without")


def few_rows(logits: torch.Tensor, targets: torch.Tensor, few: int, settings: Settings, split: float) -> float:
    """Time of the first `few` rows."""
    x, y = logits[:, :few], targets[:, :few].contiguous()
    return median_ms(lambda: row_stats(x, y, None, None, Transform(), settings._replace(split=split)))


def tune_backward(rows: int, vocab: int) -> None:
    """The same for the backward."""
    logits, targets = problem(rows, vocab)
    floor = copy_ms(logits)
    stats = row_stats(logits, targets, None, None, Transform())
    gradients = RowGradients(torch.ones_like(stats.logprob), torch.ones_like(stats.logprob), None)
    out = torch.empty_like(logits)
    for block, warps in product((1024, 2048, 4096, 8192), (4, 8)):
        settings = BackwardSettings(block, warps)
        ms = median_ms(
            lambda s=settings: row_stats_backward(logits, targets, None, None, Transform(), stats, gradients, out, s),
            15,
        )
        mark = " (the table's)" if settings == backward_settings(2) else ""
        print(f"  backward, vocabulary {vocab}, {settings!r}: {floor / ms:.3f} of the copy rate{mark}")


def main() -> None:
    """Measure every class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    rows = parser.parse_args().rows
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a GPU, and none is here")
    print(f"{gpu()}; in the table: {', '.join(FORWARD)}")
    for vocab in VOCABULARIES:
        tune_forward(rows, vocab)
    for vocab in VOCABULARIES[1:]:
        tune_backward(rows, vocab)


if __name__ == "__main__":
    main()
