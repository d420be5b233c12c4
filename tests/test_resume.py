"""Scoring in shards: the same bits after any interruption, and no shard of another run."""

import pytest
import torch
from test_packing import grouped
from tiny_models import tiny

from entropy_fast.errors import InputError
from entropy_fast.resume import score_resumable
from entropy_fast.rollouts import Rollouts
from entropy_fast.scoring import Scoring, score


def test_shards_give_the_scores_of_one_run(tmp_path):
    model, r = tiny("llama", dtype=torch.float64), grouped(prompts=5)
    seen = []
    shards = score_resumable(
        model, r, directory=tmp_path / "a", shard_sequences=5, progress=lambda *at: seen.append(at)
    )
    whole = score(model, r)
    torch.testing.assert_close(shards.S, whole.S, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(shards.R, whole.R, rtol=1e-11, atol=1e-11)
    assert torch.equal(shards.lengths, whole.lengths)
    done, total = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    # three shards of whole prompts: 8, 8 and 4 sequences
    read = [len(r.tokens[i][r.attention_mask[i]]) - 1 if shards.lengths[i] else 0 for i in range(20)]
    assert {sum(read[:8]), sum(read[:16]), sum(read)} <= set(done)
    assert set(total) == {sum(read)}


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path, monkeypatch, calls):
    model, r = tiny("qwen2"), grouped(prompts=5)
    whole = score_resumable(model, r, directory=tmp_path / "whole", shard_sequences=4)

    class Killed(BaseException):
        pass

    finished = []

    def until_killed(*arguments, **options):
        if len(finished) == calls:
            raise Killed
        finished.append(1)
        return score(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("entropy_fast.resume.score", until_killed)
        with pytest.raises(Killed):
            score_resumable(model, r, directory=tmp_path / "killed", shard_sequences=4)
    assert len(list((tmp_path / "killed").glob("shard-*.pt"))) == calls
    assert not list((tmp_path / "killed").glob("*.partial*"))
    resumed = score_resumable(model, r, directory=tmp_path / "killed", shard_sequences=4)
    assert torch.equal(resumed.logprob, whole.logprob)
    assert torch.equal(resumed.entropy, whole.entropy)
    assert resumed.layout == whole.layout


def test_the_second_policy_takes_the_layout_of_the_first(tmp_path):
    model, r = tiny("qwen2"), grouped(prompts=5)
    first = score_resumable(model, r, directory=tmp_path / "a", shard_sequences=4)
    again = score_resumable(model, r, Scoring(layout=first.layout), directory=tmp_path / "b", shard_sequences=4)
    assert torch.equal(first.logprob, again.logprob)
    with pytest.raises(InputError, match="across shards"):
        score_resumable(model, r, Scoring(layout=score(model, r).layout), directory=tmp_path / "c", shard_sequences=4)


def test_shards_of_other_weights_rollouts_or_settings_are_refused(tmp_path):
    model, r = tiny("llama"), grouped()
    score_resumable(model, r, directory=tmp_path, shard_sequences=4)
    for change in (
        {"scoring": Scoring(temperature=0.7)},
        {"rollouts": grouped(seed=1)},
        {"model": tiny("llama", seed=1)},
        {"shard_sequences": 8},
    ):
        arguments = {"model": model, "rollouts": r, "shard_sequences": 4, **change}
        with pytest.raises(InputError, match="shards of another run"):
            score_resumable(**arguments, directory=tmp_path)


def test_one_changed_element_of_a_large_weight_is_another_run(tmp_path):
    model, r = tiny("llama"), grouped()
    score_resumable(model, r, directory=tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight[33, 5] *= 1 + 2**-20
    with pytest.raises(InputError, match="shards of another run"):
        score_resumable(model, r, directory=tmp_path)


def test_a_shard_without_anything_generated_is_all_zeros(tmp_path):
    r = Rollouts.from_lists([[5], [6]], [[], [7, 8]])
    scores = score_resumable(tiny("llama"), r, directory=tmp_path, shard_sequences=1)
    assert float(scores.S[0]) == 0.0
    torch.testing.assert_close(scores.S, score(tiny("llama"), r).S)
