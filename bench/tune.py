"""Measure the launch settings of the kernels on logits, and print the table that kernels/settings.py holds.

    python -m bench tune [--rows 8192]

For each class of the table (see `FORWARD` there) the candidates are timed on one shape of it, beside the read floor,
and the best ones with few rows too; the line to put into the table is the last one printed for its class. Segments
and lanes belong to the result's bits.
"""

from __future__ import annotations

import argparse
from itertools import product
from multiprocessing import cpu_count, get_context

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

# a vocabulary of each class that bf16 logits have: small, rows on any 2 bytes, then by size
VOCABULARIES = (1024, 50257, 8192, 16384, 32000, 128256)


def candidates(vocab: int, narrow: bool) -> list[Settings]:
    """Shapes worth trying: 32 to 256 threads, and as many loads on their way as registers have room for."""
    found = []
    for unroll, lanes, depth, registers in product((2, 4, 8), (32, 128, 256), (0, 1, 2, 3), (48, 64, 80, 96)):
        # four registers to each load that is on its way
        if 4 * unroll * (depth + 1) > registers - 16 or unroll * lanes * 8 > max(vocab, 512):
            continue
        for segment in (16384, 24576, 32768, 36864, 65536):
            # rows that are no longer are whole either way; a lane's loads are written out, which takes time to compile
            whole = segment >= 2 * vocab
            if (not whole or segment == 65536) and min(segment, 2 * vocab) <= 24 * 16 * lanes:
                resident = min(32, 65536 // (registers * lanes))
                # masked rows of one warp each are taken together; no mask is timed here
                together = 4 if lanes == 32 else 1
                found.append(Settings(unroll, lanes, segment, depth, resident, registers, narrow, together))
    return found


def problem(rows: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bf16 logits of standard deviation 3, and targets."""
    logits = (3 * torch.randn(rows, vocab, device="cuda")).to(torch.bfloat16)[None]
    return logits, torch.randint(vocab, (1, rows), device="cuda")


def compiled(vocab: int, settings: Settings) -> None:
    """Have Triton's cache hold the kernel."""
    logits, targets = problem(1, vocab)
    row_stats(logits, targets, None, None, Transform(), settings)
    torch.cuda.synchronize()


def tune_forward(rows: int, vocab: int) -> None:
    """Print every candidate's time, then the best line."""
    logits, targets = problem(rows, vocab)
    floor = read_ms(logits)
    now = forward_settings(logits)
    times: dict[Settings, float] = {}
    tried = [now, *candidates(vocab, vector_width(logits) < 4)]
    with get_context("spawn").Pool(min(16, cpu_count())) as pool:
        pool.starmap(compiled, [(vocab, settings) for settings in tried], chunksize=1)
    for settings in tried:
        times[settings] = median_ms(lambda s=settings: row_stats(logits, targets, None, None, Transform(), s), 15)
        print(f"  {tuple(settings)}: {times[settings]:.4f} ms, {floor / times[settings]:.3f} of the read rate")
    best = sorted(times, key=times.__getitem__)
    for few in (1024, 128):
        x, y = logits[:, :few], targets[:, :few].contiguous()
        for settings in {now: None} | dict.fromkeys(best[:4]):
            ms = median_ms(lambda s=settings, x=x, y=y: row_stats(x, y, None, None, Transform(), s))
            print(f"  {few} rows, {tuple(settings)}: {ms:.4f} ms")
    print(f"vocabulary {vocab}: {best[0]!r}, {floor / times[best[0]]:.3f}; the table's: {floor / times[now]:.3f}")


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
    for vocab in (50257, 32000, 128256):
        tune_backward(rows, vocab)


if __name__ == "__main__":
    main()
