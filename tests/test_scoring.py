"""Scoring a model on rollouts: padding, layouts, precision, errors and memory."""

import subprocess
import sys
import textwrap

import pytest
import torch
from tiny_models import tiny

from entropy_fast.errors import InputError, NonFiniteLogitsError
from entropy_fast.layout import DenseRollouts, Layout
from entropy_fast.rollouts import Counting, Rollouts, token_masks
from entropy_fast.scoring import Scorer, Scoring, score

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6, 7]]
COMPLETIONS = [[20, 21, 2], [30, 31, 32, 33, 34, 35], [], [22, 23]]


def right_padded():
    return Rollouts.from_lists(PROMPTS, COMPLETIONS)


def rectangular(side):
    """The same sequences as a batch of generate() has them: prompts padded to a common width, on either side."""
    width, longest = max(map(len, PROMPTS)), max(map(len, COMPLETIONS))
    rows, masks = [], []
    for p, c in zip(PROMPTS, COMPLETIONS, strict=True):
        gap = width - len(p)
        prompt = [0] * gap + p if side == "left" else p + [0] * gap
        attended = [0] * gap + [1] * len(p) if side == "left" else [1] * len(p) + [0] * gap
        rows.append(prompt + c + [0] * (longest - len(c)))
        masks.append(attended + [1] * len(c) + [0] * (longest - len(c)))
    n = len(rows)
    return Rollouts(torch.tensor(rows), torch.tensor(masks) != 0, torch.full((n,), width), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_padding_on_either_side_changes_nothing(name, side):
    model = tiny(name, dtype=torch.float64)
    plain, padded = score(model, right_padded()), score(model, rectangular(side))
    torch.testing.assert_close(padded.S, plain.S, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(padded.R, plain.R, rtol=1e-12, atol=1e-12)
    assert padded.lengths.tolist() == [3, 6, 0, 2]
    assert float(padded.S[2]) == 0.0


def test_left_padded_gpt2_agrees_with_the_model_given_explicit_positions():
    model, r = tiny("gpt2", dtype=torch.float64), rectangular("left")
    mask = r.attention_mask.long()
    with torch.no_grad():
        logits = model(input_ids=r.tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    logp = logits.log_softmax(-1)[:, :-1].gather(2, r.tokens[:, 1:, None])[..., 0]
    expected = torch.where(r.generated[:, 1:], logp, 0.0).sum(1)
    torch.testing.assert_close(score(model, r).S, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_token_is_scored_by_the_position_before_it(name):
    """A token scored by its own position's logits would depend on itself through the embedding."""
    model, r = tiny(name, dtype=torch.float64), right_padded()
    base = score(model, r)
    changed = r.tokens.clone()
    changed[1, 4] = 90  # the fourth generated token of sequence 1
    other = score(model, Rollouts(changed, r.attention_mask, r.prompt_lens, r.prompt_index))
    torch.testing.assert_close(other.logprob[1, :4], base.logprob[1, :4], rtol=0, atol=1e-12)
    torch.testing.assert_close(other.entropy[1, :5], base.entropy[1, :5], rtol=0, atol=1e-12)
    assert (other.logprob[1, 4:7] - base.logprob[1, 4:7]).abs().min() > 1e-6


@pytest.mark.parametrize("options", [{"token_budget": 1}, {"token_budget": 7}, {"max_sequences": 2}])
def test_the_layout_does_not_change_the_answer_and_can_be_repeated_exactly(options):
    model, r = tiny("qwen2"), right_padded()
    whole, parts = score(model, r), score(model, r, **options)
    assert len(parts.layout.microbatches) > len(whole.layout.microbatches)
    # float32: a sequence of 6 tokens, log-probs near 20, a few roundings each
    torch.testing.assert_close(parts.S, whole.S, rtol=0, atol=6 * 20 * 2**-23 * 8)
    again = score(model, r, layout=parts.layout)
    assert torch.equal(again.logprob, parts.logprob)
    assert torch.equal(again.entropy, parts.entropy)


def test_layouts_hold_every_sequence_once_within_the_budget():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 50, (200,), generator=g)
    layout = Layout.by_tokens(lengths, token_budget=64, max_sequences=5)
    held = [i for group in layout.microbatches for i in group]
    assert sorted(held) == [i for i in range(200) if lengths[i] > 0]
    for group in layout.microbatches:
        assert len(group) <= 5
        assert len(group) * int(lengths[list(group)].max()) <= max(64, int(lengths[list(group)].max()))


def test_dense_rollouts_read_no_more_than_is_scored():
    r = right_padded()
    masks = token_masks(r.tokens, r.generated, Counting((21,), stop_at_eos=True))
    dense = DenseRollouts.pack(r, masks)
    assert dense.input_lengths.tolist() == [4, 6, 0, 4]  # sequence 0 stops at its EOS, 21
    assert dense.tokens.shape[1] == 7


def test_counting_rules_reach_the_sums():
    model, r = tiny("llama", dtype=torch.float64), right_padded()
    whole = score(model, r, counting=Counting((21,)))
    without = score(model, r, counting=Counting((21,), include_eos=False))
    stopped = score(model, r, counting=Counting((21,), stop_at_eos=True))
    assert without.lengths.tolist() == [2, 6, 0, 2]
    assert stopped.lengths.tolist() == [2, 6, 0, 2]
    eos = whole.logprob[0, 4]
    torch.testing.assert_close(without.S[0], whole.S[0] - eos)
    torch.testing.assert_close(stopped.S[0], whole.S[0] - whole.logprob[0, 5])


def test_results_are_zero_where_nothing_was_generated():
    scores = score(tiny("llama"), rectangular("left"))
    assert (scores.logprob[~scores.masks.generated] == 0).all()
    assert (scores.entropy[~scores.masks.generated] == 0).all()
    assert scores.logprob.dtype == torch.float32


def test_nan_in_the_hidden_states_names_the_sequence_and_the_column():
    model = tiny("llama")

    def poison(_, __, hidden):
        if hidden.shape[1] == 6:  # sequence 1 is the longest, and so the first row
            hidden[0, 2] = float("nan")

    model.model.norm.register_forward_hook(poison)
    with pytest.raises(NonFiniteLogitsError, match="token in column 3 of sequence 1"):
        score(model, right_padded())


def test_ids_outside_the_vocabulary_are_refused():
    r = Rollouts.from_lists([[1]], [[101]])
    with pytest.raises(InputError, match="token id 101 .* vocabulary of 101"):
        score(tiny("llama"), r)


def test_float32_precision_lifts_a_bf16_model_and_gives_its_bits_back():
    model = tiny("llama", dtype=torch.bfloat16)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    exact = score(tiny("llama", dtype=torch.bfloat16).double(), right_padded())
    lifted = score(model, right_padded(), precision="float32")
    low = score(model, right_padded())
    assert (lifted.S - exact.S).abs().max() < 1e-4  # 6 tokens of float32
    assert (low.S - exact.S).abs().max() > 1e-2  # and bf16 is far from that
    for name, p in model.named_parameters():
        assert p.dtype == torch.bfloat16
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p, before[name][1])


def test_float32_precision_comes_off_after_an_error():
    model = tiny("llama", dtype=torch.bfloat16)

    def fail(*_):
        raise RuntimeError("planted")

    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        score(model, right_padded(), precision="float32")
    handle.remove()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("packing", [None, False])
def test_running_out_of_memory_halves_the_microbatch_and_goes_on(monkeypatch, packing):
    model, r = tiny("llama", dtype=torch.float64), right_padded()
    expected = score(model, r)
    forward = type(model).forward
    tried = []

    def too_big(self, input_ids, **kwargs):
        tried.append(input_ids.numel())
        if input_ids.numel() > 6:
            raise torch.OutOfMemoryError("planted")
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", too_big)
    scores = score(model, r, packing=packing)
    torch.testing.assert_close(scores.S, expected.S, rtol=1e-12, atol=1e-12)
    assert sorted(i for group in scores.layout.microbatches for i in group) == [0, 1, 3]
    assert max(tried) > 6
    assert tried[-1] <= 6


def test_a_sequence_that_does_not_fit_alone_is_named(monkeypatch):
    model = tiny("llama")
    score(model, right_padded())

    def too_big(self, **_):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(type(model), "forward", too_big)
    with pytest.raises(InputError, match="sequence 0 alone, 6 tokens, does not fit"):
        score(model, right_padded().select(torch.tensor([1, 2])), packing=False)


def test_progress_ends_at_the_total():
    seen = []
    score(tiny("llama"), right_padded(), token_budget=6, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == 5 + 6 + 4
    assert len(seen) > 1


@pytest.mark.slow
def test_peak_memory_stays_within_a_budget_whatever_the_batch():
    """A Qwen2-shaped model with 151,936 tokens: one float32 log-prob tensor of 64 × 48 tokens would take 1.8 GiB."""
    program = textwrap.dedent("""
        import resource, sys, torch, transformers
        from entropy_fast import Rollouts, score
        torch.manual_seed(0)
        config = transformers.Qwen2Config(vocab_size=151936, hidden_size=64, intermediate_size=64,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        def rollouts(n):
            return Rollouts.from_lists([[1, 2, 3]] * n, torch.randint(0, 151936, (n, 48)).tolist())
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        score(model, rollouts(1))
        start = peak()
        score(model, rollouts(4))
        small = peak()
        score(model, rollouts(64))
        print(small - start, peak() - start)
    """)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    small, large = map(float, result.stdout.split())
    assert large < 300, f"scoring 64 sequences took {large:.0f} MiB over one sequence"
    assert large - small < 200, f"memory grows with the batch: {small:.0f} MiB for 4 sequences, {large:.0f} for 64"


def test_gradient_checkpointing_is_respected_and_changes_no_gradient():
    def gradients(checkpointing):
        model, runs = tiny("llama", dtype=torch.float64).train(), []
        if checkpointing:
            model.gradient_checkpointing_enable()
        # the first thing that a layer runs: running it again stops as soon as all is there that is wanted
        model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: runs.append(1))
        scorer = Scorer(model, right_padded(), Scoring())
        runs.clear()  # of the trial
        with scorer.scope():
            total = sum(stats.logprob.sum() + stats.entropy.sum() for _, stats in scorer.run())
        total.backward()
        return len(runs), {name: p.grad for name, p in model.named_parameters()}

    once, plain = gradients(False)
    again, recomputed = gradients(True)
    assert again == 2 * once
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-12, atol=1e-12)
