"""The benchmark of the logits functions runs anywhere and writes the schema that the plots read."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COLUMNS = {"op", "impl", "shape", "dtype", "outputs", "ms", "of_floor", "peak_bytes", "error_logprob", "error_entropy"}


def bench(*arguments):
    return subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_logits_and_its_plot(tmp_path):
    out = tmp_path / "logits.json"
    shapes = ("--shapes", "4x50", "3x1000", "--without-peers", "--dtype", "float32")
    run = bench("logits", *shapes, "--out", str(out))
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(out.read_text())
    assert set(result) == {"command", "commit", "gpu", "versions", "rows"}
    assert result["command"].startswith("python -m bench logits --shapes 4x50")
    assert all(set(row) == COLUMNS for row in result["rows"])
    for op in ("forward", "backward"):
        rows = [row for row in result["rows"] if row["op"] == op]
        assert {row["impl"] for row in rows} == {"floor", "entropy_fast"}
        assert [row["shape"] for row in rows[::2]] == [{"rows": 4, "vocab": 50}, {"rows": 3, "vocab": 1000}]
        assert all(row["ms"] > 0 and row["of_floor"] > 0 for row in rows)
    errors = [row["error_logprob"] for row in result["rows"] if (row["op"], row["impl"]) == ("forward", "entropy_fast")]
    assert max(errors) < 3e-6
    plot = bench("plots", str(out), "-o", str(tmp_path / "logits.png"))
    assert plot.returncode == 0, plot.stderr[-2000:]
    assert (tmp_path / "logits.png").read_bytes()[:4] == b"\x89PNG"


def test_an_unknown_benchmark_lists_the_known_ones():
    run = bench("logit")
    assert run.returncode == 2
    assert "logits" in run.stdout
