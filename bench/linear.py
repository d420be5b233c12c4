"""Hidden states and head to log-prob and entropy, against bare GEMMs and peers: `python -m bench.linear [--out FILE]`.

Every implementation of a shape is timed in turn, one call each a round, so that all share the GPU's temperature and
clock: under sustained matrix products an H100 runs into its power limit, and what is timed last would pay for what ran
before. Medians over the rounds. The floor (`impl` "gemm") is cuBLAS writing 16-bit logits and nothing else: one GEMM
for the forward, four for forward and backward, three with a frozen head. Errors are against float64, over the first
rows. Peers that are not installed are left out; one that fails is named on stderr.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from entropy_fast import linear_token_stats
from entropy_fast.files import atomic_text

# (rows, hidden, vocab) of real heads
SHAPES = {
    "llama-3-8b": (8192, 4096, 128256),
    "qwen2.5-7b": (8192, 3584, 152064),
    "qwen2.5-1.5b": (8192, 1536, 151936),
    "gemma-2-2b": (8192, 2304, 256000),
    "gemma-2-9b": (8192, 3584, 256000),
    "qwen3-0.6b": (8192, 1024, 151936),
    "gpt-2": (8192, 768, 50257),
    "llama-3-8b, 128 rows": (128, 4096, 128256),
    "llama-3-8b, 1024 rows": (1024, 4096, 128256),
    "llama-3-8b, 32768 rows": (32768, 4096, 128256),
}
CHECKED_ROWS = 128
Pair = tuple[torch.Tensor, torch.Tensor | None]


def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Pair:
    """This project."""
    return linear_token_stats(hidden, weight, targets)[:2]


def filtered(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Pair:
    """This project, gradients filtered."""
    return linear_token_stats(hidden, weight, targets, max_dropped_mass=1e-3)[:2]


def eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Pair:
    """Logits in one piece, float32 log-softmax."""
    logp = torch.log_softmax((hidden @ weight.t()).float(), -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def peers() -> dict[str, Callable[..., Pair]]:
    """Importable fused-linear peers, by name."""
    found: dict[str, Callable[..., Pair]] = {}
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        found["trl"] = lambda h, w, y: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 8192, None, 1.0, ("entropy",))[
            :2
        ]
    except ImportError:
        pass
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        def liger(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> Pair:
            nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, y, 1.0, -100, 1, True)[:2]
            return -nll, entropy

        found["liger"] = liger
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["cce"] = lambda h, w, y: (-linear_cross_entropy(h, w, y, reduction="none"), None)
    except ImportError:
        pass
    found["eager"] = eager
    found["compiled"] = torch.compile(eager)
    return found


def problem(rows: int, width: int, vocab: int, dtype: torch.dtype, device: str, peaked: bool) -> list[torch.Tensor]:
    """Hidden states, head and targets; logits of standard deviation 3, or rows spread as in real rollouts.

    Peaked: in random order, 80% of the rows have nearly all of their mass on the target, with entropies below 0.1 nats,
    and 20% are spread over many tokens.
    """
    g = torch.Generator(device).manual_seed(0)
    weight = torch.randn(vocab, width, generator=g, device=device) / width**0.5
    hidden = torch.randn(rows, width, generator=g, device=device)
    targets = torch.randint(0, vocab, (rows,), generator=g, device=device)
    if peaked:
        confident = torch.rand(rows, generator=g, device=device) < 0.8
        # the tail of e^z holds about vocab · e^(1/2); this much above it the target leaves e^(−margin) of the mass
        margin = torch.empty(rows, device=device).uniform_(6.0, 16.0, generator=g)
        height = torch.log(torch.tensor(float(vocab), device=device)) + 0.5 + margin
        hidden += torch.where(confident, height, 0.0)[:, None] * weight[targets]
        hidden = torch.where(confident[:, None], hidden, 4.0 * hidden)
    else:
        weight *= 3.0
    return [hidden.to(dtype), weight.to(dtype), targets]


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, taken in turn; calls that fail are dropped with a word on stderr."""
    cuda = torch.cuda.is_available()
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        try:
            call()
            times[name] = []
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
    for _ in range(rounds):
        for name in times:
            if cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                calls[name]()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                calls[name]()
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(t) for name, t in times.items()}


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """Peak memory over what is held already, gradients included; None off the GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def errors(pair: Pair, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> list[float | None]:
    """Largest errors of log-prob and entropy over the first rows, nats."""
    exact = eager_float64(hidden[:CHECKED_ROWS], weight, targets[:CHECKED_ROWS])
    return [
        None if got is None else (got[:CHECKED_ROWS].double() - e).abs().max().item()
        for got, e in zip(pair, exact, strict=True)
    ]


def eager_float64(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Pair:
    """The truth."""
    logp = torch.log_softmax(hidden.double() @ weight.double().t(), -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def measure(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, rounds: int, peaked: bool
) -> list[dict[str, Any]]:
    """Rows of the result for one shape."""
    hidden, weight, targets = problem(*shape, dtype, device, peaked)
    implementations = {"entropy_fast": ours, "entropy_fast filtered": filtered, **peers()}
    logits = torch.empty(shape[0], shape[2], dtype=dtype, device=device)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def gemm() -> None:
        torch.mm(hidden, weight.t(), out=logits)

    def frozen_gemms() -> None:
        gemm(), gemm(), torch.mm(logits, weight, out=d_hidden)

    def all_gemms() -> None:
        frozen_gemms(), torch.mm(logits.t(), hidden, out=d_weight)

    def forward(f: Callable[..., Pair]) -> Callable[[], Pair]:
        return torch.no_grad()(lambda: f(hidden, weight, targets))

    def both(f: Callable[..., Pair], frozen: bool) -> Callable[[], Any]:
        def call() -> Any:
            h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(not frozen)
            total = sum(t.float().sum() for t in f(h, w, targets) if t is not None)
            return torch.autograd.grad(total, [h] if frozen else [h, w])

        return call

    result = []
    for op, floor, make in (
        ("forward", gemm, forward),
        ("forward+backward", all_gemms, lambda f: both(f, False)),
        ("forward+backward, frozen head", frozen_gemms, lambda f: both(f, True)),
    ):
        calls: dict[str, Callable[[], Any]] = {"gemm": floor}
        calls |= {name: make(f) for name, f in implementations.items() if op != "forward" or "filtered" not in name}
        times = timed(calls, rounds)
        for name, ms in times.items():
            error: list[float | None] = [None, None]
            if op == "forward" and name != "gemm":
                error = errors(calls[name](), hidden, weight, targets)
            result.append(
                {
                    "op": op,
                    "impl": name,
                    "shape": dict(zip(("rows", "hidden", "vocab"), shape, strict=True)),
                    "dtype": str(dtype).removeprefix("torch."),
                    "distribution": "rollouts" if peaked else "flat",
                    "outputs": "logprob" if name == "cce" else "logprob, entropy",
                    "ms": ms,
                    "of_floor": ms / times["gemm"],
                    "peak_bytes": None if name == "gemm" else peak_bytes(calls[name]),
                    "error_logprob": error[0],
                    "error_entropy": error[1],
                }
            )
    return result


def versions() -> dict[str, str]:
    """Of what was measured."""
    found = {}
    for name in ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="*", default=list(SHAPES), help=f"of {', '.join(SHAPES)}, or ROWSxHIDDENxVOCAB"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--flat-only", action="store_true", help="leave out the rows spread as in rollouts")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for name in options.shapes:
        shape = SHAPES.get(name) or tuple(int(n) for n in name.split("x"))
        for peaked in (False,) if options.flat_only else (False, True):
            measured = measure(shape, getattr(torch, options.dtype), device, options.rounds, peaked)
            rows += measured
            for r in measured:
                e = "" if r["error_logprob"] is None else f"{r['error_logprob']:.1e}"
                peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:6.2f} GiB"
                what = f"{name:24}{r['distribution']:10}{r['op']:31}{r['impl']:23}"
                print(f"{what}{r['ms']:9.3f} ms{r['of_floor']:7.3f} {peak} {e}")
    if options.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        report = {
            "command": "python -m bench.linear " + " ".join(sys.argv[1:] if argv is None else argv),
            "commit": commit or None,
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            "versions": versions(),
            "rows": rows,
        }
        with atomic_text(options.out) as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
