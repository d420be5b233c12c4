"""The demo: deterministic, within its own error bars of the truth, and clear about what is only length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from entropy_fast import demo
from entropy_fast.jsonl import read_rollouts
from entropy_fast.loading import load_model
from entropy_fast.sampling import sample_rollouts

SIZE = {"training_steps": 60, "group_size": 6}


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "report"
    demo.run(folder, seed=1, **SIZE)
    return folder


def report(folder: Path, loss: str) -> dict:
    return json.loads((folder / loss / "report.json").read_text())


def test_the_glossary_varies_strongly_in_length():
    entries = demo.glossary()
    words = torch.tensor([float(len(definition.split())) for _, definition in entries])
    assert len(entries) == 59 * 6
    assert words.min() == 1
    assert words.max() >= 20
    assert words.std() > 0.5 * words.mean()


def test_the_tokenizer_is_lossless_and_has_a_real_eos(output):
    tokenizer = load_model(output / "original", device="cpu").tokenizer
    assert tokenizer.eos_token_id == demo.EOS_ID
    for text in ("moon: Round.", "naïve “quotes” 漢字 \t\n"):
        ids = tokenizer(text)["input_ids"]
        assert demo.EOS_ID not in ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("loss", "sign"), [("nll", -1), ("rl", 1)])
def test_both_updates_move_the_entropy_as_they_should(output, loss, sign):
    """Terser entries are surer and longer ones less sure, by more than the noise."""
    found = report(output, loss)
    for unit in ("sequence", "per_token"):
        assert sign * found[unit]["value"] > 3 * found[unit]["se"]
        assert found[unit]["value"] == pytest.approx(found[unit]["updated"] - found[unit]["original"])
    assert found["verdict"]["status"] != "not believable"


@pytest.mark.parametrize("loss", ["nll", "rl"])
def test_the_length_bias_is_gone_in_the_per_token_view(output, loss):
    """Length explains nearly all of −S and little of −S/L; most of ΔH per sequence is the change of length."""
    length = report(output, loss)["length_bias"]
    assert length["sequence_r2"] > 0.9
    assert length["per_token_r2"] < 0.3
    assert length["length_part"] + length["per_token_part"] == pytest.approx(length["change"], abs=1e-9)
    assert abs(length["length_part"]) > 2 * abs(length["per_token_part"])


@pytest.mark.parametrize("loss", ["nll", "rl"])
def test_fresh_samples_of_the_updated_policy_agree(output, loss):
    """The truth by other means: sample the updated policy itself. Five standard errors of that sample and of ΔH."""
    loaded = load_model(output / f"updated-{loss}", device="cpu")
    prompts = list(dict.fromkeys(tuple(r.prompt_ids) for r in read_rollouts(output / "rollouts.jsonl").records))
    fresh = sample_rollouts(
        loaded.model,
        prompts,
        group_size=12,
        eos_token_ids=(demo.EOS_ID,),
        max_new_tokens=demo.MAX_NEW_TOKENS,
        batch_size=256,
        seed=77,
    )
    surprisal = -torch.tensor([sum(r.sampler_logprobs) for r in fresh], dtype=torch.float64)
    length = torch.tensor([float(len(r.completion_ids)) for r in fresh], dtype=torch.float64)
    per_token = surprisal.sum() / length.sum()
    residual = (surprisal - per_token * length) / length.mean()
    found = report(output, loss)
    # the original's entropy is estimated as well: the updated value carries its sampling error
    n = len(read_rollouts(output / "rollouts.jsonl"))
    for value, spread, name in (
        (surprisal.mean(), surprisal.std(), "sequence"),
        (per_token, residual.std(), "per_token"),
    ):
        error = spread * (1 / len(fresh) + 1 / n) ** 0.5 + found[name]["se"]
        assert abs(value - found[name]["updated"]) < 5 * error


def test_the_same_seed_gives_the_same_report(output, tmp_path):
    demo.run(tmp_path / "again", seed=1, **SIZE)
    for loss in ("nll", "rl"):
        assert report(tmp_path / "again", loss) == report(output, loss)
    assert (tmp_path / "again" / "rollouts.jsonl").read_bytes() == (output / "rollouts.jsonl").read_bytes()


def test_what_is_written(output):
    names = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    for folder in ("original", "updated-nll", "updated-rl"):
        assert {f"{folder}/config.json", f"{folder}/model.safetensors", f"{folder}/tokenizer.json"} <= names
    assert {"rollouts.jsonl", "prompts.jsonl", "nll/report.json", "rl/report.json", "rl/report.png"} <= names
    assert not [name for name in names if "partial" in name]


def test_the_saved_checkpoints_tell_the_same_change(output):
    """What `compare` finds between the folders is what the demo measured in memory."""
    from entropy_fast.checkpoints import compare_checkpoints

    file = read_rollouts(output / "rollouts.jsonl")
    change = compare_checkpoints(output / "original", output / "updated-rl", file, device="cpu")
    found = report(output, "rl")
    assert change.headline.value == pytest.approx(found["deltaH"], abs=1e-4)
    assert change.headline.se == pytest.approx(found["headline"]["se"], rel=1e-3)
