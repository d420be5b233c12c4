"""Log-prob and entropy from logits beside the read floor, the copy rate and every peer that is installed.

    python -m bench logits [--shapes 8192x128256 ...] [--dtype bfloat16] [--softcap 30] [--out result.json]

All in one run. The floor of the forward is one plain read of the logits, that of the backward a copy of them. Errors
are against float64 over the first rows; a peer that is not installed is left out, one that fails is named on stderr.
TRL's and this project's functions give log-prob and entropy, the rest the log-prob alone: Liger's of one row less,
Quack's and fla's as a loss, whose sign is changed outside of the time. The line `host` is what one call costs the host
on a small input, `first call` what a user waits for the first one, in a process of its own where nothing was ever
compiled. Up to 1024 rows, `forward, in a graph` is the time of a call in a CUDA graph, over as many inputs as no cache
holds: what is left when submitting costs nothing. With a softcap torch alone is a peer: the rest have none to set.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.harness import (
    UNMEASURED,
    copy_ms,
    first_call_rows,
    float64_stats,
    graph_ms,
    graph_read_ms,
    host_us,
    largest_errors,
    median_ms,
    name_failure,
    peak_bytes,
    read_ms,
    show,
    write,
)
from entropy_fast import token_stats

SHAPES = ["8192x32000", "8192x50257", "8192x128256", "8192x151936", "4096x256000", "1024x128256", "128x128256"]
SHAPES += ["128x50257", "128x32000"]
PACKAGES = ("torch", "triton", "entropy_fast", "trl", "liger-kernel", "quack-kernels", "flash-linear-attention")
CHECKED_ROWS = 64
# so few rows are timed in a graph too, over inputs of so many bytes together, so many at most
GRAPH_ROWS, GRAPH_BYTES, GRAPH_INPUTS = 1024, 200e6, 16
BOTH, LOGPROB, LOSS = "logprob, entropy", "logprob", "-logprob"
Pair = tuple[torch.Tensor, torch.Tensor | None]
Function = Callable[[torch.Tensor, torch.Tensor], Pair]


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits bounded by a softcap, where there is one."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def ours(logits: torch.Tensor, targets: torch.Tensor, softcap: float | None = None) -> Pair:
    """This project."""
    return token_stats(logits, targets, softcap=softcap)[:2]


def eager(logits: torch.Tensor, targets: torch.Tensor, softcap: float | None = None) -> Pair:
    """Float32 log-softmax in one piece."""
    logp = torch.log_softmax(capped(logits.float(), softcap), -1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def plain_torch(softcap: float | None) -> dict[str, tuple[Function, str]]:
    """Torch's own: name -> (function, what it gives)."""
    function = partial(eager, softcap=softcap)
    return {"torch eager": (function, BOTH), "torch compiled": (torch.compile(function, dynamic=False), BOTH)}


def libraries() -> dict[str, tuple[Function, str]]:
    """Importable libraries: name -> (function, what it gives)."""
    found: dict[str, tuple[Function, str]] = {}
    try:
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

        found["trl"] = (lambda x, y: selective_log_softmax_and_entropy(x, y), BOTH)
    except ImportError:
        pass
    try:
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

        def liger(x: torch.Tensor, y: torch.Tensor) -> Pair:
            # one sequence, of which it scores every row but the last, against the last rows − 1 ids that it is given
            return fused_selective_log_softmax(x[None], y[None, :-1], 1.0)[0], None

        found["liger"] = (liger, LOGPROB)
    except ImportError:
        pass
    try:
        from quack.cross_entropy import cross_entropy

        found["quack"] = (lambda x, y: (cross_entropy(x, y, reduction="none"), None), LOSS)
    except ImportError:
        pass
    try:
        from fla.modules.fused_cross_entropy import cross_entropy_loss

        found["fla"] = (lambda x, y: (cross_entropy_loss(x, y)[0], None), LOSS)
    except ImportError:
        pass
    return found


