"""Hidden states and head to log-prob and entropy, against bare GEMMs and peers.

    python -m bench linear [--shapes llama-3-8b 128x4096x128256 ...] [--ops forward backward frozen first]
                           [--impls NAME ...] [--dtype bfloat16] [--distributions flat] [--rounds 10]
                           [--out bench/results/h100-linear.json [--append]]

Every implementation of a shape is timed in turn, one call each a round, the calls of a round queued one behind the
other, so that the GPU is as busy as in training; medians over the rounds. The floor and this project are then timed
alone too, again and again (`ms_alone`). For at most 256 rows, whose calls may take the host longer than the device,
times are those of replayed CUDA graphs instead, without what cannot be captured in one.

The floor (`impl` "gemm") is cuBLAS writing logits in the inputs' dtype and nothing else: one GEMM for the forward, four
for forward and backward, three with a frozen head; its error is that of an exact softmax of those logits. For at most
256 rows "read" is one plain read of the head. In float32 the floor is IEEE float32, "gemm tf32" stands beside it, and
each precision of this project is an implementation. Errors are against float64, over the first rows. Peers that are not
installed are left out; one that fails is named on stderr. CCE has no entropy, so its backward is that of the log-prob
alone. The op "first" is what a user waits for the first forward, in a process of its own where nothing was ever
compiled. The result is written after every shape.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.harness import (
    UNMEASURED,
    alone_ms,
    alternating_ms,
    first_call_rows,
    float64_stats,
    graph_ms,
    largest_errors,
    name_failure,
    peak_bytes,
    read_ms,
    show,
    write,
)
from bench.logits import BOTH, LOGPROB, Pair
from bench.logits import eager as from_logits
from entropy_fast import linear_token_stats

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
    "float32 head": (4096, 2048, 151936),
}
# op -> (GEMMs of the floor, the name in the result)
OPS = {"forward": (1, "forward"), "backward": (4, "forward+backward"), "frozen": (3, "forward+backward, frozen head")}
PACKAGES = ("torch", "triton", "entropy_fast", "trl", "liger-kernel", "cut-cross-entropy", "nvidia-cutlass-dsl")
CHECKED_ROWS = 128
DISTRIBUTIONS = ("flat", "rollouts")
# up to here the head's bytes are what a forward costs
FEW_ROWS = 256
BACKWARD_ALONE = ("entropy_fast, nothing kept", "entropy_fast, 1 GiB", "entropy_fast filtered")
Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Pair]
# name -> (function, what it gives)
Implementations = dict[str, tuple[Function | None, str]]


def ours(dtype: torch.dtype) -> Implementations:
    """This project."""

    def at(**options: Any) -> tuple[Function, str]:
        return lambda h, w, y: linear_token_stats(h, w, y, **options)[:2], BOTH

    if dtype == torch.float32:
        return {f"entropy_fast {name}": at(precision=name) for name in ("exact", "accurate", "fast")}
    return {
        "entropy_fast": at(),
        "entropy_fast, nothing kept": at(backward_memory=0),
        "entropy_fast, 1 GiB": at(backward_memory=2**30),
        "entropy_fast filtered": at(max_dropped_mass=1e-3),
    }


def eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Pair:
    """Logits in one piece, float32 log-softmax."""
    return from_logits(hidden @ weight.t(), targets)


def peers() -> Implementations:
    """Importable peers."""
    found: Implementations = {}
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        def trl(chunk: int) -> Function:
            return lambda h, w, y: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, chunk, None, 1.0, ("entropy",))[:2]

        # 32768 is what its trainers use
        found["trl"], found["trl, chunks of 8192"] = (trl(32768), BOTH), (trl(8192), BOTH)
    except ImportError:
        pass
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        # its look at the targets waits for the device
        os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")

        def liger(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> Pair:
            nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, y, 1.0, -100, 1, True)
            return -nll, entropy

        found["liger"] = (liger, BOTH)
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        def cce(**options: Any) -> Function:
            return lambda h, w, y: (-linear_cross_entropy(h, w, y, reduction="none", **options), None)

        found["cce"], found["cce unfiltered"] = (cce(), LOGPROB), (cce(filter_eps=None), LOGPROB)
    except ImportError:
        pass
    found["eager"] = (eager, BOTH)
    found["compiled"] = (torch.compile(eager, dynamic=False), BOTH)
    return found


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: str, peaked: bool) -> list[torch.Tensor]:
    """Hidden states, head and targets; logits of standard deviation 3, or rows spread as in real rollouts.

    Peaked: in random order, 80% of the rows have nearly all of their mass on the target, with entropies below 0.1 nats,
    and 20% are spread over many tokens.
    """
    rows, width, vocab = shape
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


class Case:
    """One shape and distribution: its tensors and the rows of the result."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str, peaked: bool) -> None:
        self.inputs = self.hidden, self.weight, self.targets = problem(shape, dtype, device, peaked)
        self.logits = torch.empty(shape[0], shape[2], dtype=dtype, device=device)
        self.d_hidden, self.d_weight = torch.empty_like(self.hidden), torch.empty_like(self.weight)
        checked = self.targets[:CHECKED_ROWS]
        self.exact = float64_stats(self.hidden[:CHECKED_ROWS].double() @ self.weight.double().t(), checked)
        self.few = shape[0] <= FEW_ROWS
        self.product = 2 * shape[0] * shape[1] * shape[2]
        self.facts = {
            "shape": dict(zip(("rows", "hidden", "vocab"), shape, strict=True)),
            "dtype": str(dtype).removeprefix("torch."),
            "distribution": "rollouts" if peaked else "flat",
        }

    def gemms(self, count: int) -> None:
        """As many of a step's GEMMs: logits, logits again, dHidden, dWeight."""
        torch.mm(self.hidden, self.weight.t(), out=self.logits)
        if count > 1:
            torch.mm(self.hidden, self.weight.t(), out=self.logits)
            torch.mm(self.logits, self.weight, out=self.d_hidden)
        if count > 3:
            torch.mm(self.logits.t(), self.hidden, out=self.d_weight)

    def tf32_gemms(self, count: int) -> None:
        """The same GEMMs with TF32 products."""
        torch.set_float32_matmul_precision("high")
        self.gemms(count)
        torch.set_float32_matmul_precision("highest")

    def step(self, function: Function, op: str) -> Any:
        """One forward, or forward and backward, of log-prob and (where there is one) entropy."""
        if op == "forward":
            with torch.no_grad():
                return function(*self.inputs)
        h, w = self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(op == "backward")
        total = torch.stack([t.float().sum() for t in function(h, w, self.targets) if t is not None]).sum()
        return torch.autograd.grad(total, [h, w] if op == "backward" else [h])

    def measure(self, op: str, functions: Implementations, rounds: int) -> list[dict[str, Any]]:
        """Rows of one op, the floor first."""
        count, title = OPS[op]
        calls: dict[str, Callable[[], Any]] = {"gemm": partial(self.gemms, count)}
        if "gemm tf32" in functions:
            calls["gemm tf32"] = partial(self.tf32_gemms, count)
        for name, (function, _) in functions.items():
            # filtering and memory are for the backward; without the head's gradient nothing is kept by default
            idle = "nothing" in name if op == "frozen" else op == "forward" and name in BACKWARD_ALONE
            if function is not None and not idle:
                calls[name] = partial(self.step, function, op)
        alone = {}
        if self.few and torch.cuda.is_available():
            times = graph_times(calls)
        else:
            times = {name: statistics.median(t) for name, t in alternating_ms(calls, rounds).items()}
            alone = {name: alone_ms(calls[name]) for name in times if name.startswith(("gemm", "entropy_fast"))}
        if "read" in functions and op == "forward":
            times["read"] = read_ms(self.weight)
        rows = []
        for name, ms in times.items():
            row = {"op": title, "impl": name, **self.facts, "ms": ms, "of_floor": ms / times["gemm"]}
            row |= {"outputs": "logits" if "gemm" in name else functions[name][1], "tflops": None, **UNMEASURED}
            if name in alone:
                row |= {"ms_alone": alone[name], "of_floor_alone": alone[name] / alone["gemm"]}
            if name != "read":
                row["tflops"] = self.product * count / ms / 1e9
                if op == "forward":
                    pair = calls[name]()
                    if "gemm" in name:
                        pair = float64_stats(self.logits[:CHECKED_ROWS], self.targets[:CHECKED_ROWS])
                    row["error_logprob"], row["error_entropy"] = largest_errors(pair, self.exact)
                    del pair
                if "gemm" not in name:
                    row["peak_bytes"] = peak_bytes(calls[name])
            rows.append(row)
        return rows


