"""Other weights for as long as a `with` lasts, and the old ones back, exactly."""

import copy

import pytest
import torch
from tiny_models import tiny

from entropy_fast.errors import InputError
from entropy_fast.policies import adapter_direction, adapter_off, moved, state_difference, with_state

IDS = torch.tensor([[5, 6, 7, 8]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def bits(model):
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}


def assert_unmoved(model, before):
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p, before[name][1])


@pytest.mark.parametrize("tied", [False, True])
def test_another_models_weights_and_back(tied):
    model, other = (tiny("llama", seed=seed, tie_word_embeddings=tied) for seed in (0, 1))
    before, own = bits(model), logits(model)
    with with_state(model, other.state_dict()):
        assert torch.equal(logits(model), logits(other))
    assert_unmoved(model, before)
    assert torch.equal(logits(model), own)
    with moved(state_difference(model, other.state_dict()), 1.0):
        torch.testing.assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-4)
    assert_unmoved(model, before)


def test_weights_come_back_after_an_exception():
    model, other = tiny("llama"), tiny("llama", seed=1)
    before = bits(model)
    with pytest.raises(RuntimeError, match="planted"), with_state(model, other.state_dict()):
        raise RuntimeError("planted")
    assert_unmoved(model, before)


def test_moving_along_a_direction_is_linear_in_eta():
    model = tiny("llama", dtype=torch.float64)
    v = {p: torch.randn_like(p) for p in list(model.parameters())[:3]}
    start = {p: p.detach().clone() for p in v}
    for eta in (0.5, -2.0):
        with moved(v, eta):
            for p in v:
                torch.testing.assert_close(p.data, start[p] + eta * v[p], rtol=0, atol=0)
    assert all(torch.equal(p, start[p]) for p in v)


def test_low_precision_weights_can_keep_a_small_step():
    model = tiny("llama", dtype=torch.bfloat16)
    p = model.model.layers[0].mlp.up_proj.weight
    v = {p: torch.full(p.shape, 1e-6)}
    with moved(v, 1.0):
        assert p.dtype == torch.bfloat16
        rounded = p.data.float()
    before = p.detach().float()
    with moved(v, 1.0, round_to_dtype=False):
        assert p.dtype == torch.float32
        torch.testing.assert_close(p.data, before + 1e-6, rtol=0, atol=1e-9)
    assert (rounded != before).float().mean() < 0.1


def test_an_adapter_switched_off_is_the_base_policy():
    peft = pytest.importorskip("peft")
    base = tiny("llama", dtype=torch.float64)
    expected = logits(base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config).double().eval()
    adapted = logits(model)
    assert not torch.allclose(adapted, expected)
    with adapter_off(model):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    assert torch.equal(logits(model), adapted)
    with pytest.raises(InputError, match="no adapter"), adapter_off(base):
        pass


def test_a_state_dict_of_another_model_is_refused():
    model = tiny("llama")
    with pytest.raises(InputError, match="which LlamaForCausalLM lacks"), with_state(model, {"nope": torch.ones(1)}):
        pass
    with (
        pytest.raises(InputError, match=r"has shape \(2, 2\) in the state dict"),
        with_state(model, {"lm_head.weight": torch.ones(2, 2)}),
    ):
        pass
    with pytest.raises(InputError, match="which LlamaForCausalLM lacks"):
        state_difference(model, {"nope": torch.ones(1)})
    # a (1, 1) tensor would broadcast into a direction that no policy lies in
    with pytest.raises(InputError, match=r"has shape \(1, 1\) in the state dict"):
        state_difference(model, {"lm_head.weight": torch.ones(1, 1)})


def test_a_lora_adapter_is_a_direction_from_its_base():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama", dtype=torch.float64), config).double().eval()
    adapted = logits(model)
    v = adapter_direction(model)
    assert len(v) == 4  # two modules in each of two layers
    with adapter_off(model), moved(v, 1.0):
        # the adapter's matrices pass through float32 on their way into v
        torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="no LoRA matrices"):
        adapter_direction(tiny("llama"))
    whole = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(InputError, match="replaces .*lm_head as a whole"):
        adapter_direction(peft.get_peft_model(tiny("llama"), whole))
