"""Draw a result of `python -m bench logits` or `linear`.

    python -m bench plots bench/results/h100-logits.json -o docs/logits.png
    python -m bench plots bench/results/h100-linear.json -o docs/linear.png

Of logits: what each implementation reads a second, under the measured roof. Of hidden states and head: the time of each
implementation over that of the bare GEMMs, shape by shape.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from entropy_fast.files import atomic_path

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
MARKERS = "osD^vP*X"
# without red and orange, which are this project's
COLOURS = ["tab:blue", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "0.35"]


def rate(row: dict[str, Any]) -> float:
    """TB/s of logits that a row's implementation gets through, read (and, in the backward, written) once."""
    passes = 1 if row["op"] == "forward" else 2
    return passes * _bytes(row) / row["ms"] / 1e9


def _bytes(row: dict[str, Any]) -> int:
    return row["shape"]["rows"] * row["shape"]["vocab"] * BYTES[row["dtype"]]


def draw(result: dict[str, Any], out: Path) -> None:
    """The picture that fits the result: one panel each for forward and backward."""
    figure = (_linear if "hidden" in result["rows"][0]["shape"] else _logits)(result["rows"])
    commit = (result["commit"] or "")[:10]
    figure.suptitle(f"{result['gpu']}, torch {result['versions'].get('torch', '?')}, commit {commit}", fontsize=9)
    with atomic_path(out) as partial:
        figure.savefig(partial, dpi=150)
    plt.close(figure)


def _style(name: str, names: list[str]) -> dict[str, Any]:
    """Marker, colour and size of an implementation; this project's stand out and lie on top."""
    ours = [n for n in names if n.startswith("entropy_fast")]
    others = [n for n in names if n not in ours]
    if name in ours:
        i = ours.index(name)
        return {"marker": MARKERS[i], "color": ("tab:red", "darkorange", "firebrick")[i % 3], "s": 80, "zorder": 3}
    i = others.index(name)
    return {"marker": MARKERS[i % len(MARKERS)], "color": COLOURS[i % len(COLOURS)], "s": 36, "zorder": 2}


def _logits(rows: list[dict[str, Any]]) -> Figure:
    """TB/s over the size of the logits."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    names = list(dict.fromkeys(row["impl"] for row in rows))
    for panel, op in zip(panels, ("forward", "backward"), strict=True):
        here = [row for row in rows if row["op"] == op]
        for name in dict.fromkeys(row["impl"] for row in here):
            points = sorted((_bytes(row) / 1e6, rate(row)) for row in here if row["impl"] == name)
            x, y = zip(*points, strict=True)
            if name == "floor":
                panel.plot(x, y, color="0.5", label="a plain read, a copy of the same bytes", zorder=1)
                continue
            outputs = next(row["outputs"] for row in here if row["impl"] == name)
            panel.scatter(x, y, label=f"{name} ({outputs})", **_style(name, names))
        panel.set(xscale="log", xlabel="logits, MB", title=op)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("TB/s")
    panels[0].set_ylim(bottom=0)
    _legend(figure, 4)
    return figure


def _linear(rows: list[dict[str, Any]]) -> Figure:
    """Time over the bare GEMMs', a line for each shape, of the rows with flat distributions."""
    rows = [row for row in rows if row["distribution"] == "flat"]
    shapes = list(dict.fromkeys(tuple(row["shape"].values()) for row in rows))
    names = list(dict.fromkeys(row["impl"] for row in rows if row["impl"] != "gemm"))
    size = (11, max(3.2, 1.9 + 0.45 * len(shapes)))
    figure, panels = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for panel, op in zip(panels, ("forward", "forward+backward"), strict=True):
        here = [row for row in rows if row["op"] == op]
        panel.axvline(1, color="0.5", zorder=1)
        for name in names:
            points = [(row["of_floor"], tuple(row["shape"].values())) for row in here if row["impl"] == name]
            if points:
                outputs = next(row["outputs"] for row in here if row["impl"] == name)
                style = _style(name, names)
                x, y = [point[0] for point in points], [shapes.index(point[1]) for point in points]
                panel.scatter(x, y, label=f"{name} ({outputs})" if outputs == "logprob" else name, **style)
        panel.set(xscale="log", xlabel="time over the bare GEMMs'", title=op)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
        panel.grid(alpha=0.3, which="both", axis="x")
        panel.grid(alpha=0.3, axis="y")
    panels[0].set_yticks(range(len(shapes)), [" × ".join(map(str, shape)) for shape in shapes])
    panels[0].set_ylim(len(shapes) - 0.5, -0.5)
    panels[0].set_ylabel("rows × hidden × vocabulary")
    _legend(figure, 5)
    return figure


def _legend(figure: Figure, columns: int) -> None:
    """One for all panels, below them."""
    labels = dict(pair[::-1] for panel in figure.axes for pair in zip(*panel.get_legend_handles_labels(), strict=True))
    if labels:
        figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=columns, fontsize=8)


def main() -> None:
    """Read a result, write a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    draw(json.loads(options.result.read_text(encoding="utf-8")), options.out)


if __name__ == "__main__":
    main()
