"""`linear_token_stats` against float64 log-softmax, on every device that is here."""

import gc
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
TRANSFORMS = [{}, {"temperature": 0.7, "scale": 0.3, "softcap": 5.0}, {"temperature": 1.7, "scale": 2.0}]
# Half a unit in the last place of the dtype, relative.
ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-25, torch.float64: 2.0**-54}


def oracle(hidden, weight, targets, bias=None, *, temperature=1.0, scale=1.0, softcap=None):
    """(logprob, entropy, lse) in float64."""
    z = hidden.double() @ weight.double().T
    z = scale * (z if bias is None else z + bias.double())
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    entropy = -(p * torch.where(p > 0, logp, 0.0)).sum(-1)
    return logp.gather(-1, targets[..., None].long())[..., 0], entropy, torch.logsumexp(z, -1)


def problem(rows=37, width=72, vocab=501, dtype=torch.float32, device="cpu", seed=0, bias=False, spread=0.4):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g).to(dtype).to(device)
    weight = (torch.randn(vocab, width, generator=g) * spread).to(dtype).to(device)
    targets = torch.randint(0, vocab, (rows,), generator=g).to(device)
    return hidden, weight, targets, torch.randn(vocab, generator=g).to(dtype).to(device) if bias else None


def logit_error(hidden, weight):
    """A bound on the error of a float32 logit: Σ |x w| accumulated over the width, at float32's rounding."""
    if hidden.dtype == torch.float64:
        return 1e-13
    largest = (hidden.double().abs() @ weight.double().abs().T).max().item()
    return 2.0**-22 * largest


def gradients(function, tensors, weights, **options):
    """Gradients of Σ weights · (logprob, entropy, lse) to the tensors that need one."""
    out = function(*tensors, **options)
    loss = sum((w * o).sum() for w, o in zip(weights, out, strict=True) if w is not None)
    return torch.autograd.grad(loss, [t for t in tensors if t is not None and t.requires_grad])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", TRANSFORMS)
def test_matches_float64(device, dtype, bias, options):
    hidden, weight, targets, b = problem(dtype=dtype, device=device, bias=bias)
    out = ef.linear_token_stats(hidden, weight, targets, b, return_lse=True, **options)
    bound = logit_error(hidden, weight) * options.get("scale", 1.0) / options.get("temperature", 1.0)
    for got, expected in zip(out, oracle(hidden, weight, targets, b, **options), strict=True):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (got - expected).abs().max() <= 2 * bound + 1e-6 * (dtype != torch.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.parametrize("which", ["logprob", "entropy", "lse", "all"])
def test_gradients_match_float64(device, dtype, options, which):
    hidden, weight, targets, b = problem(dtype=dtype, device=device, bias=True)
    g = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(len(targets), generator=g).to(device) if which in (name, "all") else None
        for name in ("logprob", "entropy", "lse")
    ]
    tensors = [hidden.requires_grad_(), weight.requires_grad_(), targets, b.requires_grad_()]
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]
    got = gradients(ef.linear_token_stats, tensors, weights, return_lse=True, **options)
    for a, e in zip(got, gradients(oracle, exact, weights, **options), strict=True):
        # an error of the logits is a relative error of p; dz and the result are rounded to the dtype; on a GPU a
        # float32 dz goes through pairs of bf16
        bound = 4 * ROUNDING[dtype] + logit_error(hidden, weight) + 3e-5 * (device == "cuda" and dtype == torch.float32)
        assert (a.double() - e).norm() <= bound * e.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device):
    hidden, weight, targets, b = problem(4, 6, 9, torch.float64, device, bias=True)
    mask = torch.tensor([True, True, False, True], device=device)

    def f(*tensors):
        return ef.linear_token_stats(
            tensors[0], tensors[1], targets, tensors[2], mask=mask, softcap=3.0, temperature=0.8
        )[:2]

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in (hidden, weight, b)])


@pytest.mark.parametrize("device", DEVICES)
def test_only_what_needs_a_gradient_is_computed(device, monkeypatch):
    asked = []
    real = torch.ops.entropy_fast.linear_stats_backward

    class Spy:
        linear_stats = torch.ops.entropy_fast.linear_stats

        @staticmethod
        def linear_stats_backward(*args):
            asked.append((list(args[-1]), [t is None for t in args[-4:-1]]))
            return real(*args)

    monkeypatch.setattr(torch.ops, "entropy_fast", Spy)
    hidden, weight, targets, b = problem(device=device, bias=True)
    out = ef.linear_token_stats(hidden.requires_grad_(), weight, targets, b)
    out.logprob.sum().backward()
    assert asked == [([True, False, False], [False, True, True])]
    assert hidden.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.parametrize("memory", ["gradient", 2**22])
