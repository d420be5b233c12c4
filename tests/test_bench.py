"""The benchmarks run anywhere and write the schema that the plots read."""

import json
import math
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
COLUMNS = {"op", "impl", "shape", "dtype", "outputs", "ms", "of_floor", "peak_bytes", "error_logprob", "error_entropy"}

# of the floor and this project, timed again and again
ALONE = {"ms_alone", "of_floor_alone"}


def bench(*arguments):
    return subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True)


def result_of(folder, name, *arguments):
    """What a benchmark wrote, and its picture."""
    out = folder / f"{name}.json"
    run = bench(name, *arguments, "--out", str(out))
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(out.read_text())
    assert set(result) == {"command", "commit", "gpu", "versions", "rows"}
    picture = folder / f"{name}.png"
    plot = bench("plots", str(out), "-o", str(picture))
    assert plot.returncode == 0, plot.stderr[-2000:]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    return result, run.stdout


def test_logits_and_its_plot(tmp_path):
    shapes = ("--shapes", "4x50", "3x1000", "--without-peers", "--dtype", "float32")
    result, _ = result_of(tmp_path, "logits", *shapes)
    assert result["command"].startswith("python -m bench logits --shapes 4x50")
    assert all(set(row) == COLUMNS for row in result["rows"])
    for op in ("forward", "backward"):
        rows = [row for row in result["rows"] if row["op"] == op]
        assert {row["impl"] for row in rows} == {"floor", "entropy_fast"}
        assert [row["shape"] for row in rows[::2]] == [{"rows": 4, "vocab": 50}, {"rows": 3, "vocab": 1000}]
        assert all(row["ms"] > 0 and row["of_floor"] > 0 for row in rows)
    errors = [row["error_logprob"] for row in result["rows"] if (row["op"], row["impl"]) == ("forward", "entropy_fast")]
    assert max(errors) < 3e-6


def test_logits_with_a_softcap(tmp_path):
    out = tmp_path / "capped.json"
    options = ("--shapes", "4x50", "--softcap", "2", "--without-peers", "--forward-only", "--dtype", "float32")
    run = bench("logits", *options, "--out", str(out))
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    (row,) = [row for row in rows if (row["op"], row["impl"]) == ("forward", "entropy_fast")]
    # against capped logits: those of deviation 3 would be far from them
    assert max(row["error_logprob"], row["error_entropy"]) < 3e-6


def test_linear_and_its_plot(tmp_path):
    ours = ["entropy_fast exact", "entropy_fast accurate", "entropy_fast fast"]
    others = ["gemm tf32", "read", "eager"]
    choice = ("--rounds", "1", "--dtype", "float32", "--impls", *ours, *others)
    result, printed = result_of(tmp_path, "linear", "--shapes", "6x16x50", "300x8x20", *choice)
    assert "6 × 16 × 50" in printed
    assert all(set(row) - ALONE == COLUMNS | {"distribution", "tflops"} for row in result["rows"])
    for op in ("forward", "forward+backward", "forward+backward, frozen head"):
        for distribution in ("flat", "rollouts"):
            rows = [row for row in result["rows"] if (row["op"], row["distribution"]) == (op, distribution)]
            few = [row["impl"] for row in rows if row["shape"] == {"rows": 6, "hidden": 16, "vocab": 50}]
            read = ["read"] if op == "forward" else []
            assert sorted(few) == sorted(["gemm", "gemm tf32", "eager", *ours, *read])
            many = [row["impl"] for row in rows if row["shape"] == {"rows": 300, "hidden": 8, "vocab": 20}]
            assert sorted(many) == sorted(["gemm", "gemm tf32", "eager", *ours])
            assert all(row["ms"] > 0 for row in rows)
            assert {row["of_floor"] for row in rows if row["impl"] == "gemm"} == {1.0}
    gemms = {"forward": 1, "forward+backward": 4, "forward+backward, frozen head": 3}
    for row in result["rows"]:
        if row["impl"] != "read":
            n, d, v = row["shape"].values()
            assert math.isclose(row["tflops"] * row["ms"] * 1e9, 2 * n * d * v * gemms[row["op"]])
    errors = [row["error_logprob"] for row in result["rows"] if row["op"] == "forward" and row["impl"] in ours]
    assert max(errors) < 1e-5


def test_linear_measures_only_what_is_asked_for(tmp_path):
    choice = ("--impls", "entropy_fast filtered", "--ops", "frozen", "--distributions", "flat", "--rounds", "1")
    rows = result_of(tmp_path, "linear", "--shapes", "300x8x20", *choice)[0]["rows"]
    assert [row["impl"] for row in rows] == ["gemm", "entropy_fast filtered"]
    assert {(row["op"], row["distribution"]) for row in rows} == {("forward+backward, frozen head", "flat")}


def test_an_unknown_benchmark_lists_the_known_ones():
    run = bench("logit")
    assert run.returncode == 2
    assert "logits" in run.stdout


def test_on_a_gpu_a_round_is_queued_without_waiting_between_its_calls(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.harness import alternating_ms

    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = len(done)

        def elapsed_time(self, end):
            return end.time - self.time

    for name, fake in {
        "is_available": lambda: True,
        "Event": Event,
        "_sleep": lambda cycles: done.append("head"),
        "synchronize": lambda: done.append("wait"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def fails():
        raise ValueError("planted")

    times = alternating_ms({"a": lambda: done.append("a"), "fails": fails, "b": lambda: done.append("b")}, 2)
    # the second round starts with the second call
    assert done == ["a", "wait", "b", "wait", "head", "a", "b", "wait", "head", "b", "a", "wait"]
    assert times == {"a": [1, 1], "b": [1, 1]}