def graph_times(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of each call in a replayed graph; what fails, or cannot be captured, is named on stderr."""
    times = {}
    for name, call in calls.items():
        try:
            call()
            times[name] = graph_ms([call])
        except Exception as error:
            name_failure(name, error)
    return times


def first_call() -> list[dict[str, Any]]:
    """What the first forward costs, compiling included."""
    prepare = """
import entropy_fast.kernels.linear
from entropy_fast import linear_token_stats
h = torch.randn(128, 4096, device="cuda").bfloat16()
w = torch.randn(128256, 4096, device="cuda").bfloat16()
y = torch.zeros(128, dtype=torch.int64, device="cuda")
"""
    shape = dict(zip(("rows", "hidden", "vocab"), SHAPES["llama-3-8b, 128 rows"], strict=True))
    facts = {"outputs": BOTH, "distribution": "", "tflops": None}
    return first_call_rows(shape, prepare, "linear_token_stats(h, w, y)", **facts)


def implementations(shape: tuple[int, ...], dtype: torch.dtype) -> Implementations:
    """All that a shape is measured with beside the floor; None for what `Case` measures itself."""
    found: Implementations = ours(dtype) | peers()
    if dtype == torch.float32:
        found["gemm tf32"] = (None, "logits")
    if shape[0] <= FEW_ROWS:
        found["read"] = (None, "")
    return found


def main() -> None:
    """Measure, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bf16 = [name for name in SHAPES if "float32" not in name]
    parser.add_argument("--shapes", nargs="+", help=f"of {', '.join(SHAPES)}, or ROWSxHIDDENxVOCAB")
    parser.add_argument("--ops", nargs="+", default=[*OPS, "first"], choices=[*OPS, "first"])
    parser.add_argument("--impls", nargs="+", metavar="NAME", help="of those in the table; the floor is always there")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--distributions", nargs="+", default=DISTRIBUTIONS, choices=DISTRIBUTIONS)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--append", action="store_true", help="keep the rows that the file has")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    torch.set_float32_matmul_precision("highest")
    before = None
    if options.append and options.out and options.out.exists():
        before = json.loads(options.out.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = []
    if "first" in options.ops:
        rows += first_call()
        show(rows)
    for name in options.shapes or (["float32 head"] if dtype == torch.float32 else bf16):
        shape = SHAPES.get(name) or tuple(int(n) for n in name.split("x"))
        # without this, from its ninth shape on, torch.compile gives up and runs eagerly
        torch._dynamo.reset()
        functions = implementations(shape, dtype)
        functions = {n: f for n, f in functions.items() if options.impls is None or n in options.impls}
        for distribution in options.distributions:
            peaked = distribution == "rollouts"
            case = Case(shape, dtype, "cuda" if torch.cuda.is_available() else "cpu", peaked)
            for op in (op for op in OPS if op in options.ops):
                measured = case.measure(op, functions, options.rounds)
                show(measured)
                rows += measured
            # before the next one's tensors
            del case
            if options.out:
                write(rows, PACKAGES, options.out, before)


if __name__ == "__main__":
    main()