def test_gradients_with_saved_exponentials_match_float64(device, dtype, options, memory):
    vocab = 30000 if device == "cuda" else 501
    hidden, weight, targets, b = problem(300, vocab=vocab, dtype=dtype, device=device, bias=True, spread=0.3)
    hidden[:50] += 3 * weight[targets[:50]]
    weights = list(torch.randn(3, len(targets), generator=torch.Generator().manual_seed(1)).to(device))
    tensors = [hidden.requires_grad_(), weight.requires_grad_(), targets, b.requires_grad_()]
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]
    options = options | {"return_lse": True}
    recomputed = ef.linear_token_stats(*tensors, **options, backward_memory=0)
    saving = ef.linear_token_stats(*tensors, **options, backward_memory=memory)
    assert all(torch.equal(a, b) for a, b in zip(saving, recomputed, strict=True))
    got = gradients(ef.linear_token_stats, tensors, weights, **options, backward_memory=memory)
    options.pop("return_lse")
    for a, e in zip(got, gradients(oracle, exact, weights, **options), strict=True):
        # as without; what is saved has half a unit of fp16
        bound = 4 * ROUNDING[dtype] + logit_error(hidden, weight) + 3e-5 * (device == "cuda" and dtype == torch.float32)
        assert (a.double() - e).norm() <= (bound + 2.0**-12) * e.norm()


@pytest.mark.gpu
def test_reused_memory_is_the_gradient_s_own():
    hidden, weight, targets, _ = problem(300, 1024, 60000, torch.bfloat16, "cuda")
    hidden.requires_grad_()
    weight.requires_grad_()

    def peak(**options):
        # what earlier tests left, if it went in between, would count as saved
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = ef.linear_token_stats(hidden, weight, targets, **options)
        held = torch.cuda.memory_allocated() - before
        gradients = torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), [hidden, weight])
        assert len(gradients) == 2
        return held, torch.cuda.max_memory_allocated() - before

    peak()
    (held, most), (held_saving, most_saving) = peak(backward_memory=0), peak()
    assert most_saving <= most + 2**20
    assert held_saving - held <= weight.nbytes + 2**20
    held_saving, _ = peak(backward_memory=2**23)
    assert held_saving - held <= 2**23 + 2**20


@pytest.mark.parametrize("device", DEVICES)
def test_masked_rows_are_never_read(device):
    hidden, weight, targets, _ = problem(device=device)
    mask = torch.arange(len(targets), device=device) % 3 != 1
    poisoned, wrong = hidden.clone(), targets.clone()
    poisoned[~mask] = math.nan
    wrong[~mask] = -100
    poisoned.requires_grad_()
    weight.requires_grad_()
    out = ef.linear_token_stats(poisoned, weight, wrong, mask=mask, return_lse=True)
    expected = ef.linear_token_stats(hidden[mask], weight, targets[mask], return_lse=True)
    for got, e in zip(out, expected, strict=True):
        assert torch.equal(got[mask], e)
        assert not got[~mask].any()
    (out.logprob + out.entropy).sum().backward()
    assert not poisoned.grad[~mask].any()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("bound", [0.0, 0.01])
def test_nothing_active(device, rows, bound):
    hidden, weight, targets, b = problem(rows=rows, device=device, bias=True)
    for t in (hidden, weight, b):
        t.requires_grad_()
    mask = torch.zeros(rows, dtype=torch.bool, device=device)
    out = ef.linear_token_stats(hidden, weight, targets, b, mask=mask, max_dropped_mass=bound)
    assert not out.logprob.any()
    out.logprob.sum().backward()
    assert all(t.grad is not None and not t.grad.any() for t in (hidden, weight, b))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("band", [slice(0, 300), slice(100, 400), slice(250, 501), slice(500, 501)])
def test_minus_infinity_removes_tokens(device, band):
    hidden, weight, _, b = problem(device=device, bias=True)
    keep = torch.ones(501, dtype=torch.bool, device=device)
    keep[band] = False
    b[band] = -math.inf
    kept = keep.nonzero()[:, 0]
    inside = torch.arange(len(hidden), device=device) % len(kept)
    tensors = [hidden.requires_grad_(), weight.requires_grad_(), kept[inside], b.requires_grad_()]
    out = ef.linear_token_stats(*tensors)
    logprob, entropy, _ = oracle(hidden, weight[keep], inside, b[keep])
    assert (out.logprob - logprob).abs().max() < 1e-5
    assert (out.entropy - entropy).abs().max() < 1e-5
    grads = torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), [hidden, weight, b])
    assert all(torch.isfinite(t).all() for t in grads)
    assert not grads[1][band].any()
    removed = ef.linear_token_stats(hidden, weight, (~keep).nonzero()[:1, 0].expand(len(hidden)), b)
    assert (removed.logprob == -math.inf).all()
    assert torch.isfinite(removed.entropy).all()


