"""The fused-linear kernels without a GPU: run by Triton's interpreter, and compiled for the GPUs they are meant for.

Triton reads TRITON_INTERPRET when it is imported, so the interpreted half of this file runs in a process of its own,
started by `test_in_the_interpreter`. The interpreter has no bf16 products; fp16 and float32 stand for it.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from without_gpu import DEVICES, GPUS, compiled_for, compiles, interpreted, run_interpreted, stack_bytes, starter

triton = pytest.importorskip("triton")


@starter
def test_in_the_interpreter():
    run_interpreted(__file__)


def oracle(hidden, weight, targets, bias, transform):
    z = transform.scale * (hidden @ weight.T + (0.0 if bias is None else bias))
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    logp = torch.log_softmax(z / transform.temperature, -1)
    p = logp.exp()
    entropy = -(p * torch.where(p > 0, logp, 0.0)).sum(-1)
    return logp.gather(-1, targets[:, None])[:, 0], entropy, torch.logsumexp(z / transform.temperature, -1)


@interpreted
@pytest.mark.parametrize(("tma", "dtype"), [(True, torch.float16), (True, torch.float32), (False, torch.float16)])
@pytest.mark.parametrize(
    ("rows", "width", "vocab", "bias", "options"),
    [(5, 48, 70, False, ()), (18, 37, 33, True, ()), (3, 16, 97, True, (0.7, 0.3, 5.0))],
)
def test_both_directions(tma, dtype, rows, width, vocab, bias, options, monkeypatch):
    from entropy_fast.kernels import linear_backward, linear_operands, linear_slabs
    from entropy_fast.kernels.linear_forward import linear_stats
    from entropy_fast.reference.rows import RowGradients
    from entropy_fast.reference.transform import Transform

    monkeypatch.setattr(linear_operands, "INTERPRETED", dataclasses.replace(linear_operands.INTERPRETED, tma=tma))
    monkeypatch.setattr(linear_slabs, "SLAB_COLUMNS", 64)
    monkeypatch.setattr(linear_slabs, "SLAB_ENTRIES", 1)
    transform = Transform(*options)
    g = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=g).to(dtype)
    weight = (0.4 * torch.randn(vocab, width, generator=g)).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=g)
    b = torch.randn(vocab, generator=g).to(dtype) if bias else None
    exact = [t.double().requires_grad_() for t in (hidden, weight, b) if t is not None]
    expected = oracle(exact[0], exact[1], targets, exact[2] if bias else None, transform)
    stats, slab_lse = linear_stats(hidden, weight, targets, b, transform, filtered=True)
    assert (slab_lse.logsumexp(0) - stats.peak - stats.log_sum).abs().max() < 1e-5
    # float32 sums over the width, of terms near 1
    for got, e in zip((stats.logprob, stats.entropy, stats.peak + stats.log_sum), expected, strict=True):
        assert (got - e).abs().max() < 1e-5
    grads = RowGradients(*torch.randn(3, rows, generator=g))
    got = linear_backward.linear_backward(hidden, weight, targets, b, transform, stats, grads, (True, True, bias))
    loss = sum((weight_of * e).sum() for weight_of, e in zip(grads, expected, strict=True))
    # dz in fp16, or in pairs of bf16, and the result rounded once more
    bound = 2e-3 if dtype == torch.float16 else 3e-5
    for a, e in zip(got, torch.autograd.grad(loss, exact), strict=False):
        assert (a.double() - e).norm() <= bound * e.norm()


@interpreted
@pytest.mark.parametrize("needs_weight", [True, False])
def test_a_slab_may_lie_in_rows_of_the_gradient_that_are_still_to_come(needs_weight, monkeypatch):
    from entropy_fast.kernels import linear_backward, linear_slabs
    from entropy_fast.kernels.linear_forward import linear_stats
    from entropy_fast.reference.rows import RowGradients
    from entropy_fast.reference.transform import Transform

    monkeypatch.setattr(linear_slabs, "SLAB_COLUMNS", 64)
    monkeypatch.setattr(linear_slabs, "SLAB_ENTRIES", 1)
    monkeypatch.setattr(linear_slabs, "SLAB_COST", 0)
    monkeypatch.setattr(linear_slabs, "PITCH", 16)
    rooms = []
    original = linear_backward._slab_dlogits

    def watched(part, weight, bias, transform, room, tiling):
        rooms.append((len(weight), room.data_ptr(), room.data_ptr() + 2 * room.numel()))
        return original(part, weight, bias, transform, room, tiling)

    monkeypatch.setattr(linear_backward, "_slab_dlogits", watched)
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(6, 32, generator=g).half(), (0.4 * torch.randn(400, 32, generator=g)).half()
    targets = torch.randint(0, 400, (6,), generator=g)
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    expected = oracle(*exact, targets, None, Transform())
    stats, _ = linear_stats(hidden, weight, targets, None, Transform())
    grads = RowGradients(*torch.randn(3, 6, generator=g))
    needs = (True, needs_weight, False)
    got = linear_backward.linear_backward(hidden, weight, targets, None, Transform(), stats, grads, needs)
    loss = sum((weight_of * e).sum() for weight_of, e in zip(grads, expected, strict=True))
    for a, e in zip(got, torch.autograd.grad(loss, exact), strict=False):
        if a is not None:
            assert (a.double() - e).norm() <= 2e-3 * e.norm()
    # rows of dWeight that a slab's dz takes: 6 · (320 + 16) / 32 = 63, or 15
    widths = [320, 64, 16] if needs_weight else [64] * 6 + [16]
    assert [columns for columns, *_ in rooms] == widths
    if needs_weight:
        start = got.weight.data_ptr()
        ends = [start + 2 * 32 * row for row in itertools.accumulate(widths)]
        assert all(end <= first < last <= ends[-1] for end, (_, first, last) in zip(ends[:-1], rooms[:-1], strict=True))
        assert not start <= rooms[-1][1] < ends[-1]


@interpreted
@pytest.mark.parametrize(
    ("rows", "width", "vocab", "options", "tma", "needs", "spare", "saved"),
    [
        (30, 32, 400, (), True, (True, True, True), None, 4),
        (30, 32, 400, (0.7, 0.3, 5.0), False, (True, True, True), None, 4),
        (30, 32, 400, (), True, (True, False, False), None, 4),
        (30, 32, 400, (), True, (False, True, False), None, 4),
        # more rows than the width, and fewer; a memory that ends anywhere; one too small
        (70, 24, 397, (1.3,), True, (True, True, True), None, 1),
        (5, 48, 397, (1.3,), False, (True, True, True), None, 11),
        (300, 16, 130, (), True, (True, True, True), None, 0),
        # memory to spare: for a part, for everything, for nothing; a head that is frozen
        (30, 32, 400, (), True, (True, True, True), 10_000, 1),
        (30, 32, 397, (0.7, 0.3, 5.0), True, (True, False, False), 10**6, 1),
        (30, 32, 400, (), True, (True, False, False), 100, 0),
    ],
)
def test_exponentials_saved_where_the_gradient_will_be(
    rows, width, vocab, options, tma, needs, spare, saved, monkeypatch
):
    from entropy_fast.kernels import linear_backward, linear_operands, linear_slabs
    from entropy_fast.kernels.linear_forward import linear_stats
    from entropy_fast.reference.rows import RowGradients
    from entropy_fast.reference.transform import Transform

    monkeypatch.setattr(linear_operands, "INTERPRETED", dataclasses.replace(linear_operands.INTERPRETED, tma=tma))
    monkeypatch.setattr(linear_slabs, "SLAB_COLUMNS", 64)
    monkeypatch.setattr(linear_slabs, "SLAB_ENTRIES", 1)
    monkeypatch.setattr(linear_slabs, "SLAB_COST", 0)
    monkeypatch.setattr(linear_slabs, "PITCH", 16)
    made, original = [], linear_backward.saved_dlogits
    monkeypatch.setattr(linear_backward, "saved_dlogits", lambda *a: made.append(1) or original(*a))
    transform = Transform(*options)
    g = torch.Generator().manual_seed(rows)
    hidden = (3 * torch.randn(rows, width, generator=g)).half()
    weight, bias = (0.4 * torch.randn(vocab, width, generator=g)).half(), torch.randn(vocab, generator=g).half()
    # a target that is certain, one beyond what fp16 holds below the peak, and a token that cannot be
    targets = torch.randint(0, vocab, (rows,), generator=g)
    bias[7], bias[3], targets[:2] = 40.0, -math.inf, torch.tensor([7, 9])
    exact = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    expected = oracle(exact[0], exact[1], targets, exact[2], transform)
    memory = torch.full_like(weight, math.nan)
    if spare is not None:
        memory = torch.full_like(linear_slabs.spare_memory(spare, hidden, vocab), math.nan)
        assert memory.nbytes <= spare
    stats, _ = linear_stats(hidden, weight, targets, bias, transform, memory=memory)
    plain, _ = linear_stats(hidden, weight, targets, bias, transform)
    assert all(torch.equal(a, b) for a, b in zip(stats, plain, strict=True))
    grads = RowGradients(*torch.randn(3, rows, generator=g))
    got = linear_backward.linear_backward(hidden, weight, targets, bias, transform, stats, grads, needs, memory=memory)
    loss = sum((weight_of * e).sum() for weight_of, e in zip(grads, expected, strict=True))
    for a, e, needed in zip(got, torch.autograd.grad(loss, exact), needs, strict=True):
        assert (a is not None) == needed
        if needed:
            assert (a.double() - e).norm() <= 2e-3 * e.norm()
    assert len(made) == saved
    if needs[1] and spare is None:
        assert got.weight.data_ptr() == memory.data_ptr()


@pytest.mark.parametrize(
    ("rows", "width", "vocab", "lent", "own"),
    [
        (8192, 4096, 128256, [42240, 25344, 16896] + [8448] * 3 + [5888], [4352, 4352, 3840]),
        (
            *(8192, 2304, 256000),
            [50688, 42240, 33792, 25344] + [16896] * 2 + [8448] * 4 + [7680, 6144, 4864],
            [4608, 4608, 4608, 3840],
        ),
        # of few rows as much dz, and of many rows nothing that dWeight could hold often enough
        (1024, 4096, 128256, [67584, 48384], [12288]),
        (32768, 4096, 128256, [], [8448] * 15 + [1536]),
    ],
)
def test_slabs_of_a_large_head(rows, width, vocab, lent, own):
    from entropy_fast.kernels.linear_operands import HOPPER
    from entropy_fast.kernels.linear_slabs import PITCH, Rows, all_slabs

    hidden, d_weight = (torch.empty(n, width, dtype=torch.bfloat16, device="meta") for n in (rows, vocab))
    of_rows = Rows(hidden, None, torch.empty(rows, dtype=torch.int64, device="meta"), None)
    slabs = list(all_slabs(of_rows, vocab, HOPPER, d_weight))
    assert [slab.columns.start for slab in slabs[1:]] + [vocab] == [slab.columns.stop for slab in slabs]
    assert [slab.columns.stop - slab.columns.start for slab in slabs] == lent + own
    for columns, _, _, room, _ in slabs[: len(lent)]:
        assert room._base is d_weight
        assert room.storage_offset() >= columns.stop * width
        assert room.storage_offset() + room.numel() <= d_weight.numel()
        assert room.numel() == rows * (columns.stop - columns.start + PITCH)
    for slab in slabs[len(lent) :]:
        assert slab.room._base is None
        assert slab.room.numel() == rows * (own[0] + PITCH)


@interpreted
@pytest.mark.parametrize("backward_memory", ["gradient", 10_000, 2**40])
def test_autograd_with_exponentials_saved(backward_memory, monkeypatch):
    import entropy_fast as ef
    from entropy_fast.functional import linear_operators, linear_saving
    from entropy_fast.kernels import linear, linear_backward, linear_slabs

    for module in (linear_operators, linear_saving):
        monkeypatch.setattr(module, "implementation", lambda hidden, precision: linear)
    monkeypatch.setattr(linear_slabs, "SLAB_COLUMNS", 64)
    made, original = [], linear_backward.saved_dlogits
    monkeypatch.setattr(linear_backward, "saved_dlogits", lambda *a: made.append(1) or original(*a))
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 6, 32, generator=g).half().requires_grad_()
    weight = (0.4 * torch.randn(300, 32, generator=g)).half().requires_grad_()
    targets, mask = torch.randint(0, 300, (2, 6), generator=g), torch.rand(2, 6, generator=g) < 0.7
    upstream = torch.randn(3, 2, 6, generator=g)

    def step(function, *tensors):
        out = function(*tensors)
        loss = sum((w * mask * o).sum() for w, o in zip(upstream, out, strict=True))
        gradients = torch.autograd.grad(loss, tensors[:2], retain_graph=True)
        used = len(made)
        return out, gradients, torch.autograd.grad(loss, tensors[:2]), used, len(made)

    def saving(h, w):
        return ef.linear_token_stats(h, w, targets, mask=mask, return_lse=True, backward_memory=backward_memory)

    def exact(h, w):
        return [t.view(2, 6) for t in oracle(h.view(12, 32), w, targets.view(12), None, Transform())]

    from entropy_fast.reference.transform import Transform

    out, first, again, used, used_twice = step(saving, hidden, weight)
    assert used_twice == used > 0
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected, gradients, *_ = step(exact, *wide)
    for got, e in zip(out, expected, strict=True):
        assert (got - mask * e).abs().max() < 1e-5
    for a, b, e in zip(first, again, gradients, strict=True):
        assert (a.double() - e).norm() <= 2e-3 * e.norm()
        assert (b.double() - e).norm() <= 2e-3 * e.norm()
    # a head that needs no gradient has no memory to lend, and nothing is left where there is no backward
    made.clear()
    ef.linear_token_stats(hidden, weight.detach(), targets, backward_memory=backward_memory).logprob.sum().backward()
    assert bool(made) == (backward_memory != "gradient")
    with torch.no_grad():
        assert ef.linear_token_stats(hidden, weight, targets, backward_memory=backward_memory).logprob.grad_fn is None


@pytest.mark.parametrize(
    ("rows", "width", "vocab", "slabs"),
    [(8192, 4096, 128256, 7), (8192, 2304, 256000, 8), (8192, 1024, 151936, 1), (1000, 4096, 128256, 1)],
)
def test_what_is_saved_stays_until_it_is_used(rows, width, vocab, slabs):
    from entropy_fast.kernels.linear_operands import HOPPER
    from entropy_fast.kernels.linear_slabs import Rows, all_slabs, saved_in

    memory = torch.empty(vocab, width, dtype=torch.bfloat16, device="meta")
    saved = saved_in(memory, vocab, rows, HOPPER)
    hidden = torch.empty(rows, width, dtype=torch.bfloat16, device="meta")
    of_rows = Rows(hidden, None, torch.empty(rows, dtype=torch.int64, device="meta"), None)
    plan = list(all_slabs(of_rows, vocab, HOPPER, memory, saved))
    assert [s.saved is not None for s in plan] == [True] * slabs + [False] * (len(plan) - slabs)
    assert [s.columns.start for s in plan[1:]] + [vocab] == [s.columns.stop for s in plan]
    peaks = 2 * saved.peaks.storage_offset()
    assert peaks + 2 * saved.peaks.numel() <= memory.numel()
    for slab in plan[:slabs]:
        exponentials = slab.saved[0]
        assert exponentials.shape[0] >= rows
        # the gradient's rows of this slab end before its dz, which ends before the peaks
        assert slab.columns.stop * width <= exponentials.storage_offset()
        assert exponentials.storage_offset() + exponentials.numel() <= peaks
    starts = [s.saved[0].storage_offset() for s in plan[:slabs]]
    assert [b - a for a, b in itertools.pairwise(starts)] == [plan[0].saved[0].numel()] * (slabs - 1)


def selected(pattern, slabs, rows):
    """(slabs, rows), which rows' dz a slab computes; a fifth of the rows are in every slab, unless said otherwise."""
    kept = torch.rand(slabs, rows) < 0.2
    lead = torch.rand(rows) < 0.2
    if pattern == "all":
        return torch.ones_like(kept)
    if pattern == "none":
        return torch.zeros_like(kept)
    if pattern == "lead alone":
        return lead.expand(slabs, rows).clone()
    if pattern == "one slab taken by most":
        kept[1] |= torch.rand(rows) < 0.8
    if pattern == "slabs taken by the lead alone":
        kept[[0, 3]] = False
    if pattern == "slabs taken by nobody":
        kept[[1, slabs - 1]] = False
        return kept
    if pattern == "no lead":
        kept[torch.arange(rows) % slabs, torch.arange(rows)] = False
        return kept
    return kept | lead


