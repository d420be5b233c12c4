"""What benchmarks share: time on the device with a cold cache, floors, errors, and the result file.

Every result is `{"command", "commit", "gpu", "versions", "rows": [{"op", "impl", "shape", "dtype", "outputs", "ms",
"of_floor", "peak_bytes", "error_logprob", "error_entropy"}]}`, and what a benchmark adds; `of_floor` is time over that
of the row whose `impl` is "floor" (in `linear` "gemm"): 1 is ideal, 1.05 is 5% slower.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from entropy_fast.files import atomic_text

ROOT = Path(__file__).parent.parent
# Longer than any call here takes the host to submit, in cycles of a GPU at 2 GHz: 1.5 ms.
QUEUE_CYCLES = 3_000_000
# Larger than any cache: reading it leaves nothing of the inputs there, and nothing that has yet to be written back, as
# writing it would: 10 µs of an H100's memory, within whatever is timed next.
FLUSH_BYTES = 256 * 2**20

# Columns of a row for which nothing was measured.
UNMEASURED = {"peak_bytes": None, "error_logprob": None, "error_entropy": None}


def median_ms(call: Callable[[], Any], repeats: int = 30) -> float:
    """Median time of a call in milliseconds, after two to warm up.

    On a GPU it is the device's time with a cold cache: the device is first given a wait, during which the host submits
    the call, so that what the host costs does not enter (`host_us` measures that).
    """
    call(), call()
    if not torch.cuda.is_available():
        return statistics.median(t for _ in range(repeats) for t in _round_ms([call]))
    flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.sum()
        torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def alternating_ms(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Times of each call in milliseconds, one call each a round after one to warm up; what fails is named on stderr.

    On a GPU the calls of a round are queued one behind the other, without waiting between them: training and scoring
    keep the card busy, and with pauses between calls it cools and clocks up, so that what is measured is not what is
    met under sustained work (the same two kernels: 1.03 of each other in a row, 1.14 with pauses). What follows a call
    that draws little power runs faster, so no call may always follow the same one: the rounds' orders are rows of a
    square in which every call comes after every other as often (E. J. Williams, 1949). A short wait of the device heads
    each round, during which the host gets ahead: what submitting costs enters only where a call waits for the device,
    for it and the next one, or where the host is slower than the device for long.
    """
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        try:
            call()
            _wait()
            times[name] = []
        except Exception as error:
            name_failure(name, error)
    names = list(times)
    for i in range(rounds):
        # i, i + 1, i − 1, i + 2, …
        order = [names[(i + (k + 1) // 2 * (-1) ** (k + 1)) % len(names)] for k in range(len(names))]
        for name, ms in zip(order, _round_ms([calls[name] for name in order]), strict=True):
            times[name].append(ms)
    return times


def name_failure(name: str, error: Exception) -> None:
    """Say on stderr which call failed, and why."""
    print(f"{name}: {type(error).__name__}: {error}"[:300], file=sys.stderr)


def _round_ms(calls: list[Callable[[], Any]]) -> list[float]:
    if not torch.cuda.is_available():
        clock = [time.perf_counter()]
        for call in calls:
            call()
            clock.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in pairwise(clock)]
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
    torch.cuda._sleep(QUEUE_CYCLES)
    for call, (start, end) in zip(calls, pairs, strict=True):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def alone_ms(call: Callable[[], Any], repeats: int = 6) -> float:
    """Milliseconds a call when it alone runs, again and again: the card settles at the clock that this load allows.

    In turn with others (`alternating_ms`) a call that draws less power lends its neighbours some of its clock.
    """
    call()
    _wait()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return 1e3 * (time.perf_counter() - start) / repeats
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    _wait()
    return first.elapsed_time(last) / repeats


def graph_ms(calls: Sequence[Callable[[], Any]], repeats: int = 30) -> float:
    """Median time of one of the calls on the GPU, in milliseconds, from replays of a CUDA graph of them all.

    For calls so short that submitting them one by one would show. They should be on inputs of their own that together
    are larger than the cache, so that each finds it cold.
    """
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    # what a first call compiles or looks up is not for a capture
    with torch.cuda.stream(stream):
        for call in [*calls, *calls]:
            call()
    _wait()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    finally:
        # where a call cannot be captured, the context above leaves its stream behind
        torch.cuda.set_stream(before)
    for _ in range(2):
        graph.replay()
    return statistics.median(_round_ms([graph.replay] * repeats)) / len(calls)


def first_call_rows(shape: dict[str, int], prepare: str, call: str, **facts: Any) -> list[dict[str, Any]]:
    """The row of what this project's call in bf16 costs where nothing was ever compiled; none off the GPU.

    It runs in a process of its own with Triton's cache empty. Imports, the inputs and the start of CUDA are for
    `prepare`; the clock runs over `call` alone, until it is done.
    """
    if not torch.cuda.is_available():
        return []
    timed = ["torch.cuda.synchronize()", "start = time.perf_counter()", call, "torch.cuda.synchronize()"]
    code = "\n".join(["import time, torch, triton", prepare, *timed, "print(1e3 * (time.perf_counter() - start))"])
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
    if done.returncode:
        print("the first call failed in a fresh process", file=sys.stderr)
        return []
    row = {"op": "first call", "impl": "entropy_fast", "shape": shape, "dtype": "bfloat16", **facts}
    return [row | {"ms": float(done.stdout.split()[-1]), "of_floor": 1.0, **UNMEASURED}]


def host_us(call: Callable[[], Any], repeats: int = 100, times: int = 11) -> float:
    """What a call costs the host, in microseconds: many in a row, without waiting for the device; median of times."""
    costs = []
    for _ in range(times + 1):
        _wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        costs.append(1e6 * (time.perf_counter() - start) / repeats)
    _wait()
    # the first is to warm up
    return statistics.median(costs[1:])


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
    return min(median_ms(partial(read, words, *shape)) for shape in SHAPES)


def graph_read_ms(tensors: Sequence[torch.Tensor]) -> float:
    """Time of one streaming read of one of the tensors, from replays of a graph of them all: as `read_ms`."""
    from bench.streaming import SHAPES, read

    words = [x.view(-1)[: x.numel() // 8 * 8].view(torch.int32) for x in tensors]
    return min(graph_ms([partial(read, w, *shape) for w in words]) for shape in SHAPES)


def copy_ms(x: torch.Tensor) -> float:
    """Time of one device-to-device copy of a tensor."""
    y = torch.empty_like(x)
    return median_ms(lambda: y.copy_(x))


def float64_stats(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy of logits in float64, which errors are measured against."""
    logp = torch.log_softmax(logits.double(), -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def largest_errors(pair: Iterable[torch.Tensor | None], exact: Iterable[torch.Tensor]) -> list[float | None]:
    """Largest absolute error of each output over the rows that both have, nats; None where there is no such output."""
    return [
        None if got is None else (got[: len(e)].double() - e[: len(got)]).abs().max().item()
        for got, e in zip(pair, exact, strict=True)
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    for row in rows:
        shape = " × ".join(str(n) for n in row["shape"].values())
        errors = "  ".join("" if e is None else f"{e:.0e}" for e in (row["error_logprob"], row["error_entropy"]))
        what = f"{row['op']:30}{shape:>21} {row['dtype']:9}{row['impl']:28} {row['outputs']:17}"
        if "distribution" in row:
            what += f"{row['distribution']:9}"
        rate = f"{row['tflops']:7.1f} TFLOP/s  " if row.get("tflops") else ""
        rate += f"alone {row['ms_alone']:.4f} ms, {row['of_floor_alone']:.3f}  " if row.get("ms_alone") else ""
        least = f"(least {row['ms_min']:.4f})  " if "ms_min" in row else ""
        numbers = f"{row['ms']:10.4f} ms  {least}{100 / row['of_floor']:6.1f}% of the floor's rate  {rate}"
        print(f"{what}{numbers}{_size(row['peak_bytes']):13}{errors}".rstrip(), flush=True)


def _size(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 2**20:7.1f} MiB" if size < 2**30 else f"{size / 2**30:7.2f} GiB"


def write(rows: list[dict[str, Any]], packages: Iterable[str], out: Path, before: dict[str, Any] | None = None) -> None:
    """Write the result file, whole or not at all; after the rows and the command of the result `before`."""
    command = f"python -m bench {shlex.join([Path(sys.argv[0]).stem, *sys.argv[1:]])}"
    if before is not None:
        rows = before["rows"] + rows
        command = f"{before['command']} && {command}"
    result = {
        "command": command,
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
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--", "kernels", "entropy_fast", "bench/*.py"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
