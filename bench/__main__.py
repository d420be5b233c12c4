"""`python -m bench NAME [options]`: run one of the benchmarks; `python -m bench NAME --help` says what it takes."""

from __future__ import annotations

import runpy
import sys

BENCHMARKS = {
    "logits": "rows of logits: forward and backward beside the read floor, the copy rate and peers",
    "linear": "hidden states and head, without logits, beside bare GEMMs and peers",
    "score": "a whole scoring pass of a model",
    "precision": "how much S depends on the layout, in every precision, for docs/precision.md",
    "heads_table": "what every model class gets, for docs/heads.md",
    "psis": "Pareto smoothing of many weights",
    "tune": "measure the launch settings that kernels/settings.py holds",
    "plots": "draw the results",
}

if len(sys.argv) < 2 or sys.argv[1] not in BENCHMARKS:
    print(__doc__)
    print("\n".join(f"  {name:11} {what}" for name, what in BENCHMARKS.items()))
    raise SystemExit(0 if sys.argv[1:] in (["--help"], ["-h"]) else 2)
del sys.argv[0]
runpy.run_module(f"bench.{sys.argv[0]}", run_name="__main__", alter_sys=True)
