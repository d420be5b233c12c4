"""Parts of the vocabulary: gradients filtered by mass, and heads split over several weights."""

import math

import pytest
import torch

import entropy_fast as ef
from entropy_fast.functional.linear_operators import implementation
from entropy_fast.functional.linear_shards import combine_shards, shard_gradients, shard_stats
from entropy_fast.reference.filtering import choose_slabs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def test_the_lightest_slabs_go_up_to_the_bound():
    mass = torch.tensor(
        [[0.5, 1e-3, 0.3], [0.2, 0.9, 0.3], [2e-3, 5e-4, 0.2], [0.298, 0.0985, 0.2]], dtype=torch.float64
    )
    kept, dropped = choose_slabs(mass.log(), torch.zeros(3), torch.tensor([0, 2, 1]), 0.21)
    # row 0: 0.002 goes, 0.2 with it is within the bound; row 1: its target's 0.0005 stays; row 2: one of two equal ones
    assert kept.tolist() == [[True, False, True], [False, True, True], [False, True, False], [True, False, True]]
    assert torch.allclose(dropped, torch.tensor([0.202, 0.0995, 0.2], dtype=torch.float64))


@pytest.mark.parametrize("bound", [1e-4, 1e-2, 0.3])
def test_chosen_slabs_hold_at_most_the_bound(bound):
    g = torch.Generator().manual_seed(0)
    logits = 6.0 * torch.randn(40, 300, generator=g, dtype=torch.float64)
    mass = torch.softmax(logits, 0)
    target = torch.randint(0, 40, (300,), generator=g)
    kept, dropped = choose_slabs(logits, logits.logsumexp(0), target, bound)
    assert torch.allclose(dropped, mass.masked_fill(kept, 0).sum(0))
    assert (dropped <= bound).all()
    assert kept.gather(0, target[None]).all()
    # and no slab more would fit, but for rows that keep nearly all, and then all
    spare = mass.masked_fill(~kept, 9.0).scatter(0, target[None], 9.0).amin(0)
    assert (kept.all(0) | (dropped + spare > bound)).all()


def test_a_row_that_would_keep_nearly_all_slabs_keeps_all():
    mass = torch.full((10, 3), 1e-4, dtype=torch.float64)
    for row, kept in enumerate((7, 8, 10)):
        mass[:kept, row] = 0.1
    kept, dropped = choose_slabs(mass.log(), torch.zeros(3), torch.zeros(3, dtype=torch.int64), 1e-3)
    assert kept.sum(0).tolist() == [7, 10, 10]
    assert torch.allclose(dropped, torch.tensor([3e-4, 0.0, 0.0], dtype=torch.float64))


def rollouts(device, dtype, vocab, rows=600, width=48):
    """Four in five rows nearly certain of their target, the others spread out, in random order."""
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(vocab, width, generator=g)
    targets = torch.randint(0, vocab, (rows,), generator=g)
    confident = torch.rand(rows, generator=g) < 0.8
    hidden = torch.where(confident[:, None], 0.6 * weight[targets], 0.4 * torch.randn(rows, width, generator=g))
    return hidden.to(dtype).to(device), weight.to(dtype).to(device), targets.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filtered_gradients(device, dtype):
    like = torch.empty(0, dtype=dtype, device=device)
    # the width of a slab is the device's and the dtype's: of fewer than two nothing could be dropped
    vocab = 4 * implementation(like, "exact").filter_columns(like.device) + 808
    hidden, weight, targets = rollouts(device, dtype, vocab)
    g = torch.Generator().manual_seed(6)
    weights = torch.randn(2, len(targets), generator=g).to(device)

    def gradients(bound):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = ef.linear_token_stats(h, w, targets, max_dropped_mass=bound)
        return out, torch.autograd.grad((out.logprob * weights[0] + out.entropy * weights[1]).sum(), [h, w])

    exact, expected = gradients(0.0)
    filtered, got = gradients(1e-3)
    # not bit for bit: unfiltered, a slab may be wider
    assert (filtered.logprob - exact.logprob).abs().max() <= 1e-5
    assert filtered.dropped_mass.max() <= 1e-3
    assert filtered.dropped_mass.max() > 0
    # dropped: dz of mass ≤ 1e-3 a row, weighted by |log p + H| ≲ log of the vocabulary for the entropy
    for a, e in zip(got, expected, strict=True):
        assert (a.double() - e.double()).norm() <= 1e-3 * (1 + math.log(vocab)) * e.double().norm()


@pytest.mark.parametrize("device", DEVICES)
def test_filtered_with_a_mask_and_nothing_to_drop(device):
    hidden, weight, targets = rollouts(device, torch.float32, 700, rows=50)
    mask = torch.arange(50, device=device) % 2 == 0
    h, e = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    out = ef.linear_token_stats(h, weight, targets, mask=mask, max_dropped_mass=1e-12)
    assert not out.dropped_mass[~mask].any()
    out.logprob.sum().backward()
    ef.linear_token_stats(e, weight, targets, mask=mask).logprob.sum().backward()
    assert (h.grad - e.grad).abs().max() <= 1e-5 * e.grad.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "scale": 0.3, "softcap": 5.0}])
def test_shards_add_up_to_the_whole(device, options):
    g = torch.Generator().manual_seed(7)
    hidden = torch.randn(33, 40, generator=g).to(device)
    weight = (0.4 * torch.randn(1000, 40, generator=g)).to(device)
    targets = torch.randint(0, 1000, (33,), generator=g).to(device)
    bias = torch.randn(1000, generator=g).to(device)
    if "softcap" not in options:
        bias[300:650] = -math.inf
        targets = torch.where((targets >= 300) & (targets < 650), targets % 300, targets)
    h, w, b = (t.clone().requires_grad_() for t in (hidden, weight, bias))
    whole = ef.linear_token_stats(h, w, targets, b, return_lse=True, **options)
    upstream = torch.randn(2, 33, generator=g).to(device)
    expected = torch.autograd.grad((whole.logprob * upstream[0] + whole.entropy * upstream[1]).sum(), [h, w, b])
    edges = [(0, 300), (300, 640), (640, 641), (641, 1000)]
    parts = [shard_stats(hidden, weight[i:j], targets, bias[i:j], start=i, **options) for i, j in edges]
    stats = combine_shards(parts)
    assert (stats.logprob - whole.logprob).abs().max() < 1e-5
    assert (stats.entropy - whole.entropy).abs().max() < 1e-5
    assert (stats.peak + stats.log_sum - whole.lse).abs().max() < 1e-5
    shares = [
        shard_gradients(
            hidden,
            weight[i:j],
            targets,
            bias[i:j],
            start=i,
            stats=stats,
            grad_logprob=upstream[0],
            grad_entropy=upstream[1],
            **options,
        )
        for i, j in edges
    ]
    got = (sum(s.hidden for s in shares), torch.cat([s.weight for s in shares]), torch.cat([s.bias for s in shares]))
    for a, e in zip(got, expected, strict=True):
        assert (a - e).norm() <= 1e-5 * e.norm()


def test_a_target_in_no_shard_is_nan():
    hidden, weight = torch.randn(2, 4), torch.randn(10, 4)
    parts = [shard_stats(hidden, weight[i : i + 5], torch.tensor([3, 12]), start=i) for i in (0, 5)]
    stats = combine_shards(parts)
    assert torch.isfinite(stats.entropy).all()
    assert stats.logprob.isnan().tolist() == [False, True]
