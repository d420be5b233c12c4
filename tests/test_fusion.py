"""Which layers of a model are recognised, what they give when they run as kernels, and that nothing of it stays."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from tiny_models import VOCAB, tiny
from torch import nn
from without_gpu import DEVICES, interpreted, run_interpreted, starter

from bench.tiny_classes import build
from entropy_fast import fusion
from entropy_fast.config import Config
from entropy_fast.errors import InputError
from entropy_fast.fusion import Fusion
from entropy_fast.rollouts import Rollouts
from entropy_fast.scoring import Scoring, score
from entropy_fast.trunk import Trunk


@starter
def test_in_the_interpreter():
    pytest.importorskip("triton")
    run_interpreted(__file__)


@pytest.fixture
def fusible(monkeypatch, request):
    """A CPU under the interpreter taken for a GPU."""
    if "cpu" in request.node.name:
        monkeypatch.setattr(fusion, "on_gpu", lambda _: True)
        monkeypatch.setattr(Trunk, "_fusion_obstacle", lambda *_: "")
        from entropy_fast.kernels import gemm

        # the interpreter cannot multiply bfloat16
        monkeypatch.setattr(gemm, "linear", partial(gemm.linear, piece=torch.float16))


def rollouts(seed=0, prompts=2, group=2, longest=12):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (prompts * group,), generator=g).tolist()
    heads = torch.randint(3, VOCAB, (prompts, 7), generator=g).repeat_interleave(group, 0).tolist()
    return Rollouts.from_lists(heads, [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in lengths])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"norm": 5, "gated MLP": 2, "rotation": 2}),
        ("qwen2", {"norm": 5, "gated MLP": 2, "rotation": 2}),
        ("qwen3", {"norm": 9, "gated MLP": 2, "rotation": 2}),
        ("gemma2", {"norm": 9, "gated MLP": 2, "rotation": 2}),
        ("granite", {"norm": 5, "gated MLP": 2, "rotation": 2}),
        ("cohere", {"gated MLP": 2}),  # LayerNorm, and pairs that lie side by side
        ("phi", {"rotation": 2}),  # LayerNorm; its kernel will refuse the part of a head that phi rotates
        ("gpt2", {}),
    ],
)
def test_layers_are_recognised_by_what_they_compute(name, expected):
    assert Fusion(tiny(name)).kinds == expected


def test_another_spelling_is_left_alone():
    class Louder(tf.models.llama.modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2.0 * super().forward(hidden_states)

    class Same(tf.models.llama.modeling_llama.LlamaRMSNorm):
        """Whatever its name, its code is the usual one."""

    model = tiny("llama")
    model.model.norm.__class__ = Louder
    assert Fusion(model).kinds["norm"] == 4
    model.model.norm.__class__ = Same
    assert Fusion(model).kinds["norm"] == 5


def test_a_forward_on_the_instance_and_an_unknown_activation_are_left_alone():
    model = tiny("llama")
    first, second = model.model.layers
    first.mlp.forward = lambda x: x
    second.mlp.act_fn = nn.Tanh()
    assert "gated MLP" not in Fusion(model).kinds
    with Fusion(model).active():
        assert first.mlp.forward(3) == 3
    assert first.mlp.forward(3) == 3


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("silu", F.silu),
        ("swish", F.silu),
        ("gelu", F.gelu),
        ("gelu_pytorch_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("gelu_new", None),
        ("quick_gelu", None),
        ("gelu_python_tanh", None),
        ("relu", None),
    ],
)
def test_an_activation_is_what_its_kernel_computes(activation, function):
    module = tf.activations.ACT2FN[activation]
    found = fusion._activation(module)
    assert (found is None) == (function is None)
    if function is not None:
        x = torch.linspace(-4, 4, 101)
        torch.testing.assert_close(module(x), function(x), rtol=0, atol=0)
        assert found == {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}.get(activation, activation)


@pytest.mark.usefixtures("fusible")
@pytest.mark.parametrize(
    ("device", "name", "packing"),
    [
        # the interpreter takes its time
        *[
            pytest.param("cpu", *case, marks=interpreted)
            for case in (("qwen3", True), ("gemma2", True), ("llama", False))
        ],
        *[
            pytest.param("cuda", name, packing, marks=pytest.mark.gpu)
            for name in ("llama", "qwen2", "qwen3", "gemma2", "granite")
            for packing in (True, False)
        ],
    ],
)
def test_a_fused_pass_scores_what_the_models_own_code_scores(device, name, packing, monkeypatch):
    from entropy_fast.kernels import layers

    calls = Counter()
    counted = {"rms_norm": layers.rms_norm, "gated": layers.gated, "rotary": layers.rotary}
    for kernel, original in counted.items():

        def counting(*args, kernel=kernel, original=original, **kwargs):
            calls[kernel] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(layers, kernel, counting)
    model, r = tiny(name).to(device), rollouts()
    score(model, r)  # the trial
    calls.clear()
    own = score(model, r, packing=packing, fusion=False)
    assert not calls
    exact = score(tiny(name, dtype=torch.float64).to(device), r, packing=False, fusion=False)
    fused = score(model, r, packing=packing)
    assert fused.layout.fused
    assert not own.layout.fused
    assert set(calls) == {"rms_norm", "gated", "rotary"}
    again = score(model, r, layout=fused.layout)
    assert torch.equal(again.logprob, fused.logprob)
    # no further from the exact sums than the model's own float32 is, but for what rounding deals out to a few tokens
    error, usual = ((s.S.cpu() - exact.S.cpu()).abs().max() for s in (fused, own))
    # (float16 pieces, which the interpreter needs, lose what is below 6e-8)
    assert error <= max(3 * usual, 2e-5 if device == "cuda" else 1e-4)
    assert all("forward" not in vars(module) for module in model.modules())


@torch.no_grad()
@pytest.mark.usefixtures("fusible")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["Mistral", "Mixtral", "Gemma3", "Olmo2", "Glm4", "Phi3", "DeepseekV3", "GptOss"])
def test_layers_of_other_families_compute_what_their_own_code_does(device, family):
    model = build(f"{family}ForCausalLM").to(device).eval()
    fusion_of_it = Fusion(model)
    ids = torch.randint(3, VOCAB, (2, 9), device=device)
    own = model(ids, use_cache=False).logits
    with fusion_of_it.active():
        fused = model(ids, use_cache=False).logits
    assert fusion_of_it.kinds
    # two layers of float32
    assert (fused - own).abs().max() <= 1e-5 * own.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_a_fused_pass_is_as_near_to_float32(dtype):
    model, r = tiny("qwen3", dtype=dtype).cuda(), rollouts(longest=100)
    exact = score(model, r, precision="float32", fusion=False)
    fused, own = score(model, r, fusion=True), score(model, r, fusion=False)
    noise = [(s.logprob - exact.logprob).square().mean().sqrt() for s in (fused, own)]
    assert noise[0] < 1.5 * noise[1]


@pytest.mark.usefixtures("fusible")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_in_float32_both_layouts_have_the_same_attention(device, name, monkeypatch):
    from entropy_fast.kernels import attention

    segments, original = [], attention.segment_attention
    monkeypatch.setattr(
        attention, "segment_attention", lambda q, *args: segments.append(len(args[3][0]) - 1) or original(q, *args)
    )
    model, r = tiny(name).to(device), rollouts(longest=40)
    row, rows = score(model, r), score(model, r, packing=False)
    assert set(segments) >= {2 + len(r), len(r)}  # prompts and completions; rows
    assert (row.S - rows.S).abs().max() < 2e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_float32_S_has_the_same_bits_in_every_layout(name, dtype):
    model, r = tiny(name, dtype=dtype).cuda(), rollouts(prompts=4, group=4, longest=100)
    row, rows, alone = (
        score(model, r, precision="float32", **layout)
        for layout in ({}, {"packing": False}, {"packing": False, "max_sequences": 1})
    )
    assert row.layout.fused
    assert torch.equal(row.logprob, rows.logprob)
    assert torch.equal(row.logprob, alone.logprob)
    assert torch.equal(row.entropy, alone.entropy)


@pytest.mark.usefixtures("fusible")
@pytest.mark.parametrize("device", DEVICES)
def test_a_kernel_that_gives_something_else_is_not_used(device, monkeypatch):
    from entropy_fast.kernels import layers

    original = layers.rms_norm
    monkeypatch.setattr(layers, "rms_norm", lambda *args: 1.001 * original(*args))
    model, r = tiny("llama").to(device), rollouts()
    careful = score(model, r)
    assert not careful.layout.fused
    assert torch.equal(careful.logprob, score(model, r, fusion=False).logprob)
    with pytest.raises(InputError, match="cannot be fused, because its hidden states came out differently when fused"):
        score(model, r, fusion=True)


@pytest.mark.usefixtures("fusible")
@pytest.mark.parametrize("device", DEVICES)
def test_the_models_own_code_comes_back_after_an_error(device):
    model = tiny("llama").to(device)

    def fail(module, *_):
        assert "forward" in vars(module)
        raise RuntimeError("planted")

    model.model.norm.register_forward_hook(fail)
    with Fusion(model).active(), pytest.raises(RuntimeError, match="planted"):
        model(torch.arange(8, device=device)[None])
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.usefixtures("fusible")
@pytest.mark.parametrize("device", DEVICES)
def test_passes_with_gradients_run_the_models_own_code(device):
    model, ids = tiny("llama").to(device), torch.arange(8, device=device)[None]
    own = model(ids).logits
    with Fusion(model).active():
        logits = model(ids).logits
    assert torch.equal(logits, own)
    logits.sum().backward()
    assert model.model.norm.weight.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.usefixtures("fusible")
@pytest.mark.parametrize("device", DEVICES)
def test_what_a_hook_has_kept_is_not_written_over(device):
    mlp = tiny("llama").to(device).model.layers[0].mlp
    x, kept = torch.randn(1, 4, 32, device=device), []
    mlp.gate_proj.register_forward_hook(lambda _, __, output: kept.append(output))
    with Fusion(mlp).active():
        fused = mlp(x)
    torch.testing.assert_close(fused, mlp(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(kept[0], kept[1])


@torch.no_grad()
@pytest.mark.usefixtures("fusible")
@pytest.mark.parametrize("device", DEVICES)
def test_tensors_that_a_kernel_does_not_serve_go_the_usual_way(device):
    model = tiny("llama").to(device)
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    with Fusion(model).active():
        wide = torch.randn(2, 64, device=device)[:, ::2]  # every other entry
        torch.testing.assert_close(norm(wide), norm(wide.contiguous()))
        low = torch.randn(2, 32, device=device, dtype=torch.bfloat16)  # promoted by the weight
        assert norm(low).dtype == torch.float32
        assert norm(hidden_states=wide).shape == wide.shape
        assert norm(torch.empty(0, 32, device=device)).shape == (0, 32)
        assert mlp(torch.empty(0, 32, device=device)).shape == (0, 32)


@torch.no_grad()
@pytest.mark.usefixtures("fusible")
@pytest.mark.parametrize("device", DEVICES)
def test_a_linear_layer_refuses_what_its_own_code_refuses(device):
    layer = nn.Linear(16, 5).to(device)
    fused = Fusion(layer, single=True)
    assert fused.kinds == {"linear": 1}
    with fused.active():
        assert layer(torch.randn(2, 16, device=device)).shape == (2, 5)
        for wrong in (torch.randn(4, 8, device=device), torch.randn(3, 32, device=device)):
            with pytest.raises(RuntimeError):
                layer(wrong)


@pytest.mark.usefixtures("fusible")
@pytest.mark.parametrize("device", DEVICES)
def test_a_hook_on_the_heads_input_runs_once(device):
    model, r = tiny("llama").to(device), rollouts()
    plain = score(model, r, fusion=False)
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (1.7 * inputs[0],))
    own, fused = score(model, r, fusion=False), score(model, r)
    assert fused.layout.fused
    assert (own.S - plain.S).abs().max() > 1.0
    assert (own.S - fused.S).abs().max() < 1e-3


@pytest.mark.usefixtures("fusible")
@pytest.mark.parametrize("device", DEVICES)
def test_what_was_tried_in_one_dtype_is_tried_again_in_another(device, monkeypatch):
    from entropy_fast.kernels import gemm

    model, r = tiny("llama", dtype=torch.float16).to(device), rollouts()
    assert score(model, r, packing=False).layout.fused
    original = gemm.linear
    monkeypatch.setattr(gemm, "linear", lambda *args, **options: 1.001 * original(*args, **options))
    assert not score(model.float(), r, packing=False).layout.fused


@torch.no_grad()
@pytest.mark.usefixtures("fusible")
@pytest.mark.parametrize("device", DEVICES)
def test_autocast_reaches_linear_layers(device):
    layer, x = nn.Linear(16, 8).to(device), torch.randn(3, 16, device=device)
    with Fusion(layer, single=True).active(), torch.autocast(device, dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_forward_that_came_later_is_there_afterwards():
    pytest.importorskip("triton")
    model = tiny("llama")
    fused, norm = Fusion(model), model.model.norm
    norm.forward = lambda x: x
    theirs = norm.forward
    with fused.active(), fused.active():
        assert norm.forward is not theirs
    assert norm.forward is theirs


def test_a_compiled_part_makes_a_compiled_model():
    model = tiny("llama")
    assert not fusion.is_compiled(model)
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert fusion.is_compiled(model)


def test_threads_that_score_one_model_take_turns():
    model, r = tiny("llama", dtype=torch.bfloat16), rollouts()
    alone = score(model, r, precision="float32")
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda _: score(model, r, precision="float32"), range(8)))
    assert all(torch.equal(scores.logprob, alone.logprob) for scores in together)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_cpu_says_that_it_has_no_kernels():
    model, r = tiny("llama"), rollouts()
    assert not score(model, r).layout.fused
    with pytest.raises(InputError, match=r"LlamaForCausalLM cannot be fused, because .* GPUs .* fusion=False"):
        score(model, r, fusion=True)


def test_the_configuration_reaches_the_scoring():
    model = tiny("llama")
    for value, expected in (("auto", None), (False, False), (True, True)):
        config = Config.from_dict({"memory_config": {"fusion": value}})
        assert Scoring.from_config(config, model).fusion is expected