class Case:
    """One shape: its tensors, its floors and the rows of the result."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, softcap: float | None, device: str) -> None:
        g = torch.Generator(device).manual_seed(rows + vocab)
        self.logits = torch.empty(rows, vocab, dtype=dtype, device=device)
        for part in self.logits.split(1024):
            part.copy_(3 * torch.randn(part.shape, generator=g, device=device))
        self.targets = torch.randint(vocab, (rows,), generator=g, device=device)
        self.softcap = softcap
        self.exact = float64_stats(capped(self.logits[:CHECKED_ROWS].double(), softcap), self.targets[:CHECKED_ROWS])
        self.facts = {"shape": {"rows": rows, "vocab": vocab}, "dtype": str(dtype).removeprefix("torch.")}
        self.rows: list[dict[str, Any]] = []

    def add(self, op: str, impl: str, outputs: str, ms: float, floor: float, **measured: Any) -> None:
        """One row of the result."""
        row = {"op": op, "impl": impl, **self.facts, "outputs": outputs, "ms": ms, "of_floor": ms / floor}
        self.rows.append(row | UNMEASURED | measured)

    def forward(self, functions: dict[str, tuple[Function, str]]) -> None:
        """Time, memory and errors of the forward; its time with half of the rows masked."""
        floor = read_ms(self.logits)
        self.add("forward", "floor", "", floor, floor)
        for name, (function, outputs) in functions.items():

            def call(function: Function = function) -> Pair:
                with torch.no_grad():
                    return function(self.logits, self.targets)

            try:
                first, entropy = call()
                errors = largest_errors((-first if outputs == LOSS else first, entropy), self.exact)
                measured = {"error_logprob": errors[0], "error_entropy": errors[1], "peak_bytes": peak_bytes(call)}
                self.add("forward", name, outputs, median_ms(call), floor, **measured)
            except Exception as error:
                name_failure(name, error)
        # every other row; and as prompts and padding are, many in a row
        place = torch.arange(len(self.targets), device=self.targets.device)
        for op, run in (("forward, half masked", 1), ("forward, half masked in runs", -(-len(place) // 16))):
            mask = place // run % 2 == 0
            ms = median_ms(lambda mask=mask: token_stats(self.logits, self.targets, mask=mask, softcap=self.softcap))
            self.add(op, "entropy_fast", BOTH, ms, floor)

    def backward(self, functions: dict[str, tuple[Function, str]]) -> None:
        """The backward of log-prob and entropy alone: the forward's graph is kept."""
        floor = copy_ms(self.logits)
        self.add("backward", "floor", "", floor, floor)
        for name, (function, outputs) in functions.items():
            x = self.logits.detach().requires_grad_()
            try:
                loss = sum(t.sum() for t in function(x, self.targets) if t is not None)
                # made here: else every call would start with a kernel that writes it
                one = torch.ones_like(loss)

                def call(loss: Any = loss, one: torch.Tensor = one, x: torch.Tensor = x) -> Any:
                    return torch.autograd.grad(loss, x, one, retain_graph=True)

                self.add("backward", name, outputs, median_ms(call), floor, peak_bytes=peak_bytes(call))
            except Exception as error:
                name_failure(f"{name}, backward", error)
        if self.logits.is_cuda:
            self.add("backward, in place", "entropy_fast", BOTH, self._in_place(), floor)

    @torch.no_grad()
    def in_a_graph(self, functions: dict[str, tuple[Function, str]]) -> None:
        """Time of the forward in a CUDA graph; a function that cannot be captured is taken out of `functions`."""
        count = min(GRAPH_INPUTS, int(GRAPH_BYTES // self.logits.nbytes) + 1)
        inputs = [self.logits, *(self.logits.clone() for _ in range(count - 1))]
        floor = graph_read_ms(inputs)
        self.add("forward, in a graph", "floor", "", floor, floor)
        for name, (function, outputs) in list(functions.items()):
            try:
                ms = graph_ms([partial(function, x, self.targets) for x in inputs])
                self.add("forward, in a graph", name, outputs, ms, floor)
            except Exception as error:
                name_failure(f"{name}, in a graph", error)
                del functions[name]

    def _in_place(self) -> float:
        """The operator that writes over the logits, again and again over the same ones: its time knows no values."""
        operators = torch.ops.entropy_fast
        temperature = torch.tensor(1.0, dtype=torch.float64)
        inputs = (self.targets, None, None, temperature, 1.0, self.softcap)
        x = self.logits.clone()
        stats = operators.row_stats(x, *inputs)
        ones = torch.ones_like(stats[0])
        return median_ms(lambda: operators.row_stats_backward_(x, *inputs, *stats, ones, ones, None, False))


def host_rows(device: str) -> list[dict[str, Any]]:
    """What a call costs the host, beside the cheapest operation of torch on the same tensors."""
    x = torch.randn(4, 1024, device=device)
    y = torch.zeros(4, dtype=torch.int64, device=device)
    graph = x.clone().requires_grad_()
    floor = host_us(lambda: torch.amax(x, -1))
    calls = {"floor": floor, "entropy_fast": host_us(lambda: token_stats(x, y))}
    calls["entropy_fast, differentiable"] = host_us(lambda: token_stats(graph, y))
    facts = {"shape": {"rows": 4, "vocab": 1024}, "dtype": "float32", "outputs": "", **UNMEASURED}
    return [{"op": "host", "impl": n, **facts, "ms": us / 1e3, "of_floor": us / floor} for n, us in calls.items()]


def first_call() -> list[dict[str, Any]]:
    """What the first call costs, compiling included."""
    prepare = """
import entropy_fast.kernels.rows
from entropy_fast import token_stats
x = torch.randn(128, 128256, device="cuda").bfloat16()
y = torch.zeros(128, dtype=torch.int64, device="cuda")
"""
    return first_call_rows({"rows": 128, "vocab": 128256}, prepare, "token_stats(x, y)", outputs=BOTH)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxVOCAB")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32", "float64"))
    parser.add_argument("--softcap", type=float, help="bounds the logits, by softcap · tanh(· / softcap)")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    softcap = options.softcap
    if softcap is not None and not softcap > 0:
        parser.error(f"--softcap is {softcap:g}; it has to be above 0, or left out for none")
    functions: dict[str, tuple[Function, str]] = {"entropy_fast": (partial(ours, softcap=softcap), BOTH)}
    if not options.without_peers:
        functions |= (libraries() if softcap is None else {}) | plain_torch(softcap)
    dtype = getattr(torch, options.dtype)
    shapes = [(int(rows), int(vocab)) for rows, vocab in (shape.split("x") for shape in options.shapes)]
    rows = host_rows(device) + first_call()
    for shape in shapes:
        # without this, from its ninth shape on, torch.compile gives up and runs eagerly
        torch._dynamo.reset()
        case = Case(*shape, dtype, softcap, device)
        case.forward(functions)
        if not options.forward_only:
            case.backward(functions)
        rows += case.rows
        del case
    # last, because a failed capture can leave a process worse than it was
    for shape in shapes:
        if device == "cuda" and shape[0] <= GRAPH_ROWS:
            torch._dynamo.reset()
            case = Case(*shape, dtype, softcap, device)
            case.in_a_graph(functions)
            rows += case.rows
            del case
    show(rows)
    if options.out:
        write(rows, PACKAGES, options.out)


if __name__ == "__main__":
    main()
