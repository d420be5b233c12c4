"""`sweep` and `calibrate` on real files."""

import json

import pytest
from test_cli import fails, place, run  # noqa: F401  (`place` is a fixture)


@pytest.fixture(scope="module")
def folder(place):  # noqa: F811
    return place


def test_sweep_goes_through_what_compare_measures(folder, tmp_path):
    files = (folder / "original", folder / "updated", folder / "rollouts.jsonl")
    result = run("sweep", *files, "--eta", 0.5, "--eta", 1, "-o", tmp_path / "sweep")
    assert "δH₁ predicts" in result.stdout
    run("compare", *files, "-o", tmp_path / "compare")
    swept = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    compared = json.loads((tmp_path / "compare" / "report.json").read_text())
    assert swept["etas"] == [0.5, 1.0]
    # θ + (θ' − θ) is θ' up to float32 rounding of every weight, and so is what comes of it
    assert swept["changes"][1]["deltaH"] == pytest.approx(compared["deltaH"], rel=1e-3)
    assert set(swept["fit"]) == {"sequence", "per_token"}
    for unit, fit in swept["fit"].items():
        first_order = swept["delta_h1"][unit]
        # the same rollouts, so their slope and their score form differ by far less than either's own error
        assert abs(fit["initial_slope"] - first_order["value"]) < first_order["se"]
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 10_000


def test_a_sweep_of_one_step_is_refused(folder, tmp_path):
    files = (folder / "original", folder / "updated", folder / "rollouts.jsonl")
    assert "two or more different steps" in fails("sweep", *files, "--eta", 1, "-o", tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_calibrate_repeats_exactly_and_reports_both_precisions(folder):
    files = (folder / "original", folder / "rollouts.jsonl")
    noises = json.loads(run("calibrate", *files, "--json").stdout)
    assert [noise["precision"] for noise in noises] == ["float32", "as_loaded"]
    assert all(noise["repeatable"] for noise in noises)
    assert all(0 <= floor < 1e-3 for noise in noises for floor in noise["floors"].values())
    table = run("calibrate", *files).stdout
    assert "float32" in table
    assert "exactly" in table
