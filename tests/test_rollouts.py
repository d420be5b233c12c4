"""Masks, EOS and lengths: vectorised code against a loop that a person can read."""

import pytest
import torch

from entropy_fast.errors import InputError
from entropy_fast.rollouts import Counting, Rollouts, token_masks


def batch(b=3, g=4, t=9, prompt=3):
    generator = torch.Generator().manual_seed(0)
    masks = torch.ones(b, g, t)
    masks[0, 0, 7:] = 0
    return {
        "sequences": torch.randint(0, 6, (b, g, t), generator=generator),
        "prompt_lens": torch.full((b,), prompt),
        "attention_masks": masks,
    }


def by_hand(tokens, attended, start, rules):
    """What one sequence's columns mean, straight from the definition."""
    generated = [j for j in range(start, len(tokens)) if attended[j]]
    eos = next((j for j in generated if tokens[j] in rules.eos_token_ids), None)
    past = eos is not None and generated[-1] > eos
    if rules.stop_at_eos and eos is not None:
        generated = [j for j in generated if j <= eos]
    counted = [j for j in generated if rules.include_eos or j != eos]
    return generated, counted, -1 if eos is None else eos, past


@pytest.mark.parametrize("include_eos", [True, False])
@pytest.mark.parametrize("stop_at_eos", [True, False])
@pytest.mark.parametrize("eos", [(), (0,), (0, 5), (99,)])
@pytest.mark.parametrize("seed", range(3))
def test_masks_agree_with_the_definition(include_eos, stop_at_eos, eos, seed):
    generator = torch.Generator().manual_seed(seed)
    n, t = 40, 11
    tokens = torch.randint(0, 6, (n, t), generator=generator)
    attended = torch.rand(n, t, generator=generator) < 0.8  # holes, left and right padding, empty completions
    attended[:, 2] = True
    lens = torch.randint(3, t + 1, (n,), generator=generator)
    rollouts = Rollouts(tokens, attended, lens, torch.arange(n))
    rules = Counting(eos, include_eos=include_eos, stop_at_eos=stop_at_eos)
    masks = token_masks(rollouts.tokens, rollouts.generated, rules)
    for i in range(n):
        generated, counted, eos_column, past = by_hand(tokens[i].tolist(), attended[i].tolist(), int(lens[i]), rules)
        assert masks.generated[i].nonzero().flatten().tolist() == generated
        assert masks.counted[i].nonzero().flatten().tolist() == counted
        assert int(masks.lengths[i]) == len(counted)
        assert int(masks.eos_column[i]) == eos_column
        assert bool(masks.runs_past_eos[i]) == past
        assert bool(masks.truncated[i]) == (bool(generated) and eos_column < 0)
        assert bool(masks.empty[i]) == (not counted)
    assert masks.lengths.dtype == torch.int32


def test_a_padding_token_that_equals_the_eos_is_not_generated():
    tokens = torch.tensor([[7, 8, 3, 3, 0, 0, 0]])  # EOS and padding are both 0; one real EOS
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    rollouts = Rollouts(tokens, mask, torch.tensor([2]), torch.tensor([0]))
    masks = token_masks(tokens, rollouts.generated, Counting((0,)))
    assert masks.lengths.tolist() == [3]
    assert masks.eos_column.tolist() == [4]
    assert not masks.runs_past_eos.any()


def test_from_batch_flattens_prompts_and_completions():
    r = Rollouts.from_batch(
        batch() | {"advantages": torch.arange(12.0).reshape(3, 4), "max_lengths": torch.tensor([4, 5, 6]), "other": "x"}
    )
    assert r.tokens.shape == (12, 9)
    assert r.prompt_index.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert r.advantages.tolist() == list(range(12))
    assert r.max_lengths.tolist() == [4] * 4 + [5] * 4 + [6] * 4
    assert r.generated[0].nonzero().flatten().tolist() == [3, 4, 5, 6]
    assert r.reshape(r.prompt_index).shape == (3, 4)


def test_from_lists_pads_on_the_right_and_recognises_prompts():
    r = Rollouts.from_lists([[1, 2], [3], [1, 2]], [[4, 5], [], [6]], sampler_logprobs=[[-1.0, -2.0], [], [-3.0]])
    assert r.tokens.tolist() == [[1, 2, 4, 5], [3, 0, 0, 0], [1, 2, 6, 0]]
    assert r.prompt_index.tolist() == [0, 1, 0]
    assert r.generated.sum(1).tolist() == [2, 0, 1]
    assert r.sampler_logprobs[0, 2:].tolist() == [-1.0, -2.0]


def zero_mask(b):
    masks = b["attention_masks"].clone()
    masks[1, 2] = 0
    return b | {"attention_masks": masks}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b | {"sequences": b["sequences"][0]}, r"sequences must have shape \(B, G, T\), got \(4, 9\)"),
        (lambda b: b | {"prompt_lens": torch.tensor([3, 3])}, r"prompt_lens must have shape \(3,\).*got \(2,\)"),
        (lambda b: b | {"attention_masks": torch.ones(3, 4, 8)}, r"attention_masks must have shape \(3, 4, 9\)"),
        (lambda b: b | {"prompt_lens": torch.tensor([3, 0, 3])}, "is 0; it must lie in 1..9"),
        (lambda b: b | {"prompt_lens": torch.tensor([3, 3, 10])}, "is 10; it must lie in 1..9"),
        (lambda b: b | {"attention_masks": torch.zeros(3, 4, 9)}, "is all zeros"),
        (zero_mask, "sequence 6 .* is all zeros"),
        (lambda b: b | {"prompt_lens": torch.full((3,), 9)}, "no sequence has a generated token"),
        (lambda b: b | {"sequences": b["sequences"].float()}, "token ids, not logits"),
        (lambda b: {"sequences": b["sequences"]}, "batch lacks prompt_lens, attention_masks; it has sequences"),
        (lambda b: b | {"advantages": torch.ones(4, 3)}, r"advantages must have shape \(3, 4\)"),
        (lambda b: b | {"sequences": [[[1, 2], [3]]]}, "rectangular"),
        (lambda b: b | {"max_lengths": torch.tensor([4, 0, 4])}, "max_lengths must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(change, message):
    with pytest.raises(InputError, match=message):
        Rollouts.from_batch(change(batch()))


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="prompt 1 is empty"):
        Rollouts.from_lists([[1], []], [[2], [3]])
    with pytest.raises(InputError, match="as many, got 2 and 1"):
        Rollouts.from_lists([[1], [1]], [[2]])
    with pytest.raises(InputError, match="no rollouts"):
        Rollouts.from_lists([], [])
    with pytest.raises(InputError, match="2 values for 1 tokens"):
        Rollouts.from_lists([[1]], [[2]], sampler_logprobs=[[-1.0, -1.0]])
    with pytest.raises(InputError, match="sequence 1 has none for 1 tokens.*leave them all out"):
        Rollouts.from_lists([[1], [1]], [[2], [2]], sampler_logprobs=[[-1.0], None])
    with pytest.raises(InputError, match="NaN for the generated token in column 1 of sequence 0"):
        Rollouts.from_lists([[1]], [[2]], sampler_logprobs=[[float("nan")]])


def test_ids_outside_the_vocabulary_name_sequence_and_column_but_padding_is_not_read():
    r = Rollouts.from_lists([[1, 2], [1]], [[3], [9]])
    r.tokens[1, 2] = 10_000  # padding
    r.check_vocabulary(10)
    with pytest.raises(InputError, match=r"token id 9 \(sequence 1, column 1\) is outside the model's vocabulary of 9"):
        r.check_vocabulary(9)