def filtered_problem(pattern, device, dtype, options, rows=None):
    """Arguments of `linear_backward` up to `needs`, `kept`, and the gradients by the definition, in float64."""
    from entropy_fast.kernels.linear import filter_columns
    from entropy_fast.reference.linear import LinearStats
    from entropy_fast.reference.rows import RowGradients
    from entropy_fast.reference.transform import Transform

    slabs, columns, transform = 4, filter_columns(torch.device(device)), Transform(*options)
    rows = {"cpu": 20, "cuda": 300}[device] if rows is None else rows
    vocab = slabs * columns - 27
    hidden, bias = torch.randn(rows, 24).to(dtype), torch.randn(vocab).to(dtype)
    weight, targets = (0.4 * torch.randn(vocab, 24)).to(dtype), torch.randint(0, vocab, (rows,))
    kept, upstream = selected(pattern, slabs, rows), torch.randn(3, rows)
    raw = (hidden.double() @ weight.double().T + bias.double()).requires_grad_()
    z = transform.scale * raw
    z = (z if transform.softcap is None else transform.softcap * torch.tanh(z / transform.softcap)) / options[0]
    logp = z.log_softmax(1)
    logprob, entropy, lse = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1), z.logsumexp(1)
    (dz,) = torch.autograd.grad((upstream[0] * logprob + upstream[1] * entropy + upstream[2] * lse).sum(), [raw])
    dz *= kept.T.repeat_interleave(columns, 1)[:, :vocab]
    expected = dz @ weight.double(), dz.T @ hidden.double(), dz.sum(0)
    peak = z.amax(1)
    stats = LinearStats(*(t.detach().float().to(device) for t in (logprob, entropy, peak, lse - peak)))
    inputs = (t.to(device) for t in (hidden, weight, targets, bias))
    arguments = (*inputs, transform, stats, RowGradients(*upstream.to(device)))
    return arguments, kept.to(device), [t.to(device) for t in expected]


