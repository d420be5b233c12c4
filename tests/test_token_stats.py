"""`token_stats` against float64 log-softmax, on every device that is here."""

import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import entropy_fast as ef
from entropy_fast.errors import InputError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
OPTIONS = [{}, {"temperature": 0.7, "scale": 0.5, "softcap": 5.0}, {"temperature": 1.7, "scale": 2.0}]
# Half a unit in the last place of the dtype, relative.
ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-25, torch.float64: 2.0**-54}


def oracle(logits, targets, *, temperature=1.0, scale=1.0, softcap=None, bias=None):
    """(logprob, entropy, lse) in float64."""
    z = logits.double()
    z = scale * (z if bias is None else z + bias.double())
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    logp = torch.log_softmax(z, -1)
    entropy = -(logp.exp() * torch.where(logp > -math.inf, logp, 0.0)).sum(-1)
    return logp.gather(-1, targets[..., None].long())[..., 0], entropy, torch.logsumexp(z, -1)


def problem(*shape, dtype=torch.float32, device="cpu", seed=0, spread=3.0):
    """Logits (*shape) and targets, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(*shape, generator=g)).to(dtype).to(device)
    return logits, torch.randint(shape[-1], shape[:-1], generator=g).to(device)


def tolerance(dtype, largest=20.0):
    """Float32 arithmetic on logits up to `largest`: a few roundings of d = z − max (up to twice that) and of a sum."""
    return 1e-12 if dtype == torch.float64 else 2.0**-24 * (2 * largest + 8)


def assert_close(got, expected, atol):
    for a, e in zip(got, expected, strict=True):
        assert torch.equal(a.isnan(), e.isnan())
        assert torch.equal(a.isneginf(), e.isneginf())
        finite = e.isfinite()
        assert ((a.double() - e)[finite].abs() <= atol).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("vocab", [2, 3, 127, 5003])
def test_matches_float64(device, dtype, options, vocab):
    logits, targets = problem(7, vocab, dtype=dtype, device=device)
    bias = torch.linspace(-1, 1, vocab, device=device)
    for b in (None, bias):
        out = ef.token_stats(logits, targets, bias=b, return_lse=True, **options)
        assert out.logprob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(out, oracle(logits, targets, bias=b, **options), 2 * tolerance(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_match_float64(device, dtype, options):
    logits, targets = problem(2, 5, 4099, dtype=dtype, device=device)
    mask = torch.rand(2, 5, device=device) < 0.7
    bias = torch.linspace(-1, 1, 4099, device=device, dtype=torch.float64).to(dtype).requires_grad_()
    x = logits.clone().requires_grad_()
    exact = [x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()]
    weights = torch.randn(3, 2, 5, device=device, dtype=torch.float64)
    out = ef.token_stats(x, targets, mask=mask, bias=bias, return_lse=True, **options)
    loss = sum((w.to(o.dtype) * o).sum() for w, o in zip(weights, out, strict=True))
    got = torch.autograd.grad(loss, [x, bias])
    expected = oracle(exact[0], targets, bias=exact[1], **options)
    loss = sum((w * mask * o).sum() for w, o in zip(weights, expected, strict=True))
    for a, e in zip(got, torch.autograd.grad(loss, exact), strict=True):
        assert (a.double() - e).norm() <= (2 * ROUNDING[dtype] + 8 * tolerance(dtype)) * e.norm()
    assert not got[0][~mask].any()


@pytest.mark.parametrize("device", DEVICES)
def test_each_output_alone_differentiates(device):
    for i in range(3):
        logits, targets = problem(4, 33, device=device, seed=i)
        x = logits.requires_grad_()
        exact = logits.detach().double().requires_grad_()
        got = torch.autograd.grad(ef.token_stats(x, targets, return_lse=True)[i].sum(), x)[0]
        expected = torch.autograd.grad(oracle(exact, targets)[i].sum(), exact)[0]
        assert (got - expected).abs().max() < 1e-6


def test_gradcheck():
    logits, targets = problem(3, 7, dtype=torch.float64)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def f(x, b):
        return ef.token_stats(x, targets, bias=b, temperature=0.7, scale=1.3, softcap=4.0, return_lse=True)

    assert torch.autograd.gradcheck(f, (logits.requires_grad_(), bias))


@pytest.mark.parametrize("device", DEVICES)
def test_a_confident_row_keeps_its_digits(device):
    # one token at 0, nine at −gap: p of the rest is tiny, and everything that matters is made of it
    for gap in (5.0, 12.0, 16.0, 18.5, 25.0, 60.0):
        for offset in (0.0, 200.0, -200.0):
            logits = torch.full((1, 10), offset - gap, device=device)
            logits[0, 3] = offset
            logprob, entropy, _ = ef.token_stats(logits, torch.tensor([3], device=device))
            rest = 9 * math.exp(-gap)
            exact_entropy = math.log1p(rest) + gap * rest / (1 + rest)
            assert float(logprob) == pytest.approx(-math.log1p(rest), rel=2e-5)
            assert float(entropy) == pytest.approx(exact_entropy, rel=2e-5)
    assert exact_entropy < 1e-20


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_at_a_confident_target_does_not_cancel(device):
    logits = torch.full((1, 10), -20.0, device=device)
    logits[0, 3] = 0.0
    x = logits.requires_grad_()
    ef.token_stats(x, torch.tensor([3], device=device)).logprob.sum().backward()
    rest = 9 * math.exp(-20.0)
    assert float(x.grad[0, 3]) == pytest.approx(rest / (1 + rest), rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_minus_infinity_and_nan(device, dtype):
    vocab = 9001
    logits, targets = problem(11, vocab, dtype=dtype, device=device)
    logits[0, :4000] = logits[1, 4000:5000] = logits[2, 5000:] = -math.inf
    targets[0], targets[1], targets[2] = 8000, 3, 4
    logits[3, 17], logits[4, 17], logits[5] = math.nan, math.inf, -math.inf
    targets[6], logits[6, 40] = 40, -math.inf
    logits[7, 1:] = -math.inf
    targets[7] = 0
    logits[8] = torch.finfo(dtype).min
    logits[9, 100:] = torch.finfo(dtype).min
    targets[9] = 5
    logits[10] = 0.5
    out = ef.token_stats(logits, targets, return_lse=True)
    expected = [t.clone() for t in oracle(logits, targets)]
    for e in expected:
        e[3:6] = math.nan
    expected[2][8] = out.lse[8].double()  # −3e38: beyond absolute tolerances
    assert_close(out, expected, tolerance(torch.float32))
    assert out.logprob[6] == -math.inf
    assert out.logprob[7] == 0
    assert out.entropy[7] == 0
    assert float(out.entropy[8]) == pytest.approx(math.log(vocab), rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_minus_infinity_gets_no_gradient(device):
    logits, targets = problem(3, 40, device=device)
    logits[:, 5:9] = -math.inf
    targets[:] = torch.tensor([0, 1, 2])
    x = logits.requires_grad_()
    out = ef.token_stats(x, targets)
    (out.logprob.sum() + out.entropy.sum()).backward()
    assert x.grad.isfinite().all()
    assert not x.grad[:, 5:9].any()


@pytest.mark.parametrize("device", DEVICES)
def test_masked_rows_are_not_read(device):
    logits, targets = problem(6, 300, device=device)
    mask = torch.tensor([True, False, True, True, False, False], device=device)
    clean = ef.token_stats(logits, targets, mask=mask, return_lse=True)
    logits[~mask] = math.nan
    targets[~mask] = -100
    x = logits.requires_grad_()
    out = ef.token_stats(x, targets, mask=mask, return_lse=True)
    for a, b in zip(out, clean, strict=True):
        assert torch.equal(a, b)
        assert not a[~mask].any()
    (out.logprob.sum() + out.entropy.sum()).backward()
    assert not x.grad[~mask].any()
    assert x.grad[mask].any(1).all()
    nothing = ef.token_stats(x, targets, mask=torch.zeros_like(mask))
    assert not nothing.logprob.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [7, 128, 1000, 20011, 40009])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_do_not_depend_on_the_batch(device, vocab, dtype):
    logits, targets = problem(60, vocab, dtype=dtype, device=device)
    logits[35:50:2] *= 8  # among them confident rows, row 41 too
    everything = ef.token_stats(logits, targets, return_lse=True)
    again = ef.token_stats(logits, targets, return_lse=True)
    alone = ef.token_stats(logits[41:42].clone(), targets[41:42], return_lse=True)
    few = ef.token_stats(logits[37:44], targets[37:44], return_lse=True)
    batch = ef.token_stats(logits.repeat(40, 1), targets.repeat(40), return_lse=True)
    masked = ef.token_stats(logits, targets, mask=torch.arange(60, device=device) % 3 == 2, return_lse=True)
    for a, b, one, seven, many, some in zip(everything, again, alone, few, batch, masked, strict=True):
        assert torch.equal(a, b)
        assert a[41] == one[0]
        assert torch.equal(a[37:44], seven)
        assert torch.equal(a.repeat(40), many)
        assert a[41] == some[41]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_do_not_depend_on_where_a_row_starts(device, dtype):
    logits, targets = problem(5, 5003, dtype=dtype, device=device)
    expected = ef.token_stats(logits, targets, return_lse=True)
    base = torch.full((5 * 5003 + 2,), math.nan, dtype=dtype, device=device)
    moved = base[1:-1].view(5, 5003).copy_(logits)
    out = ef.token_stats(moved, targets, return_lse=True)
    assert_close(out, oracle(logits, targets), tolerance(torch.float32))
    for a, b in zip(out, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [3, 200, 2048, 2049])
def test_bits_do_not_depend_on_what_is_asked_for(device, vocab):
    logits, targets = problem(50, vocab, device=device)
    logits[20:40] *= 8
    for options in OPTIONS:
        with torch.no_grad():
            least = ef.token_stats(logits, targets, **options)
            more = ef.token_stats(logits, targets, return_lse=True, **options)
        most = ef.token_stats(logits.clone().requires_grad_(), targets, return_lse=True, **options)
        assert all(torch.equal(a, b) for a, b in zip(more, most, strict=True))
        if device == "cpu":
            assert all(torch.equal(a, b) for a, b in zip(least[:2], most[:2], strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [50, 2048, 5000])
def test_confident_rows_among_others(device, vocab):
    """Entropies from 1e-9 to 7 nats side by side: each keeps its digits."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(64, vocab, generator=g)
    targets = torch.randint(vocab, (64,), generator=g)
    logits[torch.arange(64), targets] = torch.linspace(2.0, 36.0, 64)
    logprob, entropy, _ = (t.cpu() for t in ef.token_stats(logits.to(device), targets.to(device), return_lse=True))
    z = logits.double()
    others = z.scatter(1, targets[:, None], -math.inf)
    rest = torch.logsumexp(others, 1) - z.amax(1)  # log of the sum beside a peak of 1
    confident = z.argmax(1) == targets
    exact_logprob = torch.where(confident, -rest.exp().log1p(), oracle(logits, targets)[0])
    exact_entropy = oracle(logits, targets)[1]
    assert exact_entropy.min() < 1e-9
    assert ((logprob - exact_logprob).abs() <= 3e-6).all()
    assert ((logprob - exact_logprob).abs() <= 1e-3 * exact_logprob.abs() + 1e-15).all()
    assert ((entropy - exact_entropy).abs() <= 1e-3 * exact_entropy).all()
    assert ((entropy - exact_entropy).abs() <= 3.5e-6).all()


