"""The noise floor: exactly nothing in the same layout, and what bf16 really does in another."""

import copy

import torch
from tiny_models import tiny

from entropy_fast import Rollouts
from entropy_fast.calibration import calibrate
from entropy_fast.change import measure_change, measure_noise_floor
from entropy_fast.config import Config
from entropy_fast.scoring import Scoring, score


def rollouts(n=24, length=20):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(length // 2, length, (n,), generator=g).tolist()
    ids = torch.randint(3, 100, (n, length), generator=g).tolist()
    return Rollouts.from_lists(
        [[5, 6]] * n, [row[:k] for row, k in zip(ids, lengths, strict=True)], [i // 4 for i in range(n)]
    )


def test_the_same_layout_gives_exactly_zero():
    model, r = tiny("llama", dtype=torch.bfloat16), rollouts()
    first = score(model, r)
    second = score(model, r, layout=first.layout)
    change = measure_change(r, first, second)
    assert {name: estimate.value for name, estimate in change.estimates.items()} == dict.fromkeys(change.estimates, 0.0)
    assert change.diagnostics.ess == len(r)


def test_float32_is_quieter_than_bf16_and_the_gap_is_that_to_float64():
    model, r = tiny("llama", dtype=torch.bfloat16), rollouts()
    noise = {n.precision: n for n in calibrate(model, r)}
    exact = score(copy.deepcopy(model).double(), r)
    low = score(model, r)
    assert noise["float32"].repeatable
    assert noise["as_loaded"].repeatable
    assert noise["float32"].gap_to_float32 is None
    truth = float((low.S - exact.S).square().mean().sqrt())
    # float32 itself is within 1e-4 of float64 on these 20 tokens
    assert abs(noise["as_loaded"].gap_to_float32 - truth) < 1e-3
    assert truth > 0.01
    assert noise["float32"].log_weight_rms < 1e-4
    assert set(noise["float32"].floors) == {
        f"{unit}/{integrand}" for unit in ("sequence", "per_token") for integrand in ("sampled", "rao_blackwell")
    }


def test_the_cheap_floor_takes_whole_prompts_and_the_switch_works():
    model, r = tiny("llama", dtype=torch.bfloat16), rollouts(n=160)
    config = Config()
    scoring = Scoring.from_config(config, model)
    original = score(model, r, scoring)
    cheap = measure_noise_floor(model, r, original, config, scoring)
    assert 48 <= cheap.null.n_sequences <= 80
    assert cheap.null.n_sequences == 4 * cheap.null.n_prompts
    full = measure_noise_floor(model, r, original, config.override(["importance_sampling.noise_floor=full"]), scoring)
    assert full.null.n_sequences == 160
    off = config.override(["importance_sampling.noise_floor=none"])
    assert measure_noise_floor(model, r, original, off, scoring) is None
