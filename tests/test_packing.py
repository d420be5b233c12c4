"""Packed rows against right-padded ones and against each sequence alone; models that cannot be packed."""

import warnings

import pytest
import torch
import transformers as tf
from tiny_models import VOCAB, tiny

from entropy_fast.config import Config
from entropy_fast.errors import EntropyFastWarning, InputError
from entropy_fast.layout import DenseRollouts, Layout
from entropy_fast.microbatch import Segments, packed
from entropy_fast.packing import attention, attention_configs, packed_attention
from entropy_fast.rollouts import Rollouts
from entropy_fast.scoring import Scorer, Scoring, score


def grouped(seed=0, prompts=3, group=4, longest=30):
    """Prompts of uneven length with `group` completions each, some of them empty or of one token."""
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        n = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(3, VOCAB, (n,), generator=g).tolist()

    heads = [p for p in (ids(1, 20) for _ in range(prompts)) for _ in range(group)]
    tails = [ids(0, longest) for _ in heads]
    tails[1], tails[2] = [], [7]
    return Rollouts.from_lists(heads, tails)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "cohere", "phi"])
@pytest.mark.parametrize("budget", [2048, 40])
def test_packed_rows_score_what_padded_rows_and_lone_sequences_score(name, budget):
    model, r = tiny(name, dtype=torch.float64), grouped()
    row = score(model, r, packing=True, token_budget=budget)
    rows = score(model, r, packing=False, token_budget=budget)
    alone = score(model, r, packing=False, max_sequences=1)
    assert row.layout.packed
    assert not rows.layout.packed
    for other in (rows, alone):
        torch.testing.assert_close(row.logprob, other.logprob, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(row.entropy, other.entropy, rtol=1e-11, atol=1e-11)


def test_float32_stays_within_a_ten_thousandth_of_a_nat():
    model, r = tiny("llama"), grouped(seed=1, longest=110)
    row, rows = score(model, r, packing=True), score(model, r, packing=False)
    assert (row.S - rows.S).abs().max() < 1e-4


@pytest.mark.parametrize("window", [1, 3, 8, 64])
def test_sliding_windows_reach_as_far_as_the_model_says(window):
    model = tiny("qwen2", dtype=torch.float64, use_sliding_window=True, sliding_window=window)
    model.config.layer_types = ["sliding_attention"] * 2
    for layer in model.model.layers:
        layer.self_attn.sliding_window, layer.self_attn.layer_type = window, "sliding_attention"
        layer.attention_type = "sliding_attention"
    model.model.has_sliding_layers = True
    r = grouped(seed=2)
    row, rows = score(model, r, packing=None), score(model, r, packing=False)
    assert row.layout.packed
    torch.testing.assert_close(row.S, rows.S, rtol=1e-11, atol=1e-11)


def windowed_by_its_mask():
    """A model whose window stands in its mask alone, which is not made for a packed row."""
    config = tf.PhimoeConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=512,
        sliding_window=70, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.PhimoeForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0 if p.ndim == 2 else 1.0)
    return model


def test_a_window_that_only_the_models_own_mask_knows_is_not_lost():
    model, r = windowed_by_its_mask(), grouped(seed=3, prompts=1, longest=200)
    assert int(r.attention_mask.sum(1).max()) > 70
    free = score(model, r, token_budget=64)
    assert not free.layout.packed
    torch.testing.assert_close(free.S, score(model, r, packing=False).S, rtol=1e-5, atol=1e-4)
    with pytest.raises(InputError, match="came out differently when packed"):
        score(model, r, token_budget=64, packing=True)


def test_a_softcap_and_a_sink_enter_the_softmax():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    sink = torch.randn(2, dtype=torch.float64)
    model = tiny("llama")
    with packed_attention(attention_configs(model), Segments((5,), (5,), None)):
        out, _ = attention(torch.nn.Module(), q, k, v, None, scaling=0.5, softcap=2.0, s_aux=sink)
    for head in range(2):
        for i in range(5):
            z = 2.0 * torch.tanh(0.5 * (k[0, head, : i + 1] @ q[0, head, i]) / 2.0)
            weights = z.exp() / (z.exp().sum() + sink[head].exp())
            torch.testing.assert_close(out[0, i, head], weights @ v[0, head, : i + 1])