def test_few_operations_or_the_exact_ones(monkeypatch):
    """The statistics of small vocabularies against those of large ones, with all that may be in a row."""
    from entropy_fast.reference import rows

    logits, targets = problem(40, 300)
    logits[10:20] *= 9
    logits[3, :100] = logits[5, 200:] = -math.inf
    logits[21, 4], logits[22, 5], logits[23] = math.nan, math.inf, -math.inf
    targets[3], logits[24, 7], targets[24] = 50, -math.inf, 7
    logits[25:] += 150
    for options in (*OPTIONS, {"bias": torch.randn(300)}, {"mask": torch.arange(40) % 3 != 0}):
        few = ef.token_stats(logits, targets, return_lse=True, **options)
        with monkeypatch.context() as patch:
            patch.setattr(rows, "FUSED_VOCAB", 0)
            exact = ef.token_stats(logits, targets, return_lse=True, **options)
        assert_close(few, [t.double() for t in exact], 2e-5)
        if not options:
            assert few.logprob.isnan().nonzero().flatten().tolist() == [21, 22, 23]


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides(device):
    base, _ = problem(3, 9, 200, device=device)
    odd, _ = problem(3, 9, 131, device=device)
    wide = torch.randn(4, 6, 260, device=device)
    views = [
        base[:, :-1],
        base[:, 1:],
        odd[:, :-1],
        odd[:, 1:],
        base[..., :131],
        base[..., 3:130],
        base.transpose(0, 1),
        wide[::2, 1::2, 5:101],
        base.permute(2, 1, 0)[:50],
        base[0, 0],
        base[:2, :4].reshape(2, 2, 2, 200),
        base[0, 0].expand(5, 200),
    ]
    for view in views:
        targets = torch.randint(view.shape[-1], view.shape[:-1], device=device)
        exact = view.detach().double().requires_grad_()
        expected = oracle(exact, targets)
        x = view.detach().requires_grad_()
        out = ef.token_stats(x, targets.int(), return_lse=True)
        assert_close([o.detach() for o in out], [e.detach() for e in expected], 2e-6)
        got = torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), x)[0]
        wanted = torch.autograd.grad(expected[0].sum() + expected[1].sum(), exact)[0]
        assert (got - wanted).abs().max() < 1e-5