@pytest.mark.parametrize("device", DEVICES)
def test_not_finite(device):
    hidden, weight, targets, b = problem(device=device, bias=True)
    hidden[3, 5] = math.nan
    hidden[7, 5] = math.inf
    out = ef.linear_token_stats(hidden, weight, targets, b)
    bad = torch.zeros(len(hidden), dtype=torch.bool, device=device)
    bad[[3, 7]] = True
    assert torch.equal(out.logprob.isnan(), bad)
    assert torch.equal(out.entropy.isnan(), bad)
    nothing = ef.linear_token_stats(hidden, weight, targets, torch.full_like(b, -math.inf))
    assert nothing.logprob.isnan().all()
    assert nothing.entropy.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_confident_rows_keep_their_digits(device):
    """p → 1: log p of −1e−7 and an entropy of 1e−6, and gradients that do not drown in the rounding of 1 − p."""
    hidden, weight, targets, _ = problem(rows=16, width=64, vocab=400, device=device)
    margins = torch.linspace(20.0, 30.0, 16, device=device)
    norm = weight[targets].square().sum(1, keepdim=True)
    hidden = (0.1 * hidden + weight[targets] * (margins[:, None] / norm)).requires_grad_()
    out = ef.linear_token_stats(hidden, weight, targets)
    exact = hidden.detach().double().requires_grad_()
    logprob, entropy, _ = oracle(exact, weight, targets)
    assert logprob.max() > -1e-4
    # what float32 logits near 30 leave of exp(z − max), relative
    assert ((out.logprob - logprob).abs() <= 1e-4 * logprob.abs() + 1e-7).all()
    assert ((out.entropy - entropy).abs() <= 1e-4 * entropy + 1e-6).all()
    (grad,) = torch.autograd.grad(out.logprob.sum(), [hidden])
    (expected,) = torch.autograd.grad(logprob.sum(), [exact])
    assert ((grad - expected).norm(dim=1) <= 1e-2 * expected.norm(dim=1) + 1e-6).all()


@pytest.mark.parametrize("device", DEVICES)
def test_huge_logits(device):
    hidden, weight, targets, _ = problem(device=device)
    hidden = hidden * 3000.0
    out = ef.linear_token_stats(hidden, weight, targets)
    logprob, entropy, _ = oracle(hidden, weight, targets)
    bound = 4 * logit_error(hidden, weight)
    assert (out.logprob - logprob).abs().max() <= bound
    assert (out.entropy - entropy).abs().max() <= bound


@pytest.mark.parametrize("device", DEVICES)
def test_weight_tied_to_the_embedding(device):
    """The head's gradient adds to the embedding's, as in a model with tied weights."""
    torch.manual_seed(3)
    tokens = torch.randint(0, 301, (4, 9), device=device)
    embedding = torch.nn.Embedding(301, 40, device=device)
    hidden = torch.tanh(embedding(tokens[:, :-1]))
    ef.linear_token_stats(hidden, embedding.weight, tokens[:, 1:]).logprob.mean().backward()
    exact = embedding.weight.detach().double().requires_grad_()
    oracle(torch.tanh(exact[tokens[:, :-1]]), exact, tokens[:, 1:])[0].mean().backward()
    assert (embedding.weight.grad - exact.grad).norm() <= 3e-5 * exact.grad.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_shapes_strides_and_integer_types(device):
    hidden, weight, targets, _ = problem(rows=24, device=device)
    expected = ef.linear_token_stats(hidden, weight, targets)
    got = ef.linear_token_stats(hidden.view(2, 3, 4, -1), weight, targets.view(2, 3, 4).int())
    assert got.lse is None
    assert torch.equal(got.logprob.view(-1), expected.logprob)
    wide = torch.zeros(24, 100, device=device)
    wide[:, 9:81] = hidden
    strided = ef.linear_token_stats(wide[:, 9:81], weight.t().contiguous().t(), targets)
    assert (strided.logprob - expected.logprob).abs().max() < 1e-5
    one = ef.linear_token_stats(hidden[0], weight, targets[0])
    assert one.logprob.shape == ()


