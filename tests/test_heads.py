"""What a model does after its last hidden state: found, verified, and never guessed."""

import warnings

import pytest
import torch
from tiny_models import CONFIGS, tiny
from torch import nn

from entropy_fast.errors import EntropyFastWarning, InputError
from entropy_fast.heads import HeadTransform, eos_token_ids, find_head, register_head_transform
from entropy_fast.rollouts import Rollouts
from entropy_fast.scoring import score

EXPECTED = {
    "gemma2": HeadTransform(softcap=3.0),
    "cohere": HeadTransform(scale=0.0625),
    "granite": HeadTransform(scale=0.125),
}


def rollouts(seed=1, n=4):
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        return torch.randint(3, 100, (int(torch.randint(low, high, (), generator=g)),), generator=g).tolist()

    return Rollouts.from_lists([ids(2, 6) for _ in range(n)], [ids(3, 9) for _ in range(n)])


def from_own_logits(model, r, temperature=1.0):
    """S and R of each sequence, in float64, from the model's logits of that sequence alone."""
    S, R = [], []
    for i in range(len(r)):
        ids = r.tokens[i][r.attention_mask[i]][None]
        with torch.no_grad():
            logp = (model(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)
        start, stop = int(r.prompt_lens[i]), ids.shape[1]
        S.append(logp[range(start - 1, stop - 1), ids[0, start:]].sum())
        R.append(-(logp.exp() * logp)[start - 1 : stop - 1].sum())
    return torch.stack(S), torch.stack(R)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_transform_is_found_and_verified(name, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error", EntropyFastWarning)
        head = find_head(tiny(name, dtype=dtype))
    assert head.mode == "fused"
    assert head.transform == EXPECTED.get(name, HeadTransform())
    assert head.vocab_size == 101


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_equal_those_from_the_models_own_logits(name, temperature):
    model, r = tiny(name, dtype=torch.float64), rollouts()
    scores = score(model, r, temperature=temperature)
    S, R = from_own_logits(model, r, temperature)
    # Gemma 2's own attention rounds its softmax to float32 even in float64; a packed row's does not
    tolerance = 1e-6 if name == "gemma2" else 1e-11
    torch.testing.assert_close(scores.S, S, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(scores.R, R, rtol=tolerance, atol=tolerance)


def missed_softcap(model):
    return HeadTransform()


def wrong_softcap(model):
    return HeadTransform(softcap=3.1)


@pytest.mark.parametrize("rule", [missed_softcap, wrong_softcap])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_rule_is_noticed_and_the_models_own_logits_are_used(rule, dtype, monkeypatch):
    model = tiny("gemma2")
    monkeypatch.setitem(__import__("entropy_fast.heads").heads._RULES, "Gemma2ForCausalLM", rule)
    with pytest.warns(EntropyFastWarning, match="does not reproduce the model's logits.*register_head_transform"):
        assert find_head(model.to(dtype)).mode == "logits"
    r = rollouts()
    model = model.double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EntropyFastWarning)
        scores = score(model, r)
    torch.testing.assert_close(scores.S, from_own_logits(model, r)[0], rtol=1e-11, atol=1e-11)


def test_an_unknown_class_can_be_registered(monkeypatch):
    base = type(tiny("llama"))

    class Doubled(base):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model = tiny("llama", dtype=torch.float64)
    model.__class__ = Doubled
    with pytest.warns(EntropyFastWarning, match="Doubled: the model's own logits are used"):
        assert find_head(model).mode == "logits"
    rules = __import__("entropy_fast.heads").heads._RULES
    monkeypatch.setitem(rules, "Doubled", None)  # so that the test's own rule is taken out again
    register_head_transform("Doubled", lambda model: HeadTransform(scale=2.0))
    head = find_head(model)
    assert (head.mode, head.transform.scale) == ("fused", 2.0)
    r = rollouts()
    torch.testing.assert_close(score(model, r).S, from_own_logits(model, r)[0], rtol=1e-11, atol=1e-11)


def test_a_head_wrapped_by_an_adapter_is_called_in_chunks(monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("entropy_fast.scoring._HEAD_ROWS", 5)
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny("gemma2"), config).double().eval()
    r = rollouts()
    with pytest.warns(EntropyFastWarning, match="head module is called on chunks"):
        # right-padded: Gemma 2's own attention rounds its softmax to float32 even in float64, a packed row's does not
        scores = score(model, r, packing=False)
    torch.testing.assert_close(scores.S, from_own_logits(model, r)[0], rtol=1e-11, atol=1e-11)


def test_a_lora_adapter_beside_the_head_stays_fused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny("cohere"), config).double().eval()
    r = rollouts()
    assert find_head(model).mode == "fused"
    torch.testing.assert_close(score(model, r).S, from_own_logits(model, r)[0], rtol=1e-11, atol=1e-11)


def test_finding_the_head_leaves_the_model_as_it_was():
    model = tiny("llama").train()
    model.model.layers[0].eval()
    flags = [m.training for m in model.modules()]
    find_head(model)
    score(model, rollouts())
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_logits_is_refused():
    from transformers import LlamaModel

    with pytest.raises(ValueError, match="returns no logits"):
        find_head(LlamaModel(tiny("llama").config))


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(InputError, match="T5ForConditionalGeneration is an encoder-decoder"):
        find_head(T5ForConditionalGeneration(config))


def test_eos_ids_are_joined_from_everywhere():
    model = tiny("llama")
    model.generation_config.eos_token_id = [2, 7]
    tokenizer = type("Tokenizer", (), {"eos_token_id": 9})()
    assert eos_token_ids(model) == (2, 7)
    assert eos_token_ids(model, tokenizer) == (2, 7, 9)
    assert eos_token_ids(nn.Linear(2, 2)) == ()


def test_a_hook_before_a_head_that_is_called_runs_once():
    class Other(torch.nn.Linear):
        """A head that is no plain linear layer, so that it is called."""

    model = tiny("llama")
    model.lm_head.__class__ = Other
    r = Rollouts.from_lists([[5, 6]], [[7, 8, 9]])
    with pytest.warns(EntropyFastWarning, match="head module is called on chunks"):
        plain = score(model, r)
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (1.7 * inputs[0],))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EntropyFastWarning)
        hooked = score(model, r)
    logp = model(r.tokens).logits[0].double().log_softmax(-1)
    expected = logp[torch.arange(1, 4), r.tokens[0, 2:]].sum()
    assert abs(float(plain.S - expected)) > 0.1
    torch.testing.assert_close(hooked.S[0], expected, rtol=1e-5, atol=1e-4)
    assert len(model.lm_head._forward_pre_hooks) == 1
