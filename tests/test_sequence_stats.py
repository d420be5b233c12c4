"""`sequence_stats` against a loop over tokens in float64, on every device that is here."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import entropy_fast as ef
from entropy_fast.errors import InputError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RULES = [(True, False), (False, False), (True, True), (False, True)]


def by_hand(logits, tokens, attention_mask, prompt_lens, eos, include_eos, stop_at_eos):
    """One (S, R, L, emitted, eos column, runs past) per sequence, token by token."""
    logp = torch.log_softmax(logits.double(), -1)
    entropy = -(logp.exp() * logp).sum(-1)
    results = []
    for n in range(len(tokens)):
        s = r = emitted = torch.zeros((), dtype=torch.float64, device=logits.device)
        length, eos_column, runs_past = 0, -1, False
        for j in range(int(prompt_lens[n]), tokens.shape[1]):
            if not attention_mask[n, j]:
                continue
            if eos_column >= 0:
                runs_past = True
                if stop_at_eos:
                    continue
            first_eos = eos_column < 0 and int(tokens[n, j]) in eos
            if first_eos:
                eos_column = j
            emitted = emitted + logp[n, j - 1, tokens[n, j]]
            if include_eos or not first_eos:
                s = s + logp[n, j - 1, tokens[n, j]]
                r = r + entropy[n, j - 1]
                length += 1
        results.append((s, r, length, emitted, eos_column, runs_past))
    return results


def problem(n, t, vocab, device="cpu", seed=0, ids=6):
    """Random logits, tokens from few ids (so that EOS occur), masks with holes, prompts of all lengths."""
    g = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(n, t, vocab, generator=g)).to(device)
    tokens = torch.randint(min(ids, vocab), (n, t), generator=g).to(device)
    attention_mask = (torch.rand(n, t, generator=g) < 0.85).long().to(device)
    return logits, tokens, attention_mask, torch.randint(1, t + 1, (n,), generator=g).to(device)


def agrees(out, expected, atol):
    for field, column in (("S", 0), ("R", 1), ("emitted_logprob", 3)):
        wanted = torch.stack([row[column] for row in expected]).to(out.S.device)
        assert (getattr(out, field) - wanted).abs().max() <= atol
    assert out.L.tolist() == [row[2] for row in expected]
    assert out.eos_column.tolist() == [row[4] for row in expected]
    assert out.runs_past_eos.tolist() == [row[5] for row in expected]
    assert (out.S.dtype, out.L.dtype, out.eos_column.dtype) == (torch.float64, torch.int32, torch.int64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("include_eos", "stop_at_eos"), RULES)
@pytest.mark.parametrize("eos", [(), (3,), (2, 4)])
def test_matches_a_loop_over_tokens(device, include_eos, stop_at_eos, eos):
    batch = problem(9, 23, 40, device)
    out = ef.sequence_stats(*batch, eos_token_ids=eos, include_eos=include_eos, stop_at_eos=stop_at_eos)
    expected = by_hand(*batch, eos, include_eos, stop_at_eos)
    # float32 token values near 5, up to 22 of them
    agrees(out, expected, 22 * 2e-6)
    assert (expected[0][4], max(row[4] for row in expected)) != (-1, -1) or not eos


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("include_eos", "stop_at_eos"), RULES)
def test_gradients(device, include_eos, stop_at_eos):
    logits, *batch = problem(5, 12, 30, device)
    bias = torch.zeros(30, device=device).requires_grad_()
    rules = {"eos_token_ids": (3,), "include_eos": include_eos, "stop_at_eos": stop_at_eos}
    x = logits.requires_grad_()
    out = ef.sequence_stats(x, *batch, **rules, bias=bias)
    weights = torch.randn(3, 5, dtype=torch.float64, device=device)
    loss = (weights[0] * out.S + weights[1] * out.R + weights[2] * out.emitted_logprob).sum()
    got = torch.autograd.grad(loss + 0.5 * out.logprob.sum() - out.entropy.square().sum(), [x, bias])
    exact = logits.detach().double().requires_grad_()
    shift = torch.zeros(30, dtype=torch.float64, device=device).requires_grad_()
    rows = by_hand(exact + shift, *batch, (3,), include_eos, stop_at_eos)
    loss = sum(w0 * row[0] + w1 * row[1] + w2 * row[3] for w0, w1, w2, row in zip(*weights, rows, strict=True))
    logp = torch.log_softmax(exact + shift, -1)
    emitted = (out.entropy != 0)[:, 1:]
    picked = logp[:, :-1].gather(-1, batch[0][:, 1:, None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)[:, :-1]
    loss = loss + 0.5 * (picked * emitted).sum() - (entropy * emitted).square().sum()
    for a, e in zip(got, torch.autograd.grad(loss, [exact, shift]), strict=True):
        assert (a - e).norm() <= 1e-5 * e.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_are_those_of_token_stats(device):
    logits, tokens, attention_mask, prompt_lens = problem(4, 10, 50, device)
    out = ef.sequence_stats(logits, tokens, attention_mask, prompt_lens, temperature=0.7, softcap=3.0)
    columns = torch.arange(10, device=device)
    emitted = attention_mask.bool() & (columns >= prompt_lens[:, None])
    rows = ef.token_stats(logits[:, :-1], tokens[:, 1:], mask=emitted[:, 1:], temperature=0.7, softcap=3.0)
    assert torch.equal(out.logprob[:, 1:], rows.logprob)
    assert torch.equal(out.entropy[:, 1:], rows.entropy)
    assert not out.logprob[:, 0].any()


@pytest.mark.parametrize("device", DEVICES)
def test_columns_that_were_not_emitted_are_not_read(device):
    logits, tokens, attention_mask, prompt_lens = problem(6, 14, 20, device)
    clean = ef.sequence_stats(logits, tokens, attention_mask, prompt_lens, eos_token_ids=(1,))
    columns = torch.arange(14, device=device)
    emitted = attention_mask.bool() & (columns >= prompt_lens[:, None])
    scored = torch.zeros_like(emitted)
    scored[:, :-1] = emitted[:, 1:]
    logits[~scored] = math.nan
    tokens[~emitted & (attention_mask == 0)] = -100
    x = logits.requires_grad_()
    out = ef.sequence_stats(x, tokens, attention_mask, prompt_lens, eos_token_ids=(1,))
    for a, b in zip(out, clean, strict=True):
        assert torch.equal(a, b)
    out.S.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_empty_and_truncated_sequences(device):
    logits, tokens, _, _ = problem(3, 6, 9, device)
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    attention_mask[1, 3:] = False
    tokens[2, 3], tokens[0], tokens[2, 4:] = 5, 1, 1
    lens = torch.tensor([2, 3, 3], device=device)
    out = ef.sequence_stats(logits, tokens, attention_mask, lens, eos_token_ids=(5,), include_eos=False)
    assert out.L.tolist() == [4, 0, 2]
    assert out.eos_column.tolist() == [-1, -1, 3]
    assert out.runs_past_eos.tolist() == [False, False, True]
    assert (out.S[1], out.R[1], out.emitted_logprob[1]) == (0, 0, 0)
    # the padding may equal the EOS: what is masked is no EOS
    tokens[1] = 5
    assert ef.sequence_stats(logits, tokens, attention_mask, lens, eos_token_ids=(5,)).eos_column[1] == -1


@given(
    n=st.integers(1, 5),
    t=st.integers(1, 20),
    vocab=st.integers(2, 30),
    rules=st.sampled_from(RULES),
    eos=st.sets(st.integers(0, 7), max_size=3),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
def test_any_shape(n, t, vocab, rules, eos, seed):
    batch = problem(n, t, vocab, seed=seed)
    out = ef.sequence_stats(*batch, eos_token_ids=eos, include_eos=rules[0], stop_at_eos=rules[1])
    agrees(out, by_hand(*batch, eos, *rules), t * 2e-6 + 1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_in_place_backward(device):
    logits, *batch = problem(3, 8, 17, device)
    x = logits.requires_grad_()
    expected = torch.autograd.grad(ef.sequence_stats(x * 1.0, *batch).S.sum(), x)[0]
    y = x * 1.0
    out = ef.sequence_stats(y, *batch, inplace_backward=True)
    assert torch.equal(torch.autograd.grad(out.S.sum(), x)[0], expected)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph(device):
    logits, *batch = problem(3, 8, 17, device)

    def f(x, *rest):
        return ef.sequence_stats(x, *rest, eos_token_ids=(3,), include_eos=False, temperature=0.7)

    x = logits.requires_grad_()
    out, expected = torch.compile(f, fullgraph=True, backend="aot_eager")(x, *batch), f(x, *batch)
    for a, b in zip(out, expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(*(torch.autograd.grad(o.S.sum(), x)[0] for o in (out, expected)))
    inputs = (logits.detach(), *batch, [3], False, True, None, torch.tensor(0.7, dtype=torch.float64), 1.0, None)
    opcheck(torch.ops.entropy_fast.sequence_stats.default, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(6, 9)}, "logits must have shape .sequences, columns, vocab.*token_stats"),
        ({1: torch.zeros(2, 3)}, "tokens must be int32 or int64"),
        ({1: torch.zeros(2, 4, dtype=torch.int64)}, r"shape \(2, 3\)"),
        ({2: torch.ones(2, 3)}, "attention_mask must be bool or integer"),
        ({3: torch.ones(3, dtype=torch.int64)}, r"prompt_lens must be int32 or int64 with shape \(2,\)"),
        ({3: torch.tensor([1, 0])}, "prompt_lens must be in 1..3, got 0 for sequence 1"),
        ({3: torch.tensor([4, 1])}, "got 4 for sequence 0"),
        ({1: torch.full((2, 3), 9)}, r"targets must be in \[0, 9\)"),
    ],
)
def test_bad_inputs_say_what_is_wrong(change, message):
    batch = [torch.zeros(2, 3, 9), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)]
    batch.append(torch.ones(2, dtype=torch.int64))
    for i, value in change.items():
        batch[i] = value
    with pytest.raises(InputError, match=message):
        ef.sequence_stats(*batch)