@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 70) | st.sampled_from([255, 507, 1023, 4097]),
    offset=st.floats(-200, 200, width=32),
    temperature=st.floats(0.3, 3.0),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(rows, vocab, offset, temperature, seed):
    logits, targets = problem(rows, vocab, seed=seed)
    logits += offset
    out = ef.token_stats(logits, targets, temperature=temperature, return_lse=True)
    expected = oracle(logits, targets, temperature=temperature)
    assert_close(out[:2], expected[:2], 4 * tolerance(torch.float32) / temperature)
    assert (out.entropy <= math.log(vocab) + 1e-5).all()
    assert (out.entropy >= 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_in_place_backward(device):
    for vocab in (64, 257):
        logits, targets = problem(6, vocab, device=device)
        mask = torch.arange(6, device=device) != 2
        x = logits.clone().requires_grad_()
        out = ef.token_stats(x * 1.0, targets, mask=mask)
        expected = torch.autograd.grad(out.logprob.sum() + 0.3 * out.entropy.sum(), x)[0]
        y = x * 1.0
        out = ef.token_stats(y, targets, mask=mask, inplace_backward=True)
        loss = out.logprob.sum() + 0.3 * out.entropy.sum()
        got = torch.autograd.grad(loss, x, retain_graph=True)[0]
        assert torch.equal(got, expected)
        assert torch.equal(y, expected), "the gradient lies where the logits were"
        with pytest.raises(InputError, match="written over"):
            torch.autograd.grad(loss, x)


def test_in_place_backward_refuses_what_it_would_break():
    logits, targets = problem(2, 5)
    with pytest.raises(InputError, match="leaf"):
        ef.token_stats(logits.requires_grad_(), targets, inplace_backward=True)
    y = logits * 1.0
    first = ef.token_stats(y, targets, inplace_backward=True).logprob.sum()
    second = ef.token_stats(y, targets, inplace_backward=True).logprob.sum()
    first.backward()
    with pytest.raises(InputError, match="one call reads"):
        second.backward()


@pytest.mark.parametrize("device", DEVICES)
def test_memory_follows_the_rows_not_the_vocabulary(device):
    if device == "cuda":
        x = torch.randn(4096, 32000, device=device, dtype=torch.bfloat16)
        y = torch.zeros(4096, dtype=torch.int64, device=device)
        ef.token_stats(x, y)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = ef.token_stats(x, y, return_lse=True)
        assert torch.cuda.max_memory_allocated() - before <= 40 * 4096 + 2**20
        del out
        return
    x = torch.randn(400, 32000, requires_grad=True)
    y = torch.zeros(400, dtype=torch.int64)
    sizes = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(result):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
                    sizes.append(t.untyped_storage().nbytes())
            return result

    with Largest():
        out = ef.token_stats(x, y)
    assert max(sizes) <= 4 * 2**20 < x.numel() * 4 / 10
    assert out.logprob.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph_for_every_batch_and_temperature(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    f = torch.compile(lambda x, y, t: ef.token_stats(x, y, temperature=t), fullgraph=True, backend=counter)
    for i, (rows, temperature) in enumerate([(5, 1.0), (6, 0.7), (9, 0.9), (12, 0.35), (7, 1.0)]):
        logits, targets = problem(rows, 50, device=device, seed=rows)
        x = logits.requires_grad_()
        out = f(x, targets, temperature)
        expected = ef.token_stats(x, targets, temperature=temperature)
        assert torch.equal(out.logprob, expected.logprob)
        got = torch.autograd.grad(out.entropy.sum(), x)[0]
        assert torch.equal(got, torch.autograd.grad(expected.entropy.sum(), x)[0])
        # the compiler takes the first sizes for constants, learns from the second, and stays with that
        assert counter.frame_count <= min(i + 1, 2)
    with pytest.raises(Exception, match="torch.compile"):
        torch.compile(
            lambda x, y: ef.token_stats(x * 1.0, y, inplace_backward=True), fullgraph=True, backend="aot_eager"
        )(x, targets)


@pytest.mark.parametrize("device", DEVICES)
def test_operators_are_well_formed(device):
    logits, targets = problem(4, 33, device=device)
    mask = torch.tensor([True, True, False, True], device=device)
    bias = torch.randn(33, device=device)
    temperature = torch.tensor(0.7, dtype=torch.float64)
    ops = torch.ops.entropy_fast
    for extra in ((None, None), (mask, bias)):
        inputs = (targets, *extra, temperature, 1.3, 5.0)
        opcheck(ops.row_stats.default, (logits, *inputs))
        stats = ops.row_stats(logits, *inputs)
        gradients = (*torch.randn(2, 4, device=device), None, extra[1] is not None)
        opcheck(ops.row_stats_backward.default, (logits, *inputs, *stats, *gradients))
        opcheck(ops.row_stats_backward_.default, (logits.clone(), *inputs, *stats, *gradients))


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_of_shifted_logits_keeps_their_rows_apart(device):
    """With an odd vocabulary vectors of source and gradient would not begin alike otherwise; autograd does not mind."""
    ops = torch.ops.entropy_fast
    for vocab, kept in ((33, True), (32, False)):
        base, _ = problem(2, 4, vocab, device=device)
        logits, targets = base[:, :-1], torch.randint(vocab, (2, 3), device=device)
        inputs = (targets, None, None, torch.tensor(1.0, dtype=torch.float64), 1.0, None)
        stats = ops.row_stats(logits, *inputs)
        upstream = torch.randn(2, 2, 3, device=device)
        arguments = (*inputs, *stats, *upstream, None, False)
        opcheck(ops.row_stats_backward.default, (logits, *arguments))
        got, _ = ops.row_stats_backward(logits, *arguments)
        assert (got.stride() == logits.stride()) == kept
        assert torch.equal(got, ops.row_stats_backward(logits.contiguous(), *arguments)[0])
        x = base.clone().requires_grad_()
        out = ef.token_stats(x[:, :-1], targets)
        whole = torch.autograd.grad((out.logprob, out.entropy), x, tuple(upstream))[0]
        assert torch.equal(whole[:, :-1], got)
        assert not whole[:, -1].any()


def test_an_outside_target_names_its_row():
    logits, targets = problem(2, 3, 10)
    targets[1, 2] = 10
    with pytest.raises(InputError, match=r"\[0, 10\), got 10 in row \(1, 2\).*mask"):
        ef.token_stats(logits, targets)
    targets[1, 2] = -100
    with pytest.raises(InputError, match="got -100"):
        ef.token_stats(logits, targets)
    ef.token_stats(logits, targets, mask=targets >= 0)
    for value in (torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max, -6402373705728000, -1, 10):
        targets[1, 2] = value
        for x in (logits, 30 * logits, logits.double(), logits[..., :3].repeat(1, 1, 1000)[..., :10]):
            with pytest.raises(InputError, match=f"got {value} in row"):
                ef.token_stats(x, targets)
    with pytest.raises(InputError, match="got 10 in row 5"):
        ef.token_stats(logits.flatten(0, 1), targets.flatten().int())
    with pytest.raises(InputError, match=r"\[0, 3000\), got 3000 in row \(1, 2\)"):
        ef.token_stats(logits.repeat(1, 1, 300), torch.where(targets == 10, 3000, 0))


@pytest.mark.gpu
def test_an_outside_target_is_nan_on_a_gpu():
    logits, targets = problem(5, 40, device="cuda")
    targets[1], targets[3] = 40, -1
    out = ef.token_stats(logits, targets)
    assert out.logprob.isnan().tolist() == out.entropy.isnan().tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, "logits must be bf16.*got int64"),
        ({"targets": torch.zeros(3)}, "targets must be int32 or int64.*got float32"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"shape \(3,\)"),
        ({"mask": torch.ones(3)}, "mask must be bool.*mask.bool"),
        ({"bias": torch.zeros(5)}, r"bias must be floating point with shape \(4,\)"),
        ({"temperature": 0.0}, "temperature must be above 0.*greedy"),
        ({"temperature": math.nan}, "temperature"),
        ({"scale": -1.0}, "scale must be above 0"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"targets": torch.zeros(3, dtype=torch.int64, device="meta")}, "device"),
    ],
)
def test_bad_inputs_say_what_is_wrong(change, message):
    arguments = {"logits": torch.zeros(3, 4), "targets": torch.zeros(3, dtype=torch.int64)} | change
    with pytest.raises(InputError, match=message):
        ef.token_stats(arguments.pop("logits"), arguments.pop("targets"), **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [2, 3, 127, 50257, 32000, 128256, 151936, 262144])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_vocabularies(vocab, dtype):
    for rows in (3, 500):
        logits, targets = problem(rows, vocab, dtype=dtype, device="cuda")
        out = ef.token_stats(logits, targets, return_lse=True)
        assert_close(out, oracle(logits, targets), 3e-6)
        x = logits.requires_grad_()
        exact = logits.detach().double().requires_grad_()
        out = ef.token_stats(x, targets)
        got = torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), x)[0]
        expected = oracle(exact, targets)
        wanted = torch.autograd.grad(expected[0].sum() + expected[1].sum(), exact)[0]
        assert (got - wanted).norm() <= (2 * ROUNDING[dtype] + 1e-6) * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1000, 5003])
