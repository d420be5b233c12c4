"""Draw a result of `python -m bench logits`: what each implementation reads a second, under the measured roof.

python -m bench plots bench/results/h100-logits.json -o docs/images/logits.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from entropy_fast.files import atomic_path

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
MARKERS = "osD^vP*X"


def rate(row: dict[str, Any]) -> float:
    """TB/s of logits that a row's implementation gets through, read (and, in the backward, written) once."""
    passes = 1 if row["op"] == "forward" else 2
    return passes * _bytes(row) / row["ms"] / 1e9


def _bytes(row: dict[str, Any]) -> int:
    return row["shape"]["rows"] * row["shape"]["vocab"] * BYTES[row["dtype"]]


def draw(result: dict[str, Any], out: Path) -> None:
    """One panel each for forward and backward."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for panel, op, roof in zip(panels, ("forward", "backward"), ("a plain read", "a copy"), strict=True):
        rows = [row for row in result["rows"] if row["op"] == op]
        names = list(dict.fromkeys(row["impl"] for row in rows))
        for i, name in enumerate(names):
            points = sorted((_bytes(row) / 1e6, rate(row)) for row in rows if row["impl"] == name)
            x, y = zip(*points, strict=True)
            if name == "floor":
                panel.plot(x, y, color="0.5", label=f"{roof} of the same bytes", zorder=1)
                continue
            ours = name == "entropy_fast"
            outputs = next(row["outputs"] for row in rows if row["impl"] == name)
            panel.scatter(
                x,
                y,
                s=70 if ours else 36,
                marker=MARKERS[i % len(MARKERS)],
                color="tab:red" if ours else None,
                label=f"{name} ({outputs})",
                zorder=3 if ours else 2,
            )
        panel.set(xscale="log", xlabel="logits, MB", title=op)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    panels[0].set_ylabel("TB/s")
    panels[0].set_ylim(bottom=0)
    commit = (result["commit"] or "")[:10]
    figure.suptitle(f"{result['gpu']}, torch {result['versions'].get('torch', '?')}, commit {commit}", fontsize=9)
    with atomic_path(out) as partial:
        figure.savefig(partial, dpi=150)
    plt.close(figure)


def main() -> None:
    """Read a result, write a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    draw(json.loads(options.result.read_text(encoding="utf-8")), options.out)


if __name__ == "__main__":
    main()