@pytest.mark.parametrize("device", DEVICES)
def test_deterministic(device):
    hidden, weight, targets, _ = problem(rows=700, dtype=torch.bfloat16, device=device)
    runs = []
    for _ in range(2):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = ef.linear_token_stats(h, w, targets)
        runs.append((*out[:2], *torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), [h, w])))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "exact"), (torch.float32, "accurate"), (torch.float32, "fast")]
)
def test_a_row_has_the_same_bits_in_any_batch(dtype, precision):
    hidden, weight, targets, _ = problem(rows=1000, width=256, vocab=5003, dtype=dtype, device="cuda")
    together = ef.linear_token_stats(hidden, weight, targets, precision=precision)
    for rows in (slice(0, 1), slice(999, 1000), slice(3, 67), slice(100, 400)):
        alone = ef.linear_token_stats(hidden[rows], weight, targets[rows], precision=precision)
        assert torch.equal(alone.logprob, together.logprob[rows])
        assert torch.equal(alone.entropy, together.entropy[rows])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("precision", "bound"), [("exact", 2e-5), ("accurate", 2e-5), ("fast", 1e-4)])
def test_precisions_of_float32(device, precision, bound):
    """Logits of standard deviation 3 over a width of 2048; cuBLAS's own float32 is within 1.5e-5 of float64."""
    hidden, weight, targets, _ = problem(rows=130, width=2048, vocab=3001, device=device, spread=3 / 2048**0.5)
    tensors = [hidden.requires_grad_(), weight.requires_grad_(), targets]
    out = ef.linear_token_stats(*tensors, precision=precision)
    exact = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in tensors]
    expected = oracle(*exact)
    assert (out.logprob - expected[0]).abs().max() < bound
    assert (out.entropy - expected[1]).abs().max() < bound
    got = torch.autograd.grad((out.logprob + out.entropy).sum(), tensors[:2])
    for a, e in zip(got, torch.autograd.grad((expected[0] + expected[1]).sum(), exact[:2]), strict=True):
        assert (a - e).norm() <= 1e-4 * e.norm()


@pytest.mark.gpu
def test_memory_does_not_follow_the_logits():
    """8192 rows × 50000 tokens are 1.6 GB of float32 logits; forward and backward stay below 0.4 GB of their own."""
    hidden, weight, targets, _ = problem(rows=8192, width=512, vocab=50000, dtype=torch.bfloat16, device="cuda")
    hidden.requires_grad_(), weight.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = ef.linear_token_stats(hidden, weight, targets)
    (out.logprob + out.entropy).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 0.4e9


@pytest.mark.parametrize("vocab", [40, 2048, 3000])
@pytest.mark.parametrize("rows", [1, 7, 700])
@pytest.mark.parametrize("masked", [False, True])
def test_every_way_through_a_cpu(vocab, rows, masked):
    """Few logits, one tile of them and several; tokens removed, confident rows; with and without a gradient."""
    hidden, weight, targets, b = problem(rows, 24, vocab, bias=True)
    hidden[::2] *= 6
    b[3:9] = -math.inf
    targets[-1] = 0
    mask = torch.arange(rows) % 3 != 1 if masked else None
    keep = torch.ones(rows, dtype=torch.bool) if mask is None else mask
    for options in TRANSFORMS:
        least = ef.linear_token_stats(hidden, weight, targets, b, mask=mask, **options)
        most = ef.linear_token_stats(
            hidden.clone().requires_grad_(), weight, targets, b, mask=mask, return_lse=True, **options
        )
        assert least.lse is None
        assert all(torch.equal(a, c) for a, c in zip(least[:2], most[:2], strict=True))
        expected = oracle(hidden, weight, targets, b, **options)
        for got, e in zip(most, expected, strict=True):
            e = torch.where(keep, e, 0.0)
            assert torch.equal(got == -math.inf, e == -math.inf)
            finite = e > -math.inf
            assert ((got - e)[finite].abs() <= 4 * logit_error(hidden, weight)).all()
    for wrong in (vocab, -1, -6402373705728000, torch.iinfo(torch.int64).min):
        targets[0] = wrong
        with pytest.raises(InputError, match=f"got {wrong} in row 0"):
            ef.linear_token_stats(hidden, weight, targets, b, mask=mask)
        with pytest.raises(InputError, match=f"got {wrong} in row 0"):
            ef.linear_token_stats(hidden.clone().requires_grad_(), weight, targets, b, mask=mask)
    if masked:
        ef.linear_token_stats(hidden, weight, targets, b, mask=mask & (targets >= 0))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 300), st.booleans(), st.integers(0, 2**20))
