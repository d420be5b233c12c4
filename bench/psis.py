"""PSIS of many weights beside arviz-stats: time, and how far the two answers are apart.

    python bench/psis.py [--device cuda] [--output FILE.json]

Both get the same float64 weights in one run; medians of `--repeats`. arviz-stats always runs on the CPU, and is left
out where it is not installed. The floor is one pass that any method must make: exp and sum of all weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from entropy_fast.psis import psislw

try:
    from arviz_stats.base import array_stats
except ImportError:
    array_stats = None

SIZES = (1_000, 100_000, 1_000_000)


def median_ms(work: Callable[[], object], device: str, repeats: int) -> float:
    """Median wall time in milliseconds, the device drained before and after; one run to warm up."""

    def drained() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(repeats + 1):
        drained()
        start = time.perf_counter()
        work()
        drained()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main() -> None:
    """Measure and print one line a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", help="also write the numbers here, as JSON")
    arguments = parser.parse_args()
    rows = []
    for n in SIZES:
        weights = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        log_likelihood = -weights.numpy()  # what arviz-stats takes
        here = weights.to(arguments.device)
        row = {
            "n": n,
            "entropy_fast_ms": median_ms(lambda x=here: psislw(x), arguments.device, arguments.repeats),
            "floor_ms": median_ms(lambda x=here: x.exp().sum(), arguments.device, arguments.repeats),
        }
        line = f"n = {n:>9,}   entropy_fast {row['entropy_fast_ms']:7.2f} ms   floor {row['floor_ms']:6.2f} ms"
        if array_stats is not None:
            expected, expected_k = array_stats.psislw(log_likelihood)
            smoothed, khat = psislw(here)
            difference = max(float(np.abs(smoothed.cpu().numpy() - expected).max()), abs(float(khat) - expected_k))
            if difference > 1e-8:
                raise SystemExit(f"n = {n}: the answers differ by {difference:.1e}, so their times mean nothing")
            peer = median_ms(lambda x=log_likelihood: array_stats.psislw(x), "cpu", arguments.repeats)
            row |= {"arviz_stats_ms": peer, "difference": difference}
            line += f"   arviz-stats {peer:7.2f} ms   answers differ by {difference:.0e}"
        rows.append(row)
        print(line)
    if arguments.output:
        device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "cpu"
        facts = {"device": device, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=1)


if __name__ == "__main__":
    main()
