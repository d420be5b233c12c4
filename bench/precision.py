"""The noise that a precision brings to S: `python -m bench precision [--shapes qwen2.5-1.5b] [--out FILE]`.

Random bf16 weights of a real shape, the rollouts of `python -m bench score`. Every precision scores the same weights
under pairs of layouts, between which nothing but rounding differs; a line of the table is the largest and the median
|difference in S| over the sequences, in nats. The second table is how far S is from that of `precision="float32"`, one
sequence at a time (root mean square over the first `--float32-sequences`); fp16 holds the bf16 weights up to its range.

A layout that the trial refuses is named on stderr and left out, and so is a pair that is one and the same layout for
that many sequences.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from bench.harness import write
from bench.score import DEVICE, PACKAGES, SHAPES, rollouts
from entropy_fast import Rollouts, score
from entropy_fast.errors import InputError
from entropy_fast.layout import Layout

# (name in the table, dtype that the weights are held in, options of `Scoring`), in an order in which no conversion of
# the weights but the last, to fp16, can round
SETTINGS: tuple[tuple[str, torch.dtype, dict[str, Any]], ...] = (
    ("as loaded (bf16)", torch.bfloat16, {}),
    ("as loaded (bf16), not fused", torch.bfloat16, {"fusion": False}),
    ("float32", torch.bfloat16, {"precision": "float32"}),
    ("float32, not fused", torch.bfloat16, {"precision": "float32", "fusion": False}),
    ("float32, TF32 allowed", torch.float32, {"precision": "tf32"}),
    ("as loaded (fp16)", torch.float16, {}),
)
PAIRS = (
    ("packed", "the same again"),
    ("packed", "packed, twice the tokens"),
    ("padded, by length", "one at a time"),
    ("packed", "padded, by length"),
)


def options_of(layout: str, budget: int) -> dict[str, Any]:
    """What `score` is told for a layout of the table."""
    if layout == "one at a time":
        return {"packing": False, "max_sequences": 1, "token_budget": budget}
    twice = layout == "packed, twice the tokens"
    return {"packing": not layout.startswith("padded"), "token_budget": budget * (2 if twice else 1)}


def scored(
    model: torch.nn.Module, r: Rollouts, options: dict[str, Any], layout: str, budget: int
) -> tuple[torch.Tensor, Layout] | None:
    """S of every sequence, and how it was computed; None where the model is not trusted with the layout."""
    try:
        scores = score(model, r, entropy=False, **options, **options_of(layout, budget))
        return scores.S.cpu().double(), scores.layout
    except InputError as error:
        print(f"{layout} left out: {error}", file=sys.stderr)
        return None


def bench(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of one shape, of both tables."""
    prompts, make = SHAPES[name]
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = tf.AutoModelForCausalLM.from_config(make(), dtype=torch.bfloat16).eval()
    every = rollouts(prompts, model.config.vocab_size)
    sums: dict[str, dict[str, torch.Tensor]] = {}
    found: list[dict[str, Any]] = []
    for setting, dtype, chosen in SETTINGS:
        model.to(dtype)
        most = options.sequences if "precision" not in chosen else options.float32_sequences
        r = every.select(torch.arange(min(most, len(every))))
        layouts = dict.fromkeys(layout for pair in PAIRS for layout in pair)
        tried = {x: scored(model, r, chosen, x, options.token_budget) for x in layouts}
        done = {x: result for x, result in tried.items() if result is not None}
        sums[setting] = {x: S for x, (S, _) in done.items()}
        for one, other in PAIRS:
            if one not in done or other not in done:
                continue
            (a, first), (b, second) = done[one], done[other]
            if first == second and other != "the same again":
                print(f"{setting}: {one} and {other} are one layout for {len(r)} sequences", file=sys.stderr)
                continue
            difference = (a - b).abs()
            found.append(
                {
                    "op": "layouts",
                    "shape": {"model": name, "sequences": len(r), "token_budget": options.token_budget},
                    "precision": setting,
                    "layouts": [one, other],
                    "max": difference.max().item(),
                    "median": difference.median().item(),
                }
            )
    exact = sums["float32"]["one at a time"]
    for setting, by_layout in sums.items():
        for layout in ("packed", "padded, by length", "one at a time"):
            S = by_layout.get(layout)
            if S is None or S is exact:
                continue
            n = min(len(S), len(exact))
            found.append(
                {
                    "op": "from float32",
                    "shape": {"model": name, "sequences": n, "token_budget": options.token_budget},
                    "precision": setting,
                    "layouts": [layout],
                    "rms": (S[:n] - exact[:n]).square().mean().sqrt().item(),
                }
            )
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """Both tables, for docs/precision.md."""
    lines = ["| trunk | one layout | the other | sequences | largest | median |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["op"] == "layouts":
            one, other = row["layouts"]
            what = f"| {row['precision']} | {one} | {other} | {row['shape']['sequences']} |"
            lines.append(f"{what} {row['max']:.2g} | {row['median']:.2g} |")
    lines += ["", "| trunk | layout | sequences | from float32, rms |", "|---|---|---|---|"]
    for row in rows:
        if row["op"] == "from float32":
            what = f"| {row['precision']} | {row['layouts'][0]} | {row['shape']['sequences']} |"
            lines.append(f"{what} {row['rms']:.2g} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = DEVICE == "cuda"
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--shapes", nargs="+", default=["qwen2.5-1.5b" if gpu else "small"], choices=list(SHAPES))
    parser.add_argument("--sequences", type=int, default=64 if gpu else 4, help="in bf16 and fp16")
    parser.add_argument("--float32-sequences", type=int, default=16 if gpu else 4, help="in float32, which is slow")
    parser.add_argument("--token-budget", type=int, default=8192 if gpu else 1024, help="of a microbatch")
    options = parser.parse_args()
    rows = []
    for name in options.shapes:
        found = bench(name, options)
        print(f"\n{name}\n\n{markdown(found)}")
        rows += found
        if gpu:
            torch.cuda.empty_cache()
    if options.out:
        write(rows, PACKAGES, options.out)


if __name__ == "__main__":
    main()