def test_any_shape(rows, width, vocab, bias, seed):
    hidden, weight, targets, b = problem(rows, width, vocab, seed=seed, bias=bias)
    out = ef.linear_token_stats(hidden, weight, targets, b)
    logprob, entropy, _ = oracle(hidden, weight, targets, b)
    assert (out.logprob - logprob).abs().max() < 1e-5
    assert (out.entropy - entropy).abs().max() < 1e-5
    assert (out.entropy <= math.log(vocab) + 1e-5).all()


@pytest.mark.parametrize("bound", [0.0, 0.01])
def test_operators_keep_their_contract(bound):
    hidden, weight, targets, b = problem(5, 8, 30, bias=True)
    mask = torch.arange(5) != 2
    heat = torch.tensor(0.9, dtype=torch.float64)
    options = (heat, 1.0, 4.0, "exact")
    inputs = (hidden.requires_grad_(), weight.requires_grad_(), targets, b.requires_grad_(), mask, *options)
    # how many rows are active is the operator's own finding, which a symbolic trace of the filter cannot know
    opcheck(torch.ops.entropy_fast.linear_stats.default, (*inputs[:4], mask if bound == 0 else None, *options, bound))
    detached = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in inputs)
    *stats, _, kept = torch.ops.entropy_fast.linear_stats(*detached, bound)
    opcheck(
        torch.ops.entropy_fast.linear_stats_backward.default,
        (*detached, *stats, kept, torch.randn(5), None, torch.randn(5), [True, False, True]),
    )


def test_compiles_into_one_graph_for_every_batch_and_temperature():
    torch._dynamo.reset()
    hidden, weight, targets, _ = problem()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def loss(h, w, y, temperature):
        out = ef.linear_token_stats(h, w, y, temperature=temperature)
        return (out.logprob + out.entropy).sum()

    for i, (rows, temperature) in enumerate(((37, 1.0), (20, 0.8), (30, 0.9), (11, 1.3))):
        h = hidden[:rows].clone().requires_grad_()
        loss(h, weight, targets[:rows].clone(), temperature).backward()
        e = hidden[:rows].clone().requires_grad_()
        out = ef.linear_token_stats(e, weight, targets[:rows], temperature=temperature)
        (out.logprob + out.entropy).sum().backward()
        assert torch.equal(h.grad, e.grad)
        # the compiler takes the first sizes for constants, learns from the second, and stays with that
        assert counter.frame_count <= min(i + 1, 2)


def test_second_derivative_is_refused():
    hidden, weight, targets, _ = problem()
    out = ef.linear_token_stats(hidden.requires_grad_(), weight, targets)
    (grad,) = torch.autograd.grad(out.logprob.sum(), [hidden], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="second derivative|does not require grad"):
        torch.autograd.grad(grad.sum(), [hidden])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, "hidden must be bf16"),
        ({"weight": torch.zeros(10, 5)}, r"weight must have shape \(vocab, 4\)"),
        ({"weight": torch.zeros(10, 4, dtype=torch.bfloat16)}, "hidden's dtype"),
        ({"targets": torch.zeros(3)}, "targets must be int32 or int64"),
        ({"targets": torch.tensor([0, 10, 2])}, r"targets must be in \[0, 10\), got 10 in row 1"),
        ({"bias": torch.zeros(4)}, "bias must be floating point"),
        ({"mask": torch.ones(3)}, "mask must be bool"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"scale": math.inf}, "scale must be"),
        ({"softcap": -1.0}, "softcap must be above 0"),
        ({"precision": "double"}, "precision must be one of"),
        ({"max_dropped_mass": 1.0}, r"max_dropped_mass must be in \[0, 1\)"),
        ({"backward_memory": "all"}, "backward_memory must be \"gradient\" or a number of bytes, got 'all'"),
        ({"backward_memory": -1}, "backward_memory must be .* got -1"),
        ({"max_dropped_mass": 1e-3, "backward_memory": 2**30}, r"max_dropped_mass=0.001 do not go together"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(10, 4), "targets": torch.tensor([0, 1, 2])} | change
    with pytest.raises(InputError, match=message):
        ef.linear_token_stats(**arguments)


def test_autocast_does_not_lower_the_precision():
    """Under autocast a library's float32 product would be a bf16 one, and log-probs off by 1e-2."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 16, generator=g).requires_grad_()
    weight = torch.randn(40, 16, generator=g).requires_grad_()
    targets = torch.randint(40, (9,), generator=g)

    def run():
        out = ef.linear_token_stats(hidden, weight, targets)
        return *out[:2], *torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), (hidden, weight))

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = run()
    for a, b in zip(plain, lowered, strict=True):
        assert torch.equal(a, b)
