"""Calls that are like an earlier one: the same results and errors, whatever was called before."""

import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from without_gpu import DEVICES, interpreted, run_interpreted, starter

pytest.importorskip("triton")

import entropy_fast as ef
from entropy_fast.errors import InputError
from entropy_fast.functional import operators, remembered
from entropy_fast.kernels import launch as launching


@starter
def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def forwards(monkeypatch):
    """What is remembered, at first nothing; in the interpreter the kernels take tensors on the CPU."""
    monkeypatch.setattr(remembered, "DEVICES", ("cpu", "cuda"))
    remembered._forwards.clear()
    yield remembered._forwards
    remembered._forwards.clear()


def problem(*shape, device, dtype=torch.float32):
    return (3 * torch.randn(*shape)).to(device, dtype), torch.randint(shape[-1], shape[:-1]).to(device)


def outputs(logits, targets, **options):
    """Every result, and the gradients with respect to the logits and the bias where there are any."""
    out = ef.token_stats(logits, targets, **options)
    inputs = [t for t in (logits, options.get("bias")) if t is not None and t.requires_grad]
    results = [t for t in out if t is not None]
    if inputs:
        weighted = sum((i + 1.0) * t.sum() for i, t in enumerate(results))
        return [*(t.detach() for t in results), *torch.autograd.grad(weighted, inputs)]
    return results


def options_for(name, rows, vocab, device):
    mask = torch.arange(math.prod(rows), device=device).view(rows) % 3 != 1
    bias = torch.randn(vocab, device=device)
    return {
        "plain": {},
        "transform": {"temperature": 0.7, "scale": 0.5, "softcap": 5.0, "return_lse": True},
        "whole numbers": {"temperature": 2, "scale": 1},
        "mask": {"mask": mask},
        "mask and bias": {"mask": mask, "bias": bias, "return_lse": True},
        "bias with a gradient": {"bias": torch.nn.Parameter(bias)},
    }[name]


NAMES = ["plain", "transform", "whole numbers", "mask", "mask and bias", "bias with a gradient"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(70,), (2, 2, 37)])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_remembered_call_has_the_bits_of_a_first_one(device, name, shape, gradient, forwards, monkeypatch):
    options = options_for(name, shape[:-1], shape[-1], device)
    calls = [problem(*shape, device=device) for _ in range(2)]
    calls = [(logits.requires_grad_(gradient), targets) for logits, targets in calls]
    again = [outputs(*call, **options) for call in calls]
    assert len(forwards) == 1
    for call, got in zip(calls, again, strict=True):
        forwards.clear()
        first = outputs(*call, **options)
        monkeypatch.setattr(remembered, "DEVICES", ())
        general = outputs(*call, **options)
        monkeypatch.undo()
        monkeypatch.setattr(remembered, "DEVICES", ("cpu", "cuda"))
        for a, b, c in zip(got, first, general, strict=True):
            assert torch.equal(a, b)
            assert a.shape == c.shape
            assert a.dtype == c.dtype
            # off the GPU the general path is plain torch
            assert torch.equal(a, c) if device == "cuda" else (a - c).abs().max() < 2e-5


