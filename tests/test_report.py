"""The report: its numbers against plain arithmetic, strict JSON, a table that fits, a figure that is drawn."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from entropy_fast.change import measure_change
from entropy_fast.config import Config
from entropy_fast.errors import InputError
from entropy_fast.layout import Layout
from entropy_fast.report import Report, length_bias
from entropy_fast.report.table import render, render_views
from entropy_fast.rollouts import Counting, Rollouts, token_masks
from entropy_fast.scoring import Scores


def change(seed: int = 0, *, prompts: int = 12, group: int = 8, step: float = 0.05, entropy: bool = True, **config):
    """A change between two made-up policies: lengths spread from 1 to 40, scores with a known mean by token."""
    generator = torch.Generator().manual_seed(seed)
    n = prompts * group
    lengths = torch.randint(1, 41, (n,), generator=generator)
    ids = [[5] * (int(length) - 1) + [0] for length in lengths]
    rollouts = Rollouts.from_lists([[7, 8]] * n, ids, [i // group for i in range(n)])
    masks = token_masks(rollouts.tokens, rollouts.generated, Counting((0,)))
    shape = rollouts.tokens.shape

    def scores(shift: float) -> Scores:
        logprob = -2.0 + shift * torch.randn(shape, generator=generator)
        values = torch.where(masks.generated, logprob.clamp_max(-0.01), 0.0)
        return Scores(
            values, torch.where(masks.generated, 2.0 + 0.1 * shift, 0.0) if entropy else None, masks, Layout(())
        )

    first = scores(0.3)
    moved = torch.where(masks.generated, first.logprob + step * torch.randn(shape, generator=generator), 0.0)
    second = Scores(moved.clamp_max(0.0), first.entropy, masks, Layout(()))
    return measure_change(rollouts, first, second, Config.from_dict({"entropy": config} if config else {}))


def test_the_parts_of_the_change_add_up():
    found = change(1)
    bias = length_bias(found)
    s0, s1 = found.original.S, found.updated.S
    length = found.original.lengths.double()
    w = torch.tensor([math.exp(a) for a in (s1 - s0).tolist()], dtype=torch.float64)
    length1 = ((w * length).sum() / w.sum()).item()
    h0, h1 = -(s0.sum() / length.sum()).item(), -((w * s1).sum() / (w * length).sum()).item()
    # log weights are float64 sums of float32 scores in both; 1e-6 is thousands of float64 roundings
    assert bias.length_original == pytest.approx(length.mean().item(), rel=1e-12)
    assert bias.length_updated == pytest.approx(length1, rel=1e-6)
    assert bias.length_part == pytest.approx((h0 + h1) / 2 * (length1 - length.mean().item()), rel=1e-4, abs=1e-6)
    assert bias.length_part + bias.per_token_part == pytest.approx(bias.change, abs=1e-9)


def test_the_shares_of_variance_are_squared_correlations():
    found = change(2)
    bias = length_bias(found)
    surprisal, length = -found.original.S, found.original.lengths.double()
    for value, y in ((bias.sequence_r2, surprisal), (bias.per_token_r2, surprisal / length)):
        assert value == pytest.approx(torch.corrcoef(torch.stack([y, length]))[0, 1].item() ** 2, rel=1e-9)
    assert bias.sequence_r2 > 0.9 > 0.2 > bias.per_token_r2


def test_json_is_strict_and_whole(tmp_path):
    report = Report(change(3), "a title", {"seed": 3})
    report.write(tmp_path / "new" / "folder")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    read = json.loads((tmp_path / "new" / "folder" / "report.json").read_text(), parse_constant=refuse)
    assert read["title"] == "a title"
    assert read["inputs"] == {"seed": 3}
    assert read["sequence"]["bits"]["value"] == pytest.approx(read["sequence"]["value"] / math.log(2))
    assert read["counts"]["sequences"] == 96
    assert set(read["verdict"]) >= {"status", "believable", "reasons"}
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"report.json", "report.png"}


def test_a_file_is_no_folder_for_a_report(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="is a file"):
        Report(change(3), "").write(tmp_path / "taken")


def text_of(renderable: object, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(renderable)
    return stream.getvalue()


CASES = {
    "default": {},
    "per token": {"unit": "per_token"},
    "no entropies": {"entropy": False},
    "large step": {"step": 1.5},
    "no change": {"step": 0.0},
    "tiny step": {"step": 1e-6},
    "one prompt": {"prompts": 1},
    "few sequences": {"prompts": 2, "group": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_the_table_fits_80_columns_and_says_it_all(case):
    report = Report(change(4, **CASES[case]), "original → updated")
    text = text_of(render(report))
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= 80
    status = report.change.verdict.status
    for word in ("per sequence", "per token", "nats", "bits", "± se", "ESS", "k̂", "mean", f"verdict: {status}"):
        assert word in text
    flat = " ".join(text.split())
    for reason in report.change.verdict.reasons:
        assert " ".join(reason.split()) in flat
    row = next(line for line in lines if line.startswith("  sampled "))
    assert float(row.split()[3]) == pytest.approx(report.change.estimates["sequence/sampled"].value, rel=0.05, abs=1e-3)


def test_the_two_views_side_by_side():
    reports = [Report(change(seed), f"update {seed}") for seed in (5, 6)]
    lines = text_of(render_views(reports)).splitlines()
    for report in reports:
        row = next(line for line in lines if report.title in line)
        assert f"{report.length.length_part:+.2f}" in row


@pytest.mark.parametrize("case", CASES)
def test_the_figure_is_drawn(case, tmp_path):
    pytest.importorskip("matplotlib")
    from entropy_fast.report.figure import draw

    draw(Report(change(7, **CASES[case]), case), tmp_path / "report.png")
    data = (tmp_path / "report.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20]) == 1760
    assert int.from_bytes(data[20:24]) == 1360


def test_without_matplotlib_the_json_is_still_written(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "entropy_fast.report.figure", raising=False)
    written = Report(change(8), "").write(tmp_path)
    assert [path.name for path in written] == ["report.json"]
