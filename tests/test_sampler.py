"""The proposal's interface on real (tiny) models, against float64 arithmetic, and the old code's defects."""

import copy
import logging
import math
from contextlib import nullcontext

import pytest
import torch
from tiny_models import tiny

from entropy_fast import ImportanceSampler, InputError, ProbeComponents, Rollouts
from entropy_fast.policies import adapter_off, moved, state_difference, with_state
from entropy_fast.psis import psislw

B, G, P, T = 4, 3, 3, 10
EOS = 2


def batch(seed=0, b=B):
    """Random sequences with an EOS here and there, and a mask that ends with the first."""
    g = torch.Generator().manual_seed(seed)
    sequences = torch.randint(3, 100, (b, G, T), generator=g)
    sequences[torch.rand(b, G, T, generator=g) < 0.1] = EOS
    sequences[:, :, :P] = sequences[:, :1, :P].clamp_min(3)
    ended = (sequences[:, :, P:] == EOS).int().cumsum(2)
    after = torch.cat([torch.zeros(b, G, P), (ended.cumsum(2) > 1).float()], 2)
    return {
        "sequences": sequences,
        "prompt_lens": torch.full((b,), P),
        "attention_masks": 1 - after,
        "advantages": torch.randn(b, G, generator=g),
        "max_lengths": torch.randint(7, 12, (b,), generator=g),
    }


def model64(name="llama", **changes):
    return tiny(name, dtype=torch.float64, spread=2.0, **changes)