@pytest.mark.parametrize("device", DEVICES)
def test_layouts_are_told_apart(device, forwards):
    base, _ = problem(2, 3, 40, device=device)
    flat = base.view(-1)
    views = [
        base[:, 0],
        base[:, 0, :39],
        base[0, :2],
        # 4 and 16 bytes further, where loads are narrower and as wide
        torch.as_strided(flat, (2, 39), (120, 1), 1),
        torch.as_strided(flat, (2, 36), (120, 1), 4),
        torch.as_strided(flat, (2, 36), (120, 1), 5),
        base[:, 0].double(),
        base[:, 0].half(),
        base[:1, 0],
        base[:1, 0].expand(2, 40),
        base[:, :1],
        base[None, :, 0],
        base[None, :, 1:],
        base[0].t()[:2],
    ]
    for _ in range(2):
        for view in views:
            targets = torch.randint(view.shape[-1], view.shape[:-1], device=device)
            spaced = targets.repeat_interleave(2, -1)[..., ::2]
            for ids, temperature in ((targets, 1.0), (targets.int(), 1.0), (targets, 0.5), (spaced, 1.0)):
                got = ef.token_stats(view, ids, temperature=temperature)
                logp = torch.log_softmax(view.double() / temperature, -1)
                expected = logp.gather(-1, ids[..., None].long())[..., 0]
                assert (got.logprob - expected).abs().max() < 2e-5
                assert (got.entropy + (logp.exp() * logp).sum(-1)).abs().max() < 2e-5
    # the last view's vocabulary is not contiguous: a copy is made, and nothing remembered; so with ids that have holes,
    # which the ids of the one view with one row have not
    usual = len(views) - 1
    assert len(forwards) == 3 * usual + 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_bias_with_holes(device):
    logits, targets = problem(4, 50, device=device)
    wide = torch.randn(100, device=device)
    transform = (torch.tensor(1.0, dtype=torch.float64), 1.0, None)
    results = []
    for bias in (wide[::2], wide[::2].clone()):
        inputs = (targets, None, bias, *transform)
        stats = operators._row_stats_triton(logits, *inputs)
        gradients = (torch.ones(4, device=device), None, None, True)
        results.append((*stats, *operators._row_stats_backward_triton(logits, *inputs, *stats, *gradients)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_wrong_inputs_are_named_after_right_ones(device):
    logits, targets = problem(3, 40, device=device)
    right = {"logits": logits, "targets": targets, "mask": targets >= 0, "bias": logits[0].clone()}
    elsewhere = torch.zeros(3, dtype=torch.int64, device="meta")
    wrong = [
        ({"logits": logits.long()}, "logits must be bf16"),
        ({"targets": targets.float()}, "targets must be int32 or int64"),
        ({"targets": targets[:2]}, r"shape \(3,\)"),
        ({"targets": targets[None]}, r"shape \(3,\)"),
        ({"targets": elsewhere}, "targets must be on the device"),
        ({"mask": torch.ones(3, device=device)}, "mask must be bool"),
        ({"mask": torch.ones(3, dtype=torch.uint8, device=device)}, "mask must be bool"),
        ({"mask": elsewhere.bool()}, "mask must be on the device"),
        ({"bias": logits[0, 1:].clone()}, r"bias must be floating point with shape \(40,\)"),
        ({"bias": torch.zeros(40, dtype=torch.int32, device=device)}, "bias must be floating point"),
        ({"temperature": 0.0}, "temperature must be above 0.*greedy"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"scale": math.inf}, "scale must be above 0"),
        ({"softcap": 0.0}, "softcap must be above 0"),
    ]
    for change, message in wrong:
        for _ in range(2):
            ef.token_stats(**right)
            with pytest.raises(InputError, match=message):
                ef.token_stats(**(right | change))
    leaf = right | {"logits": logits.clone().requires_grad_()}
    ef.token_stats(**leaf)
    with pytest.raises(InputError, match="leaf"):
        ef.token_stats(**leaf, inplace_backward=True)


@pytest.mark.parametrize("device", DEVICES)
def test_in_place_backward_is_no_other_call(device):
    logits, targets = problem(3, 40, device=device)
    wanted = outputs(logits.clone().requires_grad_(), targets)[-1]
    for _ in range(2):
        y = logits.clone().requires_grad_() * 1.0
        out = ef.token_stats(y, targets, inplace_backward=True)
        (out.logprob.sum() + 2 * out.entropy.sum()).backward()
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    for _ in range(2):
        out = ef.token_stats(torch.zeros(0, 9, device=device), torch.zeros(0, dtype=torch.int64, device=device))
        assert out.logprob.shape == out.entropy.shape == (0,)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_remembered_is_bounded_and_holds_no_tensor(device, forwards, monkeypatch):
    monkeypatch.setattr(remembered, "MOST", 5)
    kept = []
    for rows in range(1, 8):
        logits, targets = problem(rows, 9, device=device)
        mask, bias = targets >= 0, torch.randn(9, device=device)
        for gradient in (False, True):
            out = ef.token_stats(logits.requires_grad_(gradient), targets, mask=mask, bias=bias, return_lse=True)
            kept += [weakref.ref(t) for t in (logits, targets, mask, bias, *out)]
        assert 0 < len(forwards) <= 5
    del logits, targets, mask, bias, out
    gc.collect()
    assert not any(reference() is not None for reference in kept)


@interpreted
def test_a_temperature_that_can_change_is_not_remembered(forwards):
    logits, targets = problem(3, 40, device="cpu")
    temperature = torch.tensor(1.0)
    assert remembered.remember(("key",), logits, targets, None, None, temperature, 1.0, None, False) is None
    assert not forwards


def test_who_looks_gets_the_operator():
    from torch._subclasses import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    class Mine(torch.Tensor):
        pass

    def key(logits, targets=None, mask=None, bias=None):
        targets = torch.zeros(3, dtype=torch.int64) if targets is None else targets
        return remembered.call_key(logits, targets, mask, bias, 1.0, 1.0, None, False)

    x, y, m, b = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool), torch.ones(5)
    assert key(x, y, m, b) == key(x, y, m, torch.nn.Parameter(b))
    assert hash(key(x, y, m, b)) == hash(key(x.clone(), y.clone(), m.clone(), b.clone()))
    for other in (
        (x.as_subclass(Mine), y, m, b),
        (x, y.as_subclass(Mine), m, b),
        (x, y, m.as_subclass(Mine), b),
        (x, y, m, b.as_subclass(Mine)),
        (torch.nn.Parameter(x), y, m, b),
        (x.to("meta"), y, m, b),
    ):
        assert key(*other) is None
    with FakeTensorMode() as mode:
        assert key(mode.from_tensor(x)) is None
    assert key(x, mode.from_tensor(y)) is None
    with FlopCounterMode(display=False):
        assert key(x) is None
    seen = []
    torch.func.vmap(lambda t: (seen.append(key(t)), t)[1])(x)
    torch.func.grad(lambda t: (seen.append(key(t)), t.sum())[1])(x)
    assert seen == [None, None]
    compiled = torch.compile(lambda t: t + (1 if key(t) is None else 2), fullgraph=True, backend="eager")
    assert compiled(x).unique().tolist() == [1]