def test_many_masked_rows_have_the_bits_of_unmasked_ones(vocab):
    logits, targets = problem(20000, vocab, dtype=torch.bfloat16, device="cuda")
    whole = ef.token_stats(logits, targets, return_lse=True)
    for share in (0.0, 0.01, 0.5, 1.0):
        mask = torch.rand(20000, device="cuda") < share
        for return_lse in (False, True):
            out = ef.token_stats(logits, targets, mask=mask, return_lse=return_lse)
            for a, b in zip(out, whole, strict=True):
                assert a is None or torch.equal(a, torch.where(mask, b, 0.0))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    rows, vocab = 70000, 32000
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-3:] = 3 * torch.randn(3, vocab, device="cuda")
    targets = torch.full((rows,), 7, device="cuda")
    x = logits.requires_grad_()
    out = ef.token_stats(x, targets)
    assert_close([o[-3:].detach() for o in out[:2]], oracle(x[-3:].detach(), targets[-3:])[:2], 3e-6)
    y = x * 1
    ef.token_stats(y, targets, inplace_backward=True).logprob.sum().backward()
    exact = x[-3:].detach().double().requires_grad_()
    wanted = torch.autograd.grad(oracle(exact, targets[-3:])[0].sum(), exact)[0]
    assert (x.grad[-3:] - wanted).norm() <= 2 * ROUNDING[torch.bfloat16] * wanted.norm()


