"""The command line on real files: its numbers agree with float64; what a user can mend is one line and status 2."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from entropy_fast.cli import app
from entropy_fast.demo import EOS_ID, make_model, make_tokenizer, train

PROMPTS = ["moon:", "the owl says", "a"]


def run(*arguments: object, code: int = 0, stdin: str | None = None):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def fails(*arguments: object) -> str:
    """Run a command that must fail as a user error; its one line on stderr, after the bars of what went well."""
    result = run(*arguments, code=2)
    lines = [line for line in result.stderr.strip().splitlines() if "━" not in line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert result.stdout == ""
    return lines[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A barely trained model and the same one after a small random step, with rollouts of the first."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer, model = make_tokenizer(), make_model(seed=3)
    train(model, tokenizer, steps=40, seed=3)
    for name in ("original", "updated"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 1e-3)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    run("sample", folder / "original", prompts, "-o", folder / "rollouts.jsonl", "-g", 8, "-n", 12, "--seed", 5)
    return folder


def truth(folder: Path, rollouts: Path, temperature: float = 1.0) -> dict[str, list]:
    """S, R and per-token values in float64 from the model's own logits, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    answers: dict[str, list] = {"S": [], "R": [], "logprob": [], "entropy": []}
    for line in rollouts.read_text().splitlines():
        record = json.loads(line)
        prompt, completion = record["prompt_ids"], record["completion_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logp = (logits / temperature).log_softmax(-1)
        chosen = logp.gather(1, torch.tensor(completion)[:, None])[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)
        answers["S"].append(chosen.sum().item())
        answers["R"].append(entropy.sum().item())
        answers["logprob"].append(chosen.tolist())
        answers["entropy"].append(entropy.tolist())
    return answers


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sample_keeps_ids_and_their_logprobs(place):
    records = read_lines(place / "rollouts.jsonl")
    tokenizer = make_tokenizer()
    assert [record["prompt_index"] for record in records] == [p for p in range(3) for _ in range(8)]
    expected = truth(place / "original", place / "rollouts.jsonl")
    for record, logprob in zip(records, expected["logprob"], strict=True):
        ids = record["completion_ids"]
        assert record["prompt_ids"] == tokenizer(PROMPTS[record["prompt_index"]])["input_ids"]
        assert EOS_ID not in ids[:-1]
        assert record["finish_reason"] == ("stop" if ids[-1] == EOS_ID else "length")
        assert len(ids) == 12 or ids[-1] == EOS_ID
        torch.testing.assert_close(record["sampler_logprobs"], logprob, atol=1e-4, rtol=0)
    assert {record["finish_reason"] for record in records} == {"stop", "length"}


def test_sample_is_repeatable_and_its_stdout_is_the_file(place, tmp_path):
    arguments = ("sample", place / "original", place / "prompts.jsonl", "-g", 8, "-n", 12, "--seed")
    again = run(*arguments, 5)
    assert again.stdout == (place / "rollouts.jsonl").read_text()
    assert "rollouts of 3 prompts" in again.stderr
    assert run(*arguments, 6).stdout != again.stdout


def test_sample_ignores_what_the_generation_config_would_shape(place, tmp_path):
    """With top_k = 1 in the model's own config, generate() would be greedy."""
    shutil.copytree(place / "original", tmp_path / "shaped")
    config = json.loads((tmp_path / "shaped" / "generation_config.json").read_text())
    config |= {"top_k": 1, "repetition_penalty": 5.0, "temperature": 0.1, "do_sample": True}
    (tmp_path / "shaped" / "generation_config.json").write_text(json.dumps(config))
    arguments = (place / "prompts.jsonl", "-g", 8, "-n", 12, "--seed", 5)
    assert run("sample", tmp_path / "shaped", *arguments).stdout == (place / "rollouts.jsonl").read_text()


def test_score_agrees_with_float64(place, tmp_path):
    run("score", place / "original", place / "rollouts.jsonl", "-o", tmp_path / "scores.jsonl", "--per-token")
    rows = read_lines(tmp_path / "scores.jsonl")
    expected = truth(place / "original", place / "rollouts.jsonl")
    records = read_lines(place / "rollouts.jsonl")
    for i, (row, record) in enumerate(zip(rows, records, strict=True)):
        n = len(record["completion_ids"])
        assert (row["sequence"], row["L"], row["generated"]) == (i, n, n)
        assert row["token_ids"] == record["completion_ids"]
        assert row["truncated"] == (record["finish_reason"] == "length")
        for key in ("logprob", "entropy"):  # float32 logits of size ~10 and 3 layers: 1e-6 relative, some tens of them
            torch.testing.assert_close(row[key], expected[key][i], atol=1e-4, rtol=0)
        assert math.isclose(row["S"], expected["S"][i], abs_tol=1e-4 * n)
        assert math.isclose(row["R"], expected["R"][i], abs_tol=1e-4 * n)


def test_the_suffix_chooses_the_format(place, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for suffix in ("jsonl", "csv", "parquet"):
        run("score", place / "original", place / "rollouts.jsonl", "-o", tmp_path / f"s.{suffix}", "--per-token")
    rows = read_lines(tmp_path / "s.jsonl")
    assert parquet.read_table(tmp_path / "s.parquet").to_pylist() == rows
    with open(tmp_path / "s.csv", newline="") as stream:
        cells = list(csv.DictReader(stream))
    assert [float(cell["S"]) for cell in cells] == [row["S"] for row in rows]
    assert [cell["token_ids"].split() for cell in cells] == [[str(t) for t in row["token_ids"]] for row in rows]
    piped = run("score", place / "original", "-", "--per-token", stdin=(place / "rollouts.jsonl").read_text())
    assert piped.stdout == (tmp_path / "s.jsonl").read_text()


def test_counting_options_reach_the_scores(place, tmp_path):
    def lengths(*options: object) -> list[int]:
        out = run("score", place / "original", place / "rollouts.jsonl", *options).stdout
        return [json.loads(line)["L"] for line in out.splitlines()]

    stopped = [record["finish_reason"] == "stop" for record in read_lines(place / "rollouts.jsonl")]
    (tmp_path / "entropy.yaml").write_text("entropy:\n  include_eos: false\n")
    without = lengths("--config", tmp_path / "entropy.yaml")
    assert [a - b for a, b in zip(lengths(), without, strict=True)] == [int(s) for s in stopped]
    assert lengths("--set", "entropy.include_eos=false") == without
    assert lengths("-c", tmp_path / "entropy.yaml", "-s", "entropy.include_eos=true") == lengths()


def oracle_change(place: Path, updated: Path) -> tuple[float, float]:
    """ΔH per sequence and per token by self-normalised weights, in float64 from the models' own logits."""
    s0, s1 = (
        torch.tensor(truth(folder, place / "rollouts.jsonl")["S"], dtype=torch.float64)
        for folder in (place / "original", updated)
    )
    length = torch.tensor([float(len(r["completion_ids"])) for r in read_lines(place / "rollouts.jsonl")])
    w = (s1 - s0).exp()
    sequence = -(w * s1).sum() / w.sum() + s0.mean()
    token = -(w * s1).sum() / (w * length).sum() + s0.sum() / length.sum()
    return sequence.item(), token.item()


def test_compare_two_checkpoints(place, tmp_path):
    result = run("compare", place / "original", place / "updated", place / "rollouts.jsonl", "-o", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    sequence, token = oracle_change(place, place / "updated")
    assert math.isclose(report["deltaH"], sequence, abs_tol=2e-3)
    assert math.isclose(report["sequence"]["value"], sequence, abs_tol=2e-3)
    assert math.isclose(report["per_token"]["value"], token, abs_tol=2e-4)
    assert math.isclose(report["per_token"]["bits"]["value"], report["per_token"]["value"] / math.log(2))
    assert report["inputs"]["updated"] == str(place / "updated")
    for word in ("per sequence", "per token", "nats", "bits", "ESS", "k̂", "noise floor", "verdict"):
        assert word in result.stdout
    assert (tmp_path / "report" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_compare_per_token_as_json(place, tmp_path):
    options = ("--set", "entropy.unit=per_token", "--json", "-o", tmp_path / "report")
    printed = json.loads(
        run("compare", place / "original", place / "updated", place / "rollouts.jsonl", *options).stdout
    )
    assert printed == json.loads((tmp_path / "report" / "report.json").read_text())
    assert printed["unit"] == "per_token"
    assert printed["deltaH"] == printed["per_token"]["value"]


def test_the_same_policy_twice_changes_nothing(place, tmp_path):
    shutil.copytree(place / "original", tmp_path / "copy")
    run("compare", place / "original", tmp_path / "copy", place / "rollouts.jsonl", "-o", tmp_path / "r")
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["sequence"]["value"] == 0.0
    assert report["per_token"]["value"] == 0.0
    assert report["diagnostics"]["ess_fraction"] == 1.0


def test_compare_with_a_lora_adapter(place, tmp_path):
    """An adapter on the original, and the same adapter merged into a checkpoint, are one policy."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(8)
    base = AutoModelForCausalLM.from_pretrained(place / "original")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")

    run("compare", place / "original", tmp_path / "adapter", place / "rollouts.jsonl", "-o", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    sequence, token = oracle_change(place, tmp_path / "merged")
    assert abs(sequence) > 0.01
    assert math.isclose(report["sequence"]["value"], sequence, abs_tol=2e-3)
    assert math.isclose(report["per_token"]["value"], token, abs_tol=2e-4)

    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    message = fails(
        "compare", place / "original", tmp_path / "adapter", place / "rollouts.jsonl", "-o", tmp_path / "no"
    )
    assert "adapter" in message


def test_sweep_ends_where_compare_is(place, tmp_path):
    """η = 1 is the updated checkpoint; halfway, the oracle's model has the mean of the two weights."""
    from transformers import AutoModelForCausalLM

    folders = (place / "original", place / "updated")
    result = run("sweep", *folders, place / "rollouts.jsonl", "--eta", 0.5, "--eta", 1, "-o", tmp_path / "sweep")
    report = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    half, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    with torch.no_grad():
        for a, b in zip(half.parameters(), other.parameters(), strict=True):
            a.copy_((a + b) / 2)
    half.save_pretrained(tmp_path / "half")
    for point, folder in zip(report["changes"], (tmp_path / "half", place / "updated"), strict=True):
        sequence, token = oracle_change(place, folder)
        assert math.isclose(point["sequence"]["value"], sequence, abs_tol=2e-3)
        assert math.isclose(point["per_token"]["value"], token, abs_tol=2e-4)
    assert "δH₁" in result.stdout


def test_rollouts_are_scored_at_the_temperature_that_drew_them(place, tmp_path):
    rollouts = tmp_path / "cool.jsonl"
    run("sample", place / "original", place / "prompts.jsonl", "-o", rollouts, "-g", 4, "-n", 8, "-t", 0.7)
    rows = [json.loads(line) for line in run("score", place / "original", rollouts).stdout.splitlines()]
    expected = truth(place / "original", rollouts, temperature=0.7)
    torch.testing.assert_close([row["S"] for row in rows], expected["S"], atol=2e-3, rtol=0)
    assert "sampled at 0.7" in fails("score", place / "original", rollouts, "--set", "generation.temperature=0.5")


def test_errors_name_what_is_wrong(place, tmp_path):
    rollouts = place / "rollouts.jsonl"
    lines = rollouts.read_text().splitlines()
    broken, empty, foreign, text = (tmp_path / name for name in ("b.jsonl", "e.jsonl", "f.jsonl", "config.txt"))
    broken.write_text("\n".join([*lines[:2], lines[2][:40], *lines[3:]]))
    empty.write_text("\n".join([lines[0], "", lines[1]]))
    foreign.write_text(lines[0] + "\n" + json.dumps({**json.loads(lines[1]), "prompt_ids": [5, 512]}) + "\n")
    text.write_text("entropy: [")
    original, updated = place / "original", place / "updated"
    plain = tmp_path / "plain"
    plain.mkdir()

    assert "b.jsonl:3: not valid JSON" in fails("score", original, broken)
    assert "e.jsonl:2: the line is empty" in fails("score", original, empty)
    assert "f.jsonl:2: token id 512 is outside the model's vocabulary of 512" in fails("score", original, foreign)
    assert "No such file" in fails("score", original, tmp_path / "absent.jsonl")
    assert "is not a model folder" in fails("score", plain, rollouts)
    assert "does not exist" in fails("score", tmp_path / "absent", rollouts)
    assert "hf download some-org/some-model" in fails("score", "some-org/some-model", rollouts)
    assert "save_pretrained" in fails("score", rollouts, rollouts)
    assert "must be one of .parquet, .jsonl, .csv" in fails("score", original, rollouts, "-o", tmp_path / "s.xlsx")
    assert "did you mean entropy.unit" in fails("score", original, rollouts, "--set", "entropy.units=per_token")
    assert "did you mean per_token" in fails("score", original, rollouts, "--set", "entropy.unit=pertoken")
    assert "section.key=value" in fails("score", original, rollouts, "--set", "entropy.unit")
    assert "not valid YAML" in fails("score", original, rollouts, "--config", text)
    assert "No such file" in fails("score", original, rollouts, "--config", tmp_path / "absent.yaml")
    assert "--temperature must be above 0" in fails("sample", original, place / "prompts.jsonl", "-t", 0)
    assert "is a file" in fails("compare", original, updated, rollouts, "-o", rollouts)
    assert "device must be" in fails("score", original, rollouts, "--device", "abacus")
    assert "torch sees" in fails("score", original, rollouts, "--device", "cuda:99")
    assert list(plain.iterdir()) == []


def test_a_damaged_checkpoint_is_not_scored_with_random_weights(place, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(place / "original", tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    message = fails("score", tmp_path / "part", place / "rollouts.jsonl")
    assert "lacks 1 of the model's weights (model.layers.1.mlp.down_proj.weight" in message
    (tmp_path / "part" / "model.safetensors").unlink()
    assert "cannot be loaded" in fails("score", tmp_path / "part", place / "rollouts.jsonl")


def test_checkpoints_with_different_vocabularies(place, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config.from_pretrained(place / "original")
    config.vocab_size = 600
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "wider")
    arguments = (place / "rollouts.jsonl", "-o", tmp_path / "report")
    message = fails("compare", place / "original", tmp_path / "wider", *arguments)
    assert "different vocabularies (512 and 600 tokens)" in message

    shutil.copytree(place / "updated", tmp_path / "renamed")
    tokenizer = json.loads((tmp_path / "renamed" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (next(t for t, i in vocabulary.items() if i == index) for index in (70, 71))
    vocabulary[first], vocabulary[second] = 71, 70
    (tmp_path / "renamed" / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = fails("compare", place / "original", tmp_path / "renamed", *arguments)
    assert "different vocabularies: id 70" in message
    assert not (tmp_path / "report").exists()


def test_ctrl_c_leaves_nothing_half_written(place, tmp_path, monkeypatch):
    from entropy_fast import tables

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "scores.parquet").write_bytes(b"old")
    monkeypatch.setattr("pyarrow.parquet.write_table", interrupted)
    result = run("score", place / "original", place / "rollouts.jsonl", "-o", tmp_path / "scores.parquet", code=130)
    assert "interrupted" in result.stderr
    assert (tmp_path / "scores.parquet").read_bytes() == b"old"
    monkeypatch.setattr(tables, "write_table", interrupted)
    run("score", place / "original", place / "rollouts.jsonl", "-o", tmp_path / "scores.csv", code=130)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_real_process(place, tmp_path, number, code):
    prompts = tmp_path / "prompts"
    os.mkfifo(prompts)
    command = [
        sys.executable,
        "-m",
        "entropy_fast",
        "sample",
        place / "original",
        prompts,
        "-o",
        tmp_path / "out.jsonl",
    ]
    # a shell starts what runs in its background deaf to SIGINT, and so would be what this starts
    heard = partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    with open(prompts, "w"):  # opens when the command does: from here on it waits for prompts
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["prompts"]


def test_a_killed_run_resumes_to_the_same_bytes(place, tmp_path):
    """Killed for good between two shards: what is finished is not scored again, and nothing differs in the end."""
    rollouts, parts = tmp_path / "many.jsonl", tmp_path / "parts"
    run("sample", place / "original", place / "prompts.jsonl", "-o", rollouts, "-g", 140, "-n", 4, "--seed", 6)
    run("score", place / "original", rollouts, "-o", tmp_path / "whole.jsonl", "--per-token")
    program = """if True:
        import os, signal, sys
        from entropy_fast import resume
        from entropy_fast.cli import app
        score, calls = resume.score, []
        def kill_at_the_second(*arguments, **options):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return score(*arguments, **options)
        resume.score = kill_at_the_second
        app(sys.argv[1:])
    """
    arguments = ["score", place / "original", rollouts, "-o", tmp_path / "resumed.jsonl", "--per-token"]
    arguments += ["--resume", parts]
    killed = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (parts / "scoring").glob("shard*")] == ["shard-00000.pt"]
    assert not (tmp_path / "resumed.jsonl").exists()
    shard = parts / "scoring" / "shard-00000.pt"
    before = shard.stat().st_mtime_ns
    run(*arguments)
    assert shard.stat().st_mtime_ns == before
    uninterrupted = [*arguments[:4], tmp_path / "uninterrupted.jsonl", "--per-token", "--resume", tmp_path / "other"]
    run(*uninterrupted)
    assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "uninterrupted.jsonl").read_bytes()
    whole, resumed = read_lines(tmp_path / "whole.jsonl"), read_lines(tmp_path / "resumed.jsonl")
    for one, other in zip(whole, resumed, strict=True):
        assert one["S"] == pytest.approx(other["S"], abs=1e-4)
    assert "shards of another run" in fails(
        "score", place / "updated", rollouts, "-o", tmp_path / "wrong.jsonl", "--resume", parts
    )


def test_compare_resumes_from_the_parts_of_both_policies(place, tmp_path):
    arguments = ("compare", place / "original", place / "updated", place / "rollouts.jsonl", "--json", "--resume")
    first = run(*arguments, tmp_path / "parts", "-o", tmp_path / "a").stdout
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["original", "updated"]
    assert (
        json.loads(first)["estimates"]
        == json.loads(run(*arguments, tmp_path / "parts", "-o", tmp_path / "b").stdout)["estimates"]
    )


def test_a_closed_pipe_is_no_error(place):
    command = f"{sys.executable} -m entropy_fast score {place}/original {place}/rollouts.jsonl --per-token | head -c 1"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=120)
    assert result.stdout == "{"
    assert "Traceback" not in result.stderr
    assert "error" not in result.stderr


def test_help_needs_no_torch_and_shows_examples():
    program = "import sys; from entropy_fast.cli import app; app(['compare', '--help'], standalone_mode=False); "
    program += "sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--set entropy.unit=per_token" in " ".join(result.stdout.split())


def test_version_and_usage_errors():
    from entropy_fast import __version__

    assert __version__ in run("--version").stdout
    assert "No such command" in run("compute", code=2).stderr
    assert "--group-size" in run("sample", "a", "b", "-g", "0", code=2).stderr