# dz and the result in 16 bits, or dz in pairs of bf16
BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 3e-5}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("pattern", "dtype", "options"),
    [
        ("mixed", torch.float16, (0.7, 0.3, 5.0)),
        ("mixed", torch.float32, (0.7, 0.3, 5.0)),
        ("mixed", torch.bfloat16, (1.0,)),
        ("all", torch.float16, (1.0,)),
        ("none", torch.float16, (1.0,)),
        ("lead alone", torch.float16, (1.0,)),
        ("no lead", torch.float16, (1.0,)),
        ("no lead", torch.bfloat16, (1.0,)),
        ("one slab taken by most", torch.float16, (1.0,)),
        ("slabs taken by the lead alone", torch.float32, (1.0,)),
        ("slabs taken by nobody", torch.float16, (0.7,)),
        ("slabs taken by nobody", torch.float32, (0.7,)),
    ],
)
def test_rows_kept_slab_by_slab(device, pattern, dtype, options):
    from entropy_fast.kernels.linear import filter_columns, linear_backward

    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bf16 products")
    arguments, kept, expected = filtered_problem(pattern, device, dtype, options)
    got = linear_backward(*arguments, (True, True, True), kept)
    for a, e in zip(got, expected, strict=True):
        assert a.dtype == dtype
        assert (a.double() - e).norm() <= BOUNDS[dtype] * e.norm()
    # what no slab takes is 0, not nearly 0
    assert not got.hidden[~kept.any(0)].any()
    unused = (~kept.any(1)).repeat_interleave(filter_columns(kept.device))[: len(got.bias)]
    assert not got.weight[unused].any()
    assert not got.bias[unused].any()