class Compiled:
    """A compiled kernel that notes how it is launched."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launches = []

    def run(self, *arguments):
        self.launches.append(arguments)

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.launches.append((grid, stream, *arguments))


def test_launching_again(monkeypatch):
    compiled = Compiled()
    first = []
    kernel = {(6,): lambda *arguments, **options: (first.append(arguments), compiled)[1]}
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(
        launching, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 7))
    )
    hooks = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=SimpleNamespace(calls=[]))
    monkeypatch.setattr(launching, "knobs", SimpleNamespace(runtime=hooks))
    x, y = torch.zeros(8), torch.zeros(8)
    variant = launching.Variant({"BLOCK": 8})

    again = launching.launch(kernel, 6, (x, None), (3,), (0.5,), variant)
    assert [len(arguments) for arguments in first] == [4]
    assert first[0][0] is x
    assert compiled.launches == []
    again(16, None)
    directly = (6, 1, 1, 7, "function", "metadata", None, None, None)
    assert compiled.launches.pop() == (*directly, 16, None, 3, 0.5, 8)

    # another call of the same kernel, with another number
    launching.launch(kernel, 6, (y, None), (4,), (0.5,), variant)(32, None)
    assert len(first) == 1
    assert compiled.launches == [(*directly, a, None, 4, 0.5, 8) for a in (y.data_ptr(), 32)]

    # whoever listens to launches, in either of the ways that Triton has had, hears of them
    for listens in (SimpleNamespace(calls=[print]), print):
        for name in ("launch_enter_hook", "launch_exit_hook"):
            monkeypatch.setattr(hooks, name, listens)
            again(48, None)
            assert compiled.launches.pop() == ((6, 1, 1), 7, 48, None, 3, 0.5, 8)
            monkeypatch.setattr(hooks, name, None)


def like_new(device, shape, dtype):
    from entropy_fast.kernels.launch import empties

    make = empties(shape, dtype, torch.device(device))
    made, other = make(), make()
    return made.shape == torch.Size(shape) and made.dtype == dtype and made.is_contiguous() and made is not other


SHAPES = [(), (5,), (2, 3, 4), (0, 3), (4, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_made_as_compiled_code_does(shape, monkeypatch):
    guards = torch._C._dynamo.guards
    monkeypatch.setattr(guards, "_empty_strided_cuda", guards._empty_strided_cpu)
    for device in ("cpu", "cuda"):
        assert like_new(device, shape, torch.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_tensors_made_as_compiled_code_does_on_a_gpu(shape):
    assert like_new(f"cuda:{torch.cuda.current_device()}", shape, torch.float64)


@pytest.mark.gpu
def test_hooks_hear_of_remembered_launches():
    from triton import knobs

    logits, targets = problem(3, 40, device="cuda")
    expected = ef.token_stats(logits, targets)
    heard = []
    hook = knobs.runtime.launch_enter_hook
    listen = lambda metadata: heard.append(metadata.get()["name"])  # noqa: E731
    hook.add(listen)
    try:
        out = ef.token_stats(logits, targets)
    finally:
        hook.remove(listen)
    assert heard == ["row_stats_kernel"]
    assert torch.equal(out.logprob, expected.logprob)


@pytest.mark.gpu
def test_streams_and_devices():
    for device in range(torch.cuda.device_count()):
        for vocab in (40, 128256):
            logits, targets = problem(3, vocab, device=f"cuda:{device}")
            expected = ef.token_stats(logits, targets)
            torch.cuda.synchronize(device)
            for current in range(torch.cuda.device_count()):
                with torch.cuda.stream(torch.cuda.Stream(device)), torch.cuda.device(current):
                    out = ef.token_stats(logits, targets)
                    torch.cuda.synchronize(device)
                assert out.logprob.device == out.entropy.device == logits.device
                assert torch.equal(out.logprob, expected.logprob)
                assert torch.equal(out.entropy, expected.entropy)


@pytest.mark.gpu
@pytest.mark.parametrize("for_graphs", [launching.FOR_GRAPHS, 0])
def test_graphs_capture_remembered_launches(for_graphs, monkeypatch):
    """Of rows that are cut too, whose zeros are the graph's own: launches of two graphs may run at the same time."""
    monkeypatch.setattr(launching, "FOR_GRAPHS", for_graphs)
    monkeypatch.setattr(launching, "_zeros", {})
    monkeypatch.setattr(launching, "_for_graphs", {})
    for vocab in (40, 128256):
        logits, targets = problem(3, vocab, device="cuda")
        first = ef.token_stats(logits, targets)
        torch.cuda.synchronize()
        graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
        outs = []
        for graph in graphs:
            with torch.cuda.graph(graph):
                outs += [ef.token_stats(logits, targets), ef.token_stats(logits, targets)]
        logits.mul_(0.5)
        expected = ef.token_stats(logits, targets)
        assert not torch.equal(expected.logprob, first.logprob)
        streams = [torch.cuda.Stream() for _ in graphs]
        torch.cuda.synchronize()
        for _ in range(20):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for out in outs:
            assert torch.equal(out.logprob, expected.logprob)
            assert torch.equal(out.entropy, expected.entropy)
    left = [len(zeros) for zeros in launching._for_graphs.values()]
    assert left == [0] if for_graphs == 0 else left[0] < for_graphs
