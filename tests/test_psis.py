"""PSIS against the stored answers of arviz-stats, against arviz-stats itself on fresh vectors, and at its edges."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats

from entropy_fast.errors import EntropyFastWarning, InputError
from entropy_fast.psis import khat_threshold, psislw, tail_length

CASES = json.loads((Path(__file__).parent / "data" / "psis_reference.json").read_text())["cases"]
TOLERANCE = 1e-8


def reference_input(case: dict) -> torch.Tensor:
    if case["log_weights"] is not None:
        values = [float(value) for value in case["log_weights"]]
    else:
        kind, n, parameter = case["formula"]
        u = [math.fmod((i + 0.5) * 0.6180339887498949, 1.0) for i in range(n)]
        normal = statistics.NormalDist()
        values = [
            -parameter * math.log1p(-x) if kind == "pareto" else parameter * normal.inv_cdf(x) - parameter**2 / 2
            for x in u
        ]
    return torch.tensor(values, dtype=torch.float64)


def degenerate(case: dict) -> bool:
    return case["error"] is not None or case["log_normalizer"] is None


@pytest.mark.parametrize("case", [c for c in CASES if not degenerate(c)], ids=lambda c: c["name"])
def test_reference_vector(case):
    x = reference_input(case)
    smoothed, khat = psislw(x, r_eff=case["r_eff"])
    assert float(khat) == pytest.approx(float(case["khat"]), abs=TOLERANCE)
    if case.get("smoothed_normalized") is not None:
        expected = torch.tensor([float(value) for value in case["smoothed_normalized"]], dtype=torch.float64)
    else:
        expected = x - float(case["log_normalizer"])
        tail = [float(value) for value in case["tail_smoothed_normalized"]]
        expected[case["tail_index_ascending"]] = torch.tensor(tail, dtype=torch.float64)
    torch.testing.assert_close(smoothed, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", [c for c in CASES if degenerate(c)], ids=lambda c: c["name"])
def test_degenerate_reference_vector(case):
    x = reference_input(case)
    with pytest.warns(EntropyFastWarning, match="unsmoothed"):
        smoothed, khat = psislw(x, r_eff=case["r_eff"])
    assert math.isinf(khat)
    torch.testing.assert_close(smoothed, x.log_softmax(dim=0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [25, 31, 100, 224, 225, 226, 999, 20_011])
@pytest.mark.parametrize("spread", [1e-5, 0.3, 4.0])
def test_agrees_with_arviz_on_fresh_vectors(n, spread):
    generator = np.random.default_rng([n, int(spread * 1e5)])
    for draw in (generator.standard_normal, lambda size: generator.standard_t(3, size), generator.exponential):
        for r_eff in (1.0, 0.37, 1.9):
            x = spread * (draw(size=n) if draw is not generator.exponential else draw(1.0, n))
            expected, expected_k = array_stats.psislw(-x, r_eff=r_eff)
            smoothed, khat = psislw(torch.from_numpy(x), r_eff=r_eff)
            assert float(khat) == pytest.approx(expected_k, abs=TOLERANCE)
            np.testing.assert_allclose(smoothed.numpy(), expected, atol=TOLERANCE, rtol=0)


def test_ties_inside_and_at_the_edge_of_the_tail_agree_with_arviz_as_sets():
    # which of two equal weights counts as the larger is arbitrary, so only the sorted values can agree
    generator = np.random.default_rng(7)
    for _ in range(20):
        x = np.round(generator.standard_normal(400), 1)
        expected, expected_k = array_stats.psislw(-x)
        smoothed, khat = psislw(torch.from_numpy(x))
        assert float(khat) == pytest.approx(expected_k, abs=TOLERANCE)
        np.testing.assert_allclose(smoothed.sort().values.numpy(), np.sort(expected), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("x", "why"),
    [
        ([0.0], "one weight"),
        ([0.3, -1.0, 2.0], "three weights"),
        ([-700.0] * 40, "all equal"),
        ([0.0] * 90 + [1.0] * 10, "most of the tail ties with the cutoff"),
        ([0.0] * 60 + [1.0] * 40, "an equal tail"),
        ([-math.inf] * 95 + [0.1, 0.2, 0.3, 0.4, 0.5], "zeros reach into the tail"),
        ([1000.0 * i for i in range(100)], "all but one underflow"),
    ],
)
def test_an_unfit_tail_leaves_the_weights_raw(x, why):
    x = torch.tensor(x, dtype=torch.float64)
    with pytest.warns(EntropyFastWarning):
        smoothed, khat = psislw(x)
    assert khat == math.inf, why
    torch.testing.assert_close(smoothed, x.log_softmax(dim=0), atol=1e-12, rtol=0)


def test_zeros_below_the_tail_stay_zero():
    x = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[::7] = -math.inf
    smoothed, khat = psislw(x)
    assert torch.isfinite(khat)
    assert bool((smoothed[::7] == -math.inf).all())
    assert float(smoothed.logsumexp(dim=0)) == pytest.approx(0.0, abs=1e-12)


def test_invariances():
    x = 2 * torch.randn(5, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    smoothed, khat = psislw(x)
    assert smoothed.shape == x.shape
    assert smoothed.dtype == khat.dtype == torch.float64
    shifted, shifted_k = psislw(x + 12345.0)  # a shift costs the rounding of x + 12345, 1e-12
    torch.testing.assert_close(shifted, smoothed, atol=1e-10, rtol=0)
    assert float(shifted_k) == pytest.approx(float(khat), abs=1e-9)
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(2))
    permuted, permuted_k = psislw(x.flatten()[order])
    torch.testing.assert_close(permuted, smoothed.flatten()[order], atol=1e-12, rtol=0)
    assert float(permuted_k) == pytest.approx(float(khat), abs=1e-12)
    # smoothing never exceeds the raw maximum, keeps the order, and leaves what is below the tail alone
    normalizer = (x - smoothed).flatten().median()
    assert float((smoothed + normalizer).max()) <= float(x.max()) + 1e-9
    assert bool((smoothed.flatten()[x.flatten().argsort()].diff() >= -1e-12).all())


def test_the_input_is_left_alone_and_needs_no_gradient():
    x = torch.randn(100, dtype=torch.float32, generator=torch.Generator().manual_seed(3), requires_grad=True)
    before = x.detach().clone()
    smoothed, _ = psislw(x)
    assert not smoothed.requires_grad
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_plus_infinity_are_errors(bad):
    x = torch.zeros(50)
    x[3] = bad
    with pytest.raises(InputError, match="NaN"):
        psislw(x)


def test_other_input_errors():
    with pytest.raises(InputError, match="at least one weight"):
        psislw(torch.full((30,), -math.inf))
    with pytest.raises(InputError, match="at least one weight"):
        psislw(torch.empty(0))
    with pytest.raises(InputError, match="r_eff"):
        psislw(torch.zeros(30), r_eff=0.0)
    with pytest.raises(InputError, match="mask"):
        psislw(torch.zeros(30, dtype=torch.bool))


def test_tail_length_and_threshold():
    assert [tail_length(n) for n in (24, 25, 225, 226, 1000, 10**6)] == [4, 5, 45, 45, 94, 3000]
    assert tail_length(1000, r_eff=0.25) == 189
    assert khat_threshold(10) == pytest.approx(0.0)
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(10**6) == 0.7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu_as_on_the_cpu():
    for n in (24, 30, 1000, 10**6):
        x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            smoothed, khat = psislw(x)
            on_gpu, khat_gpu = psislw(x.cuda())
        assert on_gpu.is_cuda
        assert khat_gpu.is_cuda
        torch.testing.assert_close(on_gpu.cpu(), smoothed, atol=1e-10, rtol=0)
        torch.testing.assert_close(khat_gpu.cpu(), khat, atol=1e-10, rtol=0)