@pytest.mark.parametrize("device", DEVICES)
def test_filtered_gradients_come_alone_and_with_the_same_bits(device):
    from entropy_fast.kernels.linear import linear_backward

    arguments, kept, _ = filtered_problem("mixed", device, torch.float16, (1.0,))
    together = linear_backward(*arguments, (True, True, True), kept)
    for i in range(3):
        alone = linear_backward(*arguments, tuple(i == j for j in range(3)), kept)
        assert [t is None for t in alone] == [i != j for j in range(3)]
        assert torch.equal(alone[i], together[i])


@interpreted
def test_a_row_that_every_slab_takes_is_gathered_once(monkeypatch):
    from entropy_fast.kernels.linear import linear_backward

    arguments, kept, _ = filtered_problem("mixed", "cpu", torch.float16, (1.0,))
    gathered, original = [], torch.index_select

    def watched(x, dim, index, *, out):
        gathered.append((x.dtype, len(index)))
        return original(x, dim, index, out=out)

    monkeypatch.setattr(torch, "index_select", watched)
    linear_backward(*arguments, (True, True, False), kept)
    lead = kept.all(0).sum().item()
    assert 0 < lead < kept.shape[1]
    others = [n - lead for n in kept.sum(1).tolist() if n > lead]
    # the first slab's come with the lead
    assert [n for dtype, n in gathered if dtype == torch.float16] == others[1:]
    # of dHidden's sums
    assert [n for dtype, n in gathered if dtype == torch.float32] == others


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", ["all", "logprob alone, expanded", "entropy alone, strided", "lse alone, float64"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_dz_needs_of_a_row(device, given, softcap):
    """Against the formulas in float64; a certain target keeps the digits of 1 − p, one that is impossible has p = 0."""
    from entropy_fast.kernels.linear_dlogits import row_coefficients
    from entropy_fast.reference.linear import LinearStats
    from entropy_fast.reference.rows import RowGradients
    from entropy_fast.reference.transform import Transform

    rows, transform = 301, Transform(1.7, 0.3, softcap)
    g = torch.Generator().manual_seed(3)
    logprob = -torch.rand(rows, generator=g).mul(30).sub(24).exp()
    # no logit is out of a softcap's reach
    logprob[:4] = torch.tensor([-1e-9, -0.0, -3.0 if softcap else -math.inf, math.nan])
    stats = LinearStats(logprob, *torch.rand(3, rows, generator=g))
    upstream = torch.randn(3, rows, generator=g)
    grads = {
        "all": RowGradients(*upstream),
        "logprob alone, expanded": RowGradients(torch.tensor(-0.7).expand(rows), None, None),
        "entropy alone, strided": RowGradients(None, upstream.T.contiguous()[:, 1], None),
        "lse alone, float64": RowGradients(None, None, upstream[2].double()),
    }[given]
    to = lambda tensors: type(tensors)(*(None if t is None else t.to(device) for t in tensors))  # noqa: E731
    gain = torch.tensor(2.0**5)
    got = row_coefficients(to(stats), to(grads), transform, gain.to(device))

    logp, entropy, peak, log_sum = (t.double() for t in stats)
    g_logprob, g_entropy, g_lse = (torch.zeros(rows).double() if t is None else t.double() for t in grads)
    p, outer = logp.exp(), transform.factor * (transform.squeeze or 1.0) * 2.0**5
    plogp = torch.where(p > 0, p * logp, 0.0)
    terms = {
        "lse": [(peak + log_sum) / math.log(2)],
        "constant": [g_logprob * outer, -g_lse * outer, g_entropy * entropy * outer],
        "slope": [g_entropy * math.log(2) * outer],
        "target": [
            *(-g_logprob * logp.expm1() * outer, g_lse * p * outer),
            *(-g_entropy * plogp * outer, -g_entropy * p * entropy * outer),
        ],
    }
    if softcap:
        core = (logp + peak + log_sum) / transform.factor
        terms["target"] += [-t * core**2 for t in terms["target"]]
    assert (got.slope is None) == (grads.entropy is None)
    # a row without its target has no gradient to give
    assert got.constant[3].isnan()
    live = torch.arange(rows) != 3
    # a few roundings of each term, and that of the exponent of p
    relative = 1e-6 + 1.2e-7 * logp.clamp(min=-1e4).abs()
    for name, summands in terms.items():
        a = getattr(got, name)
        if a is not None:
            bound = relative * sum(t.abs() for t in summands) + 1e-30
            assert ((a.cpu().double() - sum(summands)).abs() <= bound)[live].all(), name


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_filter(device):
    from entropy_fast.kernels.linear import linear_backward

    arguments, kept, expected = filtered_problem("mixed", device, torch.float32, (1.0,), rows=0)
    got = linear_backward(*arguments, (True, True, True), kept)
    for a, e in zip(got, expected, strict=True):
        assert a.shape == e.shape
        assert not a.any()