def test_the_dispatcher_is_passed_by_only_where_nobody_looks():
    from torch._subclasses import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from entropy_fast.functional.operators import nobody_looks

    x = torch.zeros(3)
    assert nobody_looks(x)
    assert not nobody_looks(torch.nn.Parameter(x))
    with FakeTensorMode() as mode:
        assert not nobody_looks(mode.from_tensor(x))
    with FlopCounterMode(display=False):
        assert not nobody_looks(x)
    seen = []
    torch.func.vmap(lambda t: (seen.append(nobody_looks(t)), t)[1])(x)
    torch.func.grad(lambda t: (seen.append(nobody_looks(t)), t.sum())[1])(x)
    assert seen == [False, False]
    compiled = torch.compile(lambda t: t + (1 if nobody_looks(t) else 2), fullgraph=True, backend="eager")
    assert compiled(x).tolist() == [2, 2, 2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_position_without_a_dimension_has_the_bits_and_dtypes_of_a_row(device, dtype):
    logits, targets = problem(1, 70, device=device, dtype=dtype)
    for gradient in (False, True):
        x = logits.requires_grad_(gradient)
        rows = ef.token_stats(x, targets, temperature=0.7, return_lse=True)
        alone = ef.token_stats(x[0], targets[0], temperature=0.7, return_lse=True)
        for a, b in zip(alone, rows, strict=True):
            assert a.shape == ()
            assert a.dtype == dtype
            assert a == b[0]


def test_autocast_changes_nothing():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 40, generator=g).requires_grad_()
    targets = torch.randint(40, (9,), generator=g)

    def run():
        out = ef.token_stats(logits, targets)
        return *out[:2], *torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), logits)

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = run()
    for a, b in zip(plain, lowered, strict=True):
        assert torch.equal(a, b)