def softcapped(attention):
    """Gemma 2 with attention that its softcap changes."""
    model = tiny("gemma2", dtype=torch.float64, attn_logit_softcapping=0.5)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data *= 30
    # the setter of a release that refuses SDPA for it would not let this through
    model.config._attn_implementation_internal = attention
    return model


def test_a_softcap_that_sdpa_drops_is_dropped_when_packed_and_one_warning_says_so(monkeypatch):
    own = tf.AttentionInterface._global_mapping["sdpa"]

    def dropping(*arguments, softcap=None, **options):
        """SDPA as in releases that do not refuse a softcap."""
        return own(*arguments, **options)

    monkeypatch.setitem(tf.AttentionInterface._global_mapping, "sdpa", dropping)
    r, model, eager = grouped(), softcapped("sdpa"), softcapped("eager")
    with pytest.warns(EntropyFastWarning, match=r"SDPA leaves out .*\(attn_logit_softcapping=0\.5\).*'eager'") as said:
        plain = score(model, r, packing=False)
    assert len(said) == 1
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", EntropyFastWarning)
        row = score(model, r, packing=True)
        longer = score(model, grouped(longest=60), packing=True)
        trained = score(eager, r, packing=True)
        padded = score(eager, r, packing=False)
    assert row.layout.packed
    assert longer.layout.packed
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(row.S, plain.S, rtol=1e-11, atol=1e-11)
    # transformers' eager softmax is in float32 whatever the model is in
    torch.testing.assert_close(trained.S, padded.S, rtol=0, atol=1e-4)
    assert (trained.S - row.S).abs().max() > 1e-2


def test_a_prompt_stands_once_in_its_row():
    r = Rollouts.from_lists([[5, 6, 7]] * 3 + [[8, 9]], [[20, 21, 2], [30, 31], [40], [50, 51]])
    dense = DenseRollouts.pack(r, Scorer(tiny("llama"), r, Scoring()).masks)
    batch = packed(dense, (0, 1, 2, 3), torch.device("cpu"), torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 7, 20, 21, 30, 8, 9, 50]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert batch.targets.tolist() == [20, 21, 2, 30, 31, 40, 50, 51]
    assert batch.active.tolist() == [2, 3, 4, 2, 5, 2, 7, 8]


def test_layouts_by_prompt_hold_every_sequence_once_in_even_shares():
    r = grouped(seed=3, prompts=9)
    dense = Scorer(tiny("llama"), r, Scoring()).dense
    layout = Layout.by_prompt(dense, 100)
    held = [i for group in layout.microbatches for i in group]
    assert sorted(held) == [i for i in range(len(r)) if dense.input_lengths[i] > 0]
    assert all(layout.tokens(dense, group) <= 100 or len(group) == 1 for group in layout.microbatches)


@pytest.mark.parametrize("packing", [True, False])
def test_the_same_weights_score_to_the_same_bits(packing):
    model, r = tiny("qwen2", dtype=torch.bfloat16), grouped()
    first = score(model, r, packing=packing)
    again = score(model, r, layout=first.layout)
    assert torch.equal(first.logprob, again.logprob)
    assert torch.equal(first.entropy, again.entropy)


def test_the_model_gets_its_attention_back_also_after_an_error():
    model, r = tiny("llama"), grouped()
    before = model.config._attn_implementation
    score(model, r)
    assert model.config._attn_implementation == before

    def fail(*_):
        raise RuntimeError("planted")

    model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        score(model, r)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(("key", "packed"), [("auto", True), ("true", True), ("false", False)])
def test_the_configuration_chooses(key, packed):
    model = tiny("llama")
    scoring = Scoring.from_config(Config().override([f"memory_config.packing={key}"]), model)
    assert score(model, grouped(), scoring).layout.packed is packed


def recurrent():
    torch.manual_seed(0)
    config = tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    return tf.AutoModelForCausalLM.from_config(config).eval()