@interpreted
def test_halves_carry_22_bits():
    from entropy_fast.kernels.linear_operands import split_halves

    x = torch.randn(7, 70) * torch.tensor([1e-30, 1e-4, 1.0, 3e3, 1e20, 0.0, 1.0])[:, None]
    halves, scale = split_halves(x)
    low, high = halves.double().split(128, dim=1)
    assert not low[:, 70:].any()
    error = (scale[:, None].double() * (low + high)[:, :70] - x.double()).abs()
    assert (error <= 2.0**-22 * x.double().abs() + 2.0**-38 * x.double().abs().amax(1, keepdim=True)).all()


def _compile(kernel, signature, constants, target, gluon=False, **options):
    from triton.compiler import ASTSource

    if gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    signature = signature | {name: "constexpr" for name in constants}
    source = ASTSource(fn=kernel, signature={n: signature[n] for n in kernel.arg_names}, constexprs=constants, attrs={})
    return triton.compile(source, target=target, options=options)


FORWARD_SCALARS = {"N": "i32", "C": "i32", "K": "i32", "n_units": "i32", "factor": "fp32", "squeeze": "fp32"}
SAVING = ("saved_tiles", "slab_tiles", "saved_rows")


@compiles
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("backend", "arch", "tma"), [("cuda", 80, False), ("cuda", 90, True), ("cuda", 100, True), ("hip", "gfx942", False)]
)
def test_triton_kernels_compile(backend, arch, tma, backward):
    from triton.backends.compiler import GPUTarget

    from entropy_fast.kernels import linear_operands
    from entropy_fast.kernels.linear_dlogits import dlogits_kernel
    from entropy_fast.kernels.linear_forward import linear_stats_kernel

    t = {80: linear_operands.AMPERE, "gfx942": linear_operands.SMALL}.get(arch, linear_operands.BLACKWELL)
    kernel = dlogits_kernel if backward else linear_stats_kernel

    def tile(rows, columns):
        return f"tensordesc<bf16[{rows},{columns}]>" if tma else "*bf16"

    signature = FORWARD_SCALARS | {"hidden": tile(t.BM, t.BK), "weight": tile(t.BN, t.BK), "target_ptr": "*i64"}
    signature |= dict.fromkeys(("hidden_stride", "weight_stride", "dz_stride", *SAVING, "saved_pitch"), "i32")
    signature |= dict.fromkeys(("lse_ptr", "constant_ptr", "slope_ptr", "dz_target_ptr", "tiles_ptr"), "*fp32")
    signature |= {"dz": tile(t.BM, t.BN), "bias_ptr": "*bf16", "saved_ptr": "*fp16", "saved_peaks_ptr": "*fp32"}
    constants = {"BM": t.BM, "BN": t.BN, "BK": t.BK, "GROUP": t.GROUP, "PROGRAMS": 132, "TMA": tma, "PARTS": False}
    constants |= {"HAS_BIAS": True, "SOFTCAP": True, "row_scale_ptr": None, "col_scale_ptr": None}
    if backward:
        constants["HAS_ENTROPY"] = True
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    stages = 2 if backward else t.num_stages
    compiled = _compile(kernel, signature, constants, target, num_warps=t.num_warps, num_stages=stages)
    limit = {80: 163, 90: 227, 100: 227, "gfx942": 64}[arch] * 1024
    assert compiled.metadata.shared <= limit