def token_scores(model, data, temperature=1.0):
    """(B, G, T) log-probs and entropies of the generated tokens, differentiable, from the model's own logits."""
    sequences = data["sequences"].reshape(-1, T)
    logits = model(input_ids=sequences, attention_mask=data["attention_masks"].reshape(-1, T).long()).logits
    logp = (logits / temperature).log_softmax(-1)[:, :-1]
    picked = logp.gather(2, sequences[:, 1:, None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    generated = data["attention_masks"].reshape(-1, T).bool().clone()
    generated[:, :P] = False
    zero = picked.new_zeros(len(picked), 1)
    shape = data["sequences"].shape
    return (torch.cat([zero, x], 1).where(generated, 0.0).reshape(shape) for x in (picked, entropy))


def loss_of(kind, logp, data):
    lengths = data["attention_masks"][:, :, P:].sum(2)
    if kind == "nll":
        return -logp.sum() / lengths.sum()
    return -(data["advantages"] * logp.sum(2) / (G * data["max_lengths"][:, None])).sum(1).mean()


def optimizers(parameters):
    return {
        "adamw": lambda: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1),
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    }


def expected_change(model, data, kind, make_optimizer, temperature=1.0):
    """ΔH by hand on a copy: one autograd step over the whole batch at once, then the formulas of the proposal."""
    with torch.no_grad():
        S0, R0 = (x.sum(2) for x in token_scores(model, data, temperature))
    trained = copy.deepcopy(model)
    optimizer = make_optimizer(list(trained.parameters()))
    logp, _ = token_scores(trained, data, temperature)
    loss_of(kind, logp, data).backward()
    optimizer.step()
    with torch.no_grad():
        S1, R1 = (x.sum(2) for x in token_scores(trained, data, temperature))
    w, L = (S1 - S0).exp(), data["attention_masks"][:, :, P:].sum(2)
    return {
        "w": w,
        "S0": S0,
        "S1": S1,
        "sequence": (-S0.mean(), -(w * S1).sum() / w.sum()),
        "per_token": (-S0.sum() / L.sum(), -(w * S1).sum() / (w * L).sum()),
        "is": (-S0.mean(), -(w * S1).mean()),
        "clip": (-S0.mean(), -(w.clamp_max(1.05) * S1).sum() / w.clamp_max(1.05).sum()),
        "rao_blackwell": (R0.mean(), (w * R1).sum() / w.sum()),
    }


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


CASES = {
    "sequence": {},
    "per_token": {"entropy": {"unit": "per_token"}},
    "is": {"importance_sampling": {"use_snis": False}},
    "clip": {"importance_sampling": {"is_mode": "clip", "clip_c": 1.05}},
    "rao_blackwell": {"entropy": {"integrand": "rao_blackwell"}},
}


@pytest.mark.parametrize("kind", ["nll", "rl"])
@pytest.mark.parametrize("case", CASES)
def test_entropy_change_equals_the_formulas(case, kind):
    model, data = model64(), batch()
    config = copy.deepcopy(CASES[case])
    config.setdefault("importance_sampling", {})["training_loss"] = kind
    expected = expected_change(model, data, kind, adamw)
    result = ImportanceSampler(model, config).compute_entropy_change(data, adamw(model.parameters()))
    original, updated = map(float, expected[case])
    assert result["original_entropy"] == pytest.approx(original, rel=1e-10)
    assert result["updated_entropy"] == pytest.approx(updated, rel=1e-10)
    assert result["deltaH_snis"] == pytest.approx(updated - original, abs=1e-9)
    w = expected["w"].flatten()
    assert result["ESS"] == pytest.approx(float(w.sum() ** 2 / w.square().sum()), rel=1e-9)


def test_plain_importance_sampling_uses_unshifted_weights():
    """Weights divided by their maximum would scale the updated entropy by 1 / max w."""
    model, data = model64(), batch()
    expected = expected_change(model, data, "nll", adamw)
    result = ImportanceSampler(model, CASES["is"]).compute_entropy_change(data, adamw(model.parameters()))
    shifted = -(expected["w"] / expected["w"].max() * expected["S1"]).mean()
    assert abs(result["updated_entropy"] - float(shifted)) > 1e-3
    assert result["updated_entropy"] == pytest.approx(float(expected["is"][1]), rel=1e-10)


def test_khat_is_that_of_the_weights():
    model, data = model64(), batch(b=16)
    expected = expected_change(model, data, "nll", adamw)
    result = ImportanceSampler(model).compute_entropy_change(data, adamw(model.parameters()))
    assert result["psis_k"] == pytest.approx(float(psislw(expected["w"].flatten().log())[1]), abs=1e-6)


def test_khat_of_too_few_weights_is_infinite_rather_than_made_up():
    model, data = model64(), batch()
    result = ImportanceSampler(model).compute_entropy_change(data, adamw(model.parameters()))
    assert math.isinf(result["psis_k"])


@pytest.mark.parametrize("kind", ["nll", "rl"])
def test_temperature_applies_to_scoring_and_to_the_update(kind):
    model, data = model64(), batch()
    expected = expected_change(model, data, kind, adamw, temperature=0.7)
    config = {"generation": {"temperature": 0.7}, "importance_sampling": {"training_loss": kind}}
    result = ImportanceSampler(model, config).compute_entropy_change(data, adamw(model.parameters()))
    assert result["original_entropy"] == pytest.approx(float(expected["sequence"][0]), rel=1e-10)
    assert result["updated_entropy"] == pytest.approx(float(expected["sequence"][1]), rel=1e-10)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_microbatches_of_any_size_give_the_same_step(size):
    """Gradients normalised by the microbatch as well as by the batch would depend on its size."""
    model, data = model64(), batch()
    memory = {name: size for name in ("importance_microbatch_size", "microbatch_size", "teacher_force_microbatch_size")}
    for kind in ("nll", "rl"):
        original, updated = expected_change(model, data, kind, adamw)["sequence"]
        config = {"memory_config": memory, "importance_sampling": {"training_loss": kind}}
        result = ImportanceSampler(model, config).compute_entropy_change(data, adamw(model.parameters()))
        assert result["deltaH_snis"] == pytest.approx(float(updated - original), abs=1e-9)


def state_of(model, optimizer):
    """Everything that has to come back, copied, with the identities of the tensors."""
    tensors = {name: (t, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    grads = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    states = {
        p: {k: (v, v.clone() if isinstance(v, torch.Tensor) else v) for k, v in entry.items()}
        for p, entry in optimizer.state.items()
    }
    groups = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return tensors, grads, states, groups, torch.get_rng_state()


def assert_restored(model, optimizer, before):
    tensors, grads, states, groups, rng = before
    for name, t in model.state_dict(keep_vars=True).items():
        assert t is tensors[name][0], name
        assert torch.equal(t, tensors[name][1]), name
    for name, p in model.named_parameters():
        assert p.grad is grads[name][0], name
        if p.grad is not None:
            assert torch.equal(p.grad, grads[name][1]), name
    assert set(optimizer.state) == set(states)
    for p, entry in states.items():
        assert set(optimizer.state[p]) == set(entry)
        for key, (original, saved) in entry.items():
            if isinstance(original, torch.Tensor):
                assert optimizer.state[p][key] is original
                assert torch.equal(original, saved), key
            else:
                assert optimizer.state[p][key] == saved
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups
    assert torch.equal(torch.get_rng_state(), rng)


def warmed(kind, with_state):
    model, data = tiny("llama", spread=2.0), batch()
    optimizer = optimizers(list(model.parameters()))[kind]()
    if with_state:
        for seed in (1, 2):
            optimizer.zero_grad()
            logp, _ = token_scores(model, batch(seed))
            loss_of("nll", logp, batch(seed)).backward()
            optimizer.step()  # the last gradients stay, and have to come back
    return model, data, optimizer


@pytest.mark.parametrize("snapshot_device", ["same", "cpu"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_model_and_optimizer_come_back_bit_for_bit(kind, with_state, snapshot_device):
    model, data, optimizer = warmed(kind, with_state)
    before = state_of(model, optimizer)
    sampler = ImportanceSampler(model, {"importance_sampling": {"snapshot_device": snapshot_device}})
    first = sampler.compute_entropy_change(data, optimizer)
    assert_restored(model, optimizer, before)
    second = sampler.compute_entropy_change(data, optimizer)
    assert first["deltaH_snis"] == second["deltaH_snis"]
    assert first["deltaH_snis"] != 0
    assert_restored(model, optimizer, before)


@pytest.mark.parametrize("where", ["backward", "step", "rescoring"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_they_come_back_after_an_exception_in_the_middle(kind, where, monkeypatch):
    model, data, optimizer = warmed(kind, True)
    before = state_of(model, optimizer)
    sampler = ImportanceSampler(model, {"importance_sampling": {"noise_floor": "none"}})
    step = optimizer.step

    def failing_step(*args):
        step(*args)
        if where == "step":
            raise RuntimeError("planted")
        model.model.norm.register_forward_hook(fail)

    def fail(*_):
        raise RuntimeError("planted")

    if where == "backward":
        model.lm_head.weight.register_hook(fail)
    else:
        monkeypatch.setattr(optimizer, "step", failing_step)
    with pytest.raises(RuntimeError, match="planted"):
        sampler.compute_entropy_change(data, optimizer)
    assert_restored(model, optimizer, before)


def test_the_step_starts_from_the_optimizers_own_state():
    """A snapshot that aliases live state would let the second call start from the first one's moments."""
    model, data, optimizer = warmed("adamw", True)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    sampler = ImportanceSampler(model)
    for _ in range(3):
        sampler.compute_entropy_change(data, optimizer)
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        o.zero_grad()
        logp, _ = token_scores(m, batch(5))
        loss_of("nll", logp, batch(5)).backward()
        o.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_training_model_with_dropout_keeps_its_mode_and_its_random_numbers():
    model = tiny("gpt2", resid_pdrop=0.1).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = state_of(model, optimizer)
    ImportanceSampler(model).compute_entropy_change(batch(), optimizer)
    assert model.training
    assert_restored(model, optimizer, before)


def test_two_batches_evaluate_on_one_and_step_on_the_other():
    model, E, U = model64(), batch(0), batch(1)
    with torch.no_grad():
        S0 = token_scores(model, E)
        S0 = next(iter(S0)).sum(2)
    trained = copy.deepcopy(model)
    optimizer = adamw(list(trained.parameters()))
    loss_of("rl", next(iter(token_scores(trained, U))), U).backward()
    optimizer.step()
    with torch.no_grad():
        S1 = next(iter(token_scores(trained, E))).sum(2)
    w, L = (S1 - S0).exp(), E["attention_masks"][:, :, P:].sum(2)
    result = ImportanceSampler(model).entropy_change_two_batch(
        model, E, U, adamw(model.parameters()), {"training_loss": "rl", "importance_microbatch_size": 2}
    )
    assert result["H_orig"] == pytest.approx(float(-S0.mean()), rel=1e-10)
    assert result["H_upd"] == pytest.approx(float(-(w * S1).sum() / w.sum()), rel=1e-10)
    assert result["H_orig_tok"] == pytest.approx(float(-S0.sum() / L.sum()), rel=1e-10)
    assert result["H_upd_tok"] == pytest.approx(float(-(w * S1).sum() / (w * L).sum()), rel=1e-10)
    assert result["deltaH_true"] == pytest.approx(result["H_upd"] - result["H_orig"], abs=1e-9)
    assert result["deltaH_true_tok"] == pytest.approx(result["H_upd_tok"] - result["H_orig_tok"], abs=1e-9)
    assert {"timing", "diagnostics"} <= set(result)


def test_excluding_the_eos_changes_integrand_and_length_but_not_the_weight():
    model, data = model64(eos_token_id=EOS), batch()
    with_eos = ImportanceSampler(model).compute_entropy_change(data, adamw(model.parameters()))
    without = ImportanceSampler(model, {"entropy": {"include_eos": False}}).compute_entropy_change(
        data, adamw(model.parameters())
    )
    assert without["ESS"] == with_eos["ESS"]
    assert without["original_entropy"] < with_eos["original_entropy"]
    eos_count = int((data["sequences"][:, :, P:] == EOS).sum(2).clamp_max(1).sum())
    assert eos_count > 0
    assert with_eos["counts"]["counted_tokens"] - without["counts"]["counted_tokens"] == eos_count
    assert any("include_eos" in note for note in without["notes"])


def test_the_helper_returns_sums_and_lengths():
    model, data = model64(), batch()
    S, L = ImportanceSampler(model)._compute_logprobs_for_sequences(
        data["sequences"], data["prompt_lens"], data["attention_masks"]
    )
    expected = next(iter(token_scores(model, data))).sum(2)
    assert S.shape == L.shape == (B, G)
    assert L.dtype == torch.int32
    assert torch.equal(L.double(), data["attention_masks"][:, :, P:].sum(2).double())
    torch.testing.assert_close(S.double(), expected, rtol=2**-23, atol=0)  # S is rounded once, to float32


def test_nats_and_bits_and_both_units_are_reported():
    result = ImportanceSampler(model64()).compute_entropy_change(batch(), None)
    for unit in ("sequence", "per_token"):
        numbers = result[unit]
        for key in ("value", "original", "updated", "se"):
            assert numbers["bits"][key] == pytest.approx(numbers[key] / math.log(2))
    assert result["noise_floor"]["floor"] >= 0
    assert result["verdict"]["status"] in ("believable", "caution", "not believable")


def test_a_step_on_the_evaluated_rollouts_is_pointed_out():
    """The update raises the weights of the sequences that it was fitted to; that is no fault of the sampling."""
    model, data = model64(), batch(b=16)
    sampler = ImportanceSampler(model)
    own = sampler.compute_entropy_change(data, adamw(model.parameters()))["verdict"]["findings"]
    other = sampler.entropy_change_two_batch(model, batch(7, b=16), data, adamw(model.parameters()))
    assert "in_sample" in {f["code"] for f in own}
    assert "in_sample" not in {f["code"] for f in other["verdict"]["findings"]}


def test_low_ess_is_flagged_and_logged(caplog):
    config = {"importance_sampling": {"ess_threshold": 1e9, "resample_on_low_ess": True}}
    with caplog.at_level(logging.WARNING, logger="entropy_fast"):
        result = ImportanceSampler(model64(), config).compute_entropy_change(batch(), None)
    assert result["diagnostics"]["low_ess"]
    assert "draw fresh rollouts" in caplog.text
    assert not ImportanceSampler(model64()).compute_entropy_change(batch(), None)["diagnostics"]["low_ess"]


def test_an_update_that_does_nothing_changes_nothing():
    model = tiny("llama")
    result = ImportanceSampler(model).compute_entropy_change(batch(), torch.optim.SGD(model.parameters(), lr=0.0))
    assert result["deltaH_snis"] == 0.0
    assert result["ESS"] == B * G
    assert result["update"]["unchanged_share"] == 1.0


def test_a_mask_that_runs_on_past_the_eos_is_counted_and_reported():
    model, data = model64(eos_token_id=EOS), batch()
    data["attention_masks"] = torch.ones(B, G, T)
    result = ImportanceSampler(model).compute_entropy_change(data, None)
    assert result["counts"]["running_past_eos"] > 0
    assert any("stop_at_eos" in note for note in result["notes"])
    stopped = ImportanceSampler(model, {"entropy": {"stop_at_eos": True}}).compute_entropy_change(data, None)
    plain = ImportanceSampler(model).compute_entropy_change(batch(), None)
    assert stopped["original_entropy"] == pytest.approx(plain["original_entropy"], rel=1e-12)


@pytest.mark.parametrize(("frozen", "unchanged"), [(torch.float32, (0.0, 0.2)), (torch.bfloat16, (0.9, 1.0))])
def test_the_share_of_weights_that_rounding_left_alone_is_reported(frozen, unchanged):
    model = tiny("llama", dtype=frozen)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    share = ImportanceSampler(model).compute_entropy_change(batch(), optimizer)["update"]["unchanged_share"]
    assert unchanged[0] <= share <= unchanged[1]


def test_master_weights_take_the_step_that_bf16_would_lose():
    data = batch()
    results = {}
    for master in (False, True):
        model = tiny("llama", dtype=torch.bfloat16, spread=2.0)
        for p in model.model.layers[0].parameters():
            p.requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        before = state_of(model, optimizer)
        config = {"importance_sampling": {"master_weights": master}, "entropy": {"integrand": "rao_blackwell"}}
        results[master] = ImportanceSampler(model, config).compute_entropy_change(data, optimizer)
        assert_restored(model, optimizer, before)
    # the truth: the same low-precision gradients, the step and both scorings in float64
    model = tiny("llama", dtype=torch.bfloat16, spread=2.0)
    rolled = Rollouts.from_batch(data)
    sampler = ProbeComponents(model)
    (-sampler._teacher_force_logprobs(data)["S"].sum() / rolled.generated.sum()).backward()
    trained = copy.deepcopy(model).double()
    for i, (p, q) in enumerate(zip(trained.parameters(), model.parameters(), strict=True)):
        name = [n for n, _ in model.named_parameters()][i]
        if "layers.0" not in name:
            p.data -= 1e-5 * q.grad.double()
    with torch.no_grad():
        S0, R0 = (x.sum(2) for x in token_scores(copy.deepcopy(model).double(), data))
        S1, R1 = (x.sum(2) for x in token_scores(trained, data))
    w = (S1 - S0).exp()
    truth = float((w * R1).sum() / w.sum() - R0.mean())
    assert results[True]["update"]["unchanged_share"] < 0.5
    assert results[True]["deltaH_snis"] == pytest.approx(truth, rel=0.02)
    assert abs(results[False]["deltaH_snis"] - truth) > 0.2 * abs(truth)


def test_what_cannot_be_done_is_refused():
    model, data = model64(), batch()
    del data["advantages"]
    rl = ImportanceSampler(model, {"importance_sampling": {"training_loss": "rl"}})
    with pytest.raises(InputError, match="needs advantages"):
        rl.compute_entropy_change(data, adamw(model.parameters()))
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter that requires a gradient"):
        ImportanceSampler(model).compute_entropy_change(batch(), torch.optim.SGD(model.parameters(), lr=1.0))


def test_validation_accepts_good_rollouts_and_rejects_a_wrong_temperature(caplog):
    model = tiny("llama", spread=1.5, eos_token_id=None).double()
    model.generation_config.eos_token_id = None
    torch.manual_seed(0)
    b, g = 16, 8
    prompts = torch.randint(3, 100, (b, 1, P)).expand(b, g, P).reshape(b * g, P)
    data = {}
    for temperature in (1.0, 0.5):
        sequences = prompts
        for _ in range(T - P):
            with torch.no_grad():
                logits = model(input_ids=sequences).logits[:, -1] / temperature
            sequences = torch.cat([sequences, torch.multinomial(logits.softmax(-1), 1)], 1)
        data[temperature] = {
            "sequences": sequences.reshape(b, g, T),
            "prompt_lens": torch.full((b,), P),
            "attention_masks": torch.ones(b, g, T),
        }
    sampler = ImportanceSampler(model, {"learning_rate": 1e-5})
    assert sampler.validate_importance_sampling(data[1.0]) is True
    with caplog.at_level(logging.WARNING, logger="entropy_fast"):
        assert sampler.validate_importance_sampling(data[0.5]) is False
    assert caplog.text


def test_two_policies_that_exist_already():
    """Two models, a state dict, a direction and an adapter agree with two scorings by hand."""
    peft = pytest.importorskip("peft")
    model, other, data = model64(), model64(seed=1), batch()
    sampler = ImportanceSampler(model)
    by_model = sampler.entropy_change_between(data, other)
    by_state = sampler.entropy_change_between(data, with_state(model, other.state_dict()))
    by_move = sampler.entropy_change_between(data, moved(state_difference(model, other.state_dict()), 1.0))
    with torch.no_grad():
        S0, S1 = (next(iter(token_scores(m, data))).sum(2) for m in (model, other))
    w = (S1 - S0 - (S1 - S0).max()).exp()
    truth = float(-(w * S1).sum() / w.sum() + S0.mean())
    for result in (by_model, by_state, by_move):
        assert result["deltaH_snis"] == pytest.approx(truth, rel=1e-6)
        assert "update" not in result
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model64(), config).double().eval()
    lora = ImportanceSampler(adapted).entropy_change_between(data, nullcontext(), original=adapter_off(adapted))
    assert lora["original_entropy"] == pytest.approx(by_model["original_entropy"], rel=1e-12)
    assert lora["deltaH_snis"] != 0


def test_autocast_is_close_to_float32_and_not_equal_to_it():
    """bf16 products, float32 logits: the entropies agree to bf16's precision."""
    results = {}
    for amp in (False, True):
        model = tiny("llama", spread=2.0)
        config = {"memory_config": {"amp": amp, "dtype": "bfloat16"}}
        results[amp] = ImportanceSampler(model, config).compute_entropy_change(batch(), adamw(model.parameters()))
    gap = abs(results[True]["original_entropy"] - results[False]["original_entropy"])
    assert 0 < gap < 2**-7 * results[False]["original_entropy"]
    assert results[True]["deltaH_snis"] == pytest.approx(results[False]["deltaH_snis"], rel=0.1)