def test_a_recurrent_model_is_padded_and_says_why_when_packing_is_insisted_on():
    model, r = recurrent(), grouped()
    assert not score(model, r).layout.packed
    with pytest.raises(InputError, match="cannot be packed, because"):
        score(model, r, packing=True)


def test_a_leak_between_sequences_is_noticed():
    """A short convolution over the row: only the first tokens of a segment see a neighbour."""
    model, r = tiny("llama"), grouped()
    norm = model.model.norm
    norm.register_forward_hook(lambda _, __, h: h + 0.1 * torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1))
    assert not score(model, r).layout.packed


@pytest.mark.parametrize("leak", [1e-1, 1e-4])
@pytest.mark.parametrize("experts", [0, 2])
def test_a_small_leak_is_noticed_in_a_mixture_of_experts_too(leak, experts):
    model, r = tiny("llama", **({"num_experts": experts} if experts else {})), grouped()
    norm = model.model.norm
    norm.register_forward_hook(lambda _, __, h: h + leak * torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1))
    assert not score(model, r).layout.packed


def test_a_model_that_looks_ahead_is_refused():
    model, r = tiny("llama"), grouped()
    model.model.norm.register_forward_hook(lambda _, __, h: h + 0.1 * h.mean(1, keepdim=True))
    with pytest.raises(InputError, match="is not causal"):
        score(model, r)


BIDIRECTIONAL = {
    "is_decoder=True": lambda: tf.BertLMHeadModel(
        tf.BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
    "causal=True": lambda: tf.XLMWithLMHeadModel(tf.XLMConfig(vocab_size=VOCAB, emb_dim=32, n_layers=2, n_heads=4)),
    "attn_type='uni'": lambda: tf.XLNetLMHeadModel(
        tf.XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48)
    ),
    "no switch for that": lambda: tf.CpmAntForCausalLM(
        tf.CpmAntConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, dim_head=8)
    ),
}


@pytest.mark.parametrize("remedy", BIDIRECTIONAL)
def test_the_refusal_names_the_switch_that_a_configuration_has(remedy):
    torch.manual_seed(0)
    with pytest.raises(InputError, match=f"is not causal.*{remedy}"):
        score(BIDIRECTIONAL[remedy]().eval(), grouped())


def test_the_switch_makes_it_causal():
    torch.manual_seed(0)
    model = tf.XLMWithLMHeadModel(tf.XLMConfig(vocab_size=VOCAB, emb_dim=32, n_layers=2, n_heads=4, causal=True)).eval()
    assert score(model, grouped()).S.isfinite().all()


@pytest.mark.parametrize("call", range(6))
def test_a_difference_that_comes_once_does_not_block_a_layout(call):
    """As when rounding swaps two nearly tied experts in one of a trial's passes."""
    model, r = tiny("llama", num_experts=2), grouped()
    calls = []

    def swapped(_, __, h):
        calls.append(1)
        h[:, h.shape[1] // 2 :] += 0.01 * (len(calls) == call + 2)  # the first calls are the head's verification
        return h

    model.model.norm.register_forward_hook(swapped)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EntropyFastWarning)
        assert score(model, r).layout.packed


def test_a_model_that_padding_disturbs_is_scored_one_sequence_at_a_time():
    model, r = tiny("llama"), grouped()

    def disturbed(_, __, h):
        return h * (1.0 + 0.01 * (h.shape[0] - 1))

    model.model.norm.register_forward_hook(disturbed)
    with pytest.warns(EntropyFastWarning, match="one at a time"):
        scores = score(model, r)
    assert all(len(group) == 1 for group in scores.layout.microbatches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_flash_attention_is_as_near_to_float64_as_padding_is(name):
    r = grouped(prompts=8)
    model = tiny(name, dtype=torch.bfloat16)
    exact = score(tiny(name, dtype=torch.bfloat16).double(), r, packing=False)
    model = model.cuda()
    # where the model's own attention leaves Gemma 2's softcap out (some releases' SDPA does), falling back is right
    row, rows = score(model, r, packing=None if name == "gemma2" else True), score(model, r, packing=False)
    noise = (rows.logprob - exact.logprob).square().mean()
    assert (row.logprob - exact.logprob).square().mean() < 4 * noise