@compiles
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("options", [False, True])
def test_the_kernel_for_saved_exponentials_compiles(gpu, options, tmp_path):
    from entropy_fast.kernels.linear_saved import _variant, saved_dlogits_kernel

    types = dict.fromkeys(("N", "tiles", "pitch", "peaks_stride"), "i32") | {"uncap": "fp32", "target_ptr": "*i64"}
    types |= {"dz_ptr": "*bf16", "exponentials_ptr": "*fp16"}
    compiled = compiled_for(gpu, saved_dlogits_kernel, _variant(256, options), types, "*fp32")
    if gpu == ("cuda", 90):
        assert stack_bytes(compiled, tmp_path) == 0


@compiles
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("kernel", ["merge", "coefficients", "coefficients, softcap", "split"])
def test_the_kernels_around_them_compile(gpu, kernel, tmp_path):
    from entropy_fast.kernels import linear_dlogits, linear_forward, linear_operands
    from entropy_fast.kernels.launch import Variant

    integers = ("N", "V", "n_tiles", "pitch", "step_logprob", "step_entropy", "step_lse", "stride", "D", "K")
    types = dict.fromkeys(integers, "i32") | {
        "outer": "fp32",
        "uncap": "fp32",
        "target_ptr": "*i64",
        "halves_ptr": "*fp16",
    }
    function, variant = {
        "merge": (linear_forward.merge_kernel, linear_forward._merge(256, False)),
        "coefficients": (linear_dlogits.coefficients_kernel, linear_dlogits.COEFFICIENTS[0]),
        "coefficients, softcap": (linear_dlogits.coefficients_kernel, linear_dlogits.COEFFICIENTS[1]),
        "split": (linear_operands.split_kernel, Variant({"BLOCK": linear_operands.SPLIT_BLOCK})),
    }[kernel]
    compiled = compiled_for(gpu, function, variant, types, "*fp32")
    if gpu == ("cuda", 90):
        assert stack_bytes(compiled, tmp_path) == 0


