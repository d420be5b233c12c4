"""What benchmarks share: time on the device with a cold cache, floors, errors, and the result file.

Every result is `{"command", "commit", "gpu", "versions", "rows": [{"op", "impl", "shape", "dtype", "outputs", "ms",
"of_floor", "peak_bytes", "error_logprob", "error_entropy"}]}`; `of_floor` is time over that of the row whose `impl` is
"floor" (1 is ideal, 1.05 is 5% slower).
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from entropy_fast.files import atomic_text

# Longer than any call here takes the host to submit, in cycles of a GPU at 2 GHz: 1.5 ms.
QUEUE_CYCLES = 3_000_000
# Larger than any cache: writing it leaves nothing of the inputs there.
FLUSH_BYTES = 256 * 2**20


def median_ms(call: Callable[[], Any], repeats: int = 30) -> float:
    """Median time of a call in milliseconds, after two to warm up.

    On a GPU it is the device's time with a cold cache: the device is first given a wait, during which the host submits
    the call, so that what the host costs does not enter (`host_us` measures that).
    """
    call(), call()
    if not torch.cuda.is_available():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    pairs = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def host_us(call: Callable[[], Any], repeats: int = 300) -> float:
    """What a call costs the host, in microseconds: many in a row, without waiting for the device."""
    for _ in range(10):
        call()
    _wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    cost = 1e6 * (time.perf_counter() - start) / repeats
    _wait()
    return cost


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """Peak memory over what is held already; None off the GPU."""
    if not torch.cuda.is_available():
        return None
    _wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    _wait()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def read_ms(x: torch.Tensor) -> float:
    """Time of one streaming read of a tensor: the fastest of several plain kernels (a sum of int32 words)."""
    if not x.is_cuda:
        return median_ms(lambda: x.view(-1).sum())
    from bench.streaming import SHAPES, read

    words = x.view(-1)[: x.numel() // 8 * 8].view(torch.int32)
    return min(median_ms(lambda shape=shape: read(words, *shape)) for shape in SHAPES)


def copy_ms(x: torch.Tensor) -> float:
    """Time of one device-to-device copy of a tensor."""
    y = torch.empty_like(x)
    return median_ms(lambda: y.copy_(x))


def largest_errors(pair: Iterable[torch.Tensor | None], exact: Iterable[torch.Tensor]) -> list[float | None]:
    """Largest absolute error of each output, nats; None where there is no such output."""
    return [
        None if got is None else (got[: len(e)].double() - e).abs().max().item()
        for got, e in zip(pair, exact, strict=True)
    ]


def report(rows: list[dict[str, Any]], packages: Iterable[str], out: Path | None) -> None:
    """Print rows as a table and, with `out`, write the result file, whole or not at all."""
    for row in rows:
        shape = " × ".join(str(n) for n in row["shape"].values())
        errors = "  ".join("" if e is None else f"{e:.0e}" for e in (row["error_logprob"], row["error_entropy"]))
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:9.1f} MiB"
        what = f"{row['op']:22}{shape:>16} {row['dtype']:9}{row['impl']:22}{row['outputs']:20}"
        print(f"{what}{row['ms']:9.4f} ms  {100 / row['of_floor']:6.1f}% of the floor's rate  {peak:14}{errors}")
    if out is None:
        return
    result = {
        "command": " ".join(["python -m bench", Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "commit": _commit(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "versions": _versions(packages),
        "rows": rows,
    }
    with atomic_text(out) as file:
        json.dump(result, file, indent=1)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _commit() -> str | None:
    """The commit that was measured, with a + when files differ from it; None outside a repository."""
    here = Path(__file__).parent.parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--", "kernels", "entropy_fast", "bench/*.py"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
