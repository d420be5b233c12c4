"""The fit of ΔH(η) and the noise floor."""

from __future__ import annotations

import json
import math

import pytest
import torch

from entropy_fast.errors import InputError
from entropy_fast.estimators import PairedScores, entropy_change, fit_response, noise_floor
from entropy_fast.estimators.enumerable import Policy


def test_a_parabola_is_found_and_its_linear_range_with_it():
    etas = [1e-6, 2e-6, -3e-6, 5e-6]
    fit = fit_response(etas, [-2.0 * x + 4e4 * x * x for x in etas], tolerance=0.1)
    assert fit.initial_slope == pytest.approx(-2.0, rel=1e-9)
    assert fit.curvature == pytest.approx(4e4, rel=1e-9)
    assert fit.quadratic_r2 == pytest.approx(1.0, abs=1e-12)
    # |4e4 η²| ≤ 0.1 |2 η|
    assert fit.linear_range == pytest.approx(5e-6)  # the bound is not above what was measured
    assert fit_response([1, 2], [1.1, 2.4]).linear_range == pytest.approx(1.0)
    assert fit.predict(1e-6) == pytest.approx(-2e-6 + 4e-8)
    assert json.loads(json.dumps(fit.to_dict()))["tolerance"] == 0.1


def test_a_line_is_a_line():
    fit = fit_response([0.0, 1.0, 2.0], [0.0, 3.0, 6.0])
    assert fit.slope == pytest.approx(3.0)
    assert fit.initial_slope == pytest.approx(3.0)
    assert fit.linear_r2 == pytest.approx(1.0)
    assert fit.linear_range == 2.0


def test_weights_are_those_of_weighted_least_squares():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(9, generator=g, dtype=torch.float64) + 0.1
    y = 2 * x - x * x + 0.1 * torch.randn(9, generator=g, dtype=torch.float64)
    se = torch.rand(9, generator=g, dtype=torch.float64) + 0.1
    fit = fit_response(x, y, se)
    design = torch.stack((x, x * x), dim=1)
    w = se.square().reciprocal()
    solution = torch.linalg.solve(design.T @ (w[:, None] * design), design.T @ (w * y))
    assert [fit.initial_slope, fit.curvature] == pytest.approx(solution.tolist(), rel=1e-9)
    assert fit.slope == pytest.approx(float((w * x * y).sum() / (w * x * x).sum()), rel=1e-12)
    center = (w * y).sum() / w.sum()
    r2 = 1 - (w * (y - design @ solution).square()).sum() / (w * (y - center).square()).sum()
    assert fit.quadratic_r2 == pytest.approx(float(r2), rel=1e-9)
    assert fit.quadratic_r2 >= fit.linear_r2


def test_the_initial_slope_is_the_first_order_change_of_a_real_policy():
    base = Policy(0.0).truth().entropy
    etas = [0.001, 0.002, 0.004]
    fit = fit_response(etas, [Policy(eta).truth().entropy - base for eta in etas])
    assert fit.initial_slope == pytest.approx(-1.444346804910938, rel=1e-5)  # the third order, η², is left out
    assert fit.linear_r2 > 0.9999


@pytest.mark.parametrize(
    ("etas", "deltas", "se", "message"),
    [
        ([1.0], [1.0], None, "two or more"),
        ([1.0, 1.0, 0.0], [1.0, 1.0, 0.0], None, "two or more"),
        ([1.0, 2.0], [1.0], None, "one length"),
        ([1.0, math.nan], [1.0, 2.0], None, "finite"),
        ([1.0, 2.0], [1.0, 2.0], [0.1, 0.0], "above 0"),
    ],
)
def test_fit_errors(etas, deltas, se, message):
    with pytest.raises(InputError, match=message):
        fit_response(etas, deltas, se)


# The noise floor ---------------------------------------------------------------------------------------------------


def null_scores(seed: int, n: int = 256, noise: float = 1e-3, shared: float = 0.0):
    """One policy scored twice with independent rounding noise of this size a token, plus what all tokens share."""
    g = torch.Generator().manual_seed(seed)
    lp = -0.1 - torch.rand(n, 20, generator=g, dtype=torch.float64)
    h = torch.rand(n, 20, generator=g, dtype=torch.float64)
    mask = torch.ones(n, 20, dtype=torch.bool)
    again = lp + noise * torch.randn(n, 20, generator=g, dtype=torch.float64) - shared
    return PairedScores.from_tokens(lp, again, h, h.clone(), mask, mask, torch.arange(n) // 8)


@pytest.mark.parametrize("unit", ["sequence", "per_token"])
def test_the_same_layout_twice_is_exactly_zero(unit):
    floor = noise_floor(null_scores(0, noise=0.0), unit=unit)
    assert floor.floor == 0.0
    assert floor.exact
    assert floor.ess_fraction == 1.0
    assert floor.null.value == 0.0


def test_a_floor_in_the_unit_of_the_estimate():
    scores = null_scores(1)
    for unit in ("sequence", "per_token"):
        floor = noise_floor(scores, unit=unit)
        change = entropy_change(scores, unit=unit)
        assert floor.null.to_dict() == change.to_dict()
        assert floor.floor == pytest.approx(2 * max(abs(change.value), change.se), rel=1e-9)
        assert not floor.exact
    assert floor.log_weight_rms == pytest.approx(1e-3 * math.sqrt(20), rel=0.2)
    assert json.loads(json.dumps(floor.to_dict()))["exact"] is False


def test_the_floor_bounds_the_noise():
    """Of fresh nulls of the full size, about 95% lie within the floor that a subsample of an eighth foretold."""
    nulls = [abs(entropy_change(null_scores(1000 + i, n=1024)).value) for i in range(60)]
    inside = 0
    for i in range(60):
        floor = noise_floor(null_scores(i, n=128), n_full=1024)
        inside += nulls[i] <= floor.floor
    assert inside >= 52


def test_what_all_sequences_share_does_not_average_out():
    floor = noise_floor(null_scores(2, shared=1e-3), n_full=10**6)
    assert floor.floor > 1.5 * abs(floor.null.value)
    small = noise_floor(null_scores(2, shared=0.0), n_full=10**6)
    assert small.floor < 0.25 * floor.floor


def test_noise_errors():
    with pytest.raises(InputError, match="n_full"):
        noise_floor(null_scores(3), n_full=10)
    with pytest.raises(InputError, match="unit"):
        noise_floor(null_scores(3), unit="bits")


def test_one_prompt_falls_back_on_the_spread_within_it():
    scores = null_scores(4, n=8)
    floor = noise_floor(scores)
    assert math.isnan(floor.null.se)
    assert floor.floor == pytest.approx(2 * max(abs(floor.null.value), floor.null.se_fixed_prompts), rel=1e-9)