@compiles
@pytest.mark.parametrize("use", ["forward", "saving forward", "backward"])
@pytest.mark.parametrize("options", ["", "softcap", "softcap, bias"])
@pytest.mark.parametrize("settings", ["HOPPER", "HOPPER_ACCURATE"])
def test_hopper_kernels_compile(use, options, settings, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl

    from entropy_fast.kernels import linear_operands
    from entropy_fast.kernels.linear_hopper import tiles_kernel

    t = getattr(linear_operands, settings)
    parts, backward = t.run > 0, use == "backward"
    layout = gl.NVMMASharedLayout.get_default_for([t.BM, t.BK], gl.bfloat16)
    signature = FORWARD_SCALARS | {
        "hidden": f"tensordesc<{'fp16' if parts else 'bf16'}[{t.BM},{t.BK}],{layout}>",
        "weight": f"tensordesc<{'fp16' if parts else 'bf16'}[{t.BN},{t.BK}],{layout}>",
        "out": f"tensordesc<{'bf16' if backward else 'fp16'}[{t.BM // 2},{t.BN}],{layout}>",
        "target_ptr": "*i64",
        "tiles_ptr": "*fp32",
        "saved_peaks_ptr": "*fp32",
    }
    signature |= dict.fromkeys(SAVING, "i32")
    constants = {"BM": t.BM, "BN": t.BN, "BK": t.BK, "GROUP": t.GROUP, "PROGRAMS": 132, "RUN": t.run}
    constants |= {"STAGES": t.num_stages if use == "forward" else 3, "PARTS": parts}
    constants |= {"HAS_BIAS": "bias" in options, "SOFTCAP": "softcap" in options}
    constants |= {"HAS_ENTROPY": backward, "BACKWARD": backward}
    unused = {"forward": ("out", "saved_peaks_ptr"), "backward": ("tiles_ptr", "saved_peaks_ptr")}
    constants |= dict.fromkeys(unused.get(use, ()))
    signature |= {"bias_ptr": "*bf16", "row_scale_ptr": "*fp32", "col_scale_ptr": "*fp32"}
    if not parts:
        constants |= {"row_scale_ptr": None, "col_scale_ptr": None}
    if "bias" not in options:
        constants["bias_ptr"] = None
    for name in ("lse_ptr", "constant_ptr", "slope_ptr", "dz_target_ptr"):
        signature[name] = "*fp32"
        if not backward:
            constants[name] = None
    compiled = _compile(tiles_kernel, signature, constants, GPUTarget("cuda", 90, 32), gluon=True, num_warps=4)
    assert compiled.metadata.shared <= 227 * 1024
    sass_free_of_spills = "bias" not in options and not parts and triton.__version__.startswith("3.6")
    if sass_free_of_spills:
        assert stack_bytes(compiled, tmp_path) == 0
