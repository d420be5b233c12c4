"""The rollouts format: what is written is read back exactly, and a bad line is named."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path

import pytest
import torch

from entropy_fast.errors import EntropyFastWarning, InputError
from entropy_fast.files import atomic_directory, atomic_path, atomic_text
from entropy_fast.jsonl import Rollout, read_prompts, read_rollouts, write_lines, write_rollouts

GOOD = {"prompt_ids": [5, 6], "completion_ids": [7, 0]}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def random_records(seed: int, n: int = 40) -> list[Rollout]:
    rng = random.Random(seed)
    records = []
    for i in range(n):
        completion = [rng.randrange(2**18) for _ in range(rng.randrange(0 if i else 1, 30))]
        records.append(
            Rollout(
                prompt_ids=[rng.randrange(2**18) for _ in range(rng.randrange(1, 9))],
                completion_ids=completion,
                prompt_index=f"prompt {i % 7}",
                finish_reason=rng.choice(["stop", "length"]),
                sampler_logprobs=[rng.uniform(-20, 0) for _ in completion],
                advantage=rng.gauss(0, 1),
                max_tokens=rng.randrange(1, 4096),
                temperature=0.7,
                prompt="naïve “text” \u2028 of a line",
                completion="…",
            )
        )
    return records


def test_what_is_written_is_read_back(tmp_path):
    records = random_records(seed=11)
    path = tmp_path / "deep" / "rollouts.jsonl"
    write_rollouts(path, records)
    read = read_rollouts(path)
    assert read.records == records
    assert read.line_numbers == list(range(1, len(records) + 1))
    assert read.temperature == 0.7
    assert not list(path.parent.glob(".*"))


def test_tensors_hold_what_the_lines_say(tmp_path):
    records = random_records(seed=12)
    write_rollouts(tmp_path / "r.jsonl", records)
    rollouts = read_rollouts(tmp_path / "r.jsonl").rollouts
    for i, record in enumerate(records):
        p, c = len(record.prompt_ids), len(record.completion_ids)
        assert rollouts.tokens[i][rollouts.attention_mask[i]].tolist() == record.prompt_ids + record.completion_ids
        assert rollouts.tokens[i][rollouts.generated[i]].tolist() == record.completion_ids
        expected = torch.tensor(record.sampler_logprobs, dtype=torch.float32)
        assert torch.equal(rollouts.sampler_logprobs[i, p : p + c], expected)
    assert rollouts.prompt_index.tolist() == [i % 7 for i in range(len(records))]
    assert rollouts.max_lengths.tolist() == [record.max_tokens for record in records]
    torch.testing.assert_close(rollouts.advantages.tolist(), [r.advantage for r in records], rtol=1e-7, atol=0)


def test_equal_prompts_are_one_prompt_by_default(tmp_path):
    lines = [{"prompt_ids": ids, "completion_ids": [1]} for ids in ([1], [2], [1], [2, 1], [2])]
    rollouts = read_rollouts(write(tmp_path / "r.jsonl", *lines)).rollouts
    assert rollouts.prompt_index.tolist() == [0, 1, 0, 2, 1]


def test_stdin_and_stdout(monkeypatch, capsys):
    write_rollouts("-", [Rollout([1], [2])])
    out = capsys.readouterr().out
    assert json.loads(out) == {"prompt_ids": [1], "completion_ids": [2]}
    monkeypatch.setattr(sys, "stdin", io.StringIO(out))
    assert read_rollouts("-").records == [Rollout([1], [2])]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no rollouts"),
        ([GOOD, "{"], r"r\.jsonl:2: not valid JSON"),
        ([GOOD, "", GOOD], r"r\.jsonl:2: the line is empty"),
        ([GOOD, [1, 2]], r"r\.jsonl:2: a line must be a JSON object"),
        ([{"prompt_ids": [1]}], r"r\.jsonl:1: completion_ids is missing"),
        ([{"prompt_ids": [1], "completion_id": [1]}], "is 'completion_id' meant as it"),
        ([{**GOOD, "prompt_ids": []}], "prompt_ids is empty"),
        ([{**GOOD, "prompt_ids": [1.5]}], "prompt_ids must be a list of integer token ids"),
        ([{**GOOD, "prompt_ids": [True]}], "prompt_ids must be a list of integer token ids"),
        ([GOOD, {**GOOD, "completion_ids": "hello"}], r'r\.jsonl:2: completion_ids must be .* got "hello"'),
        ([{**GOOD, "completion_ids": [3, -100]}], "negative id, -100"),
        ([{**GOOD, "sampler_logprobs": [-1.0]}], "1 values for 2 completion_ids"),
        ([{**GOOD, "sampler_logprobs": [-1.0, "x"]}], 'finite number, got "x"'),
        ([{**GOOD, "sampler_logprobs": [-1.0, None]}], "finite number, got null"),
        ([{**GOOD, "sampler_logprobs": [-1.0, -2.0]}, GOOD], r"r\.jsonl:2: sampler_logprobs is missing"),
        (['{"prompt_ids": [1], "completion_ids": [2], "advantage": NaN}'], "advantage must be a finite number"),
        ([{**GOOD, "advantage": 1.0}, GOOD], r"r\.jsonl:2: advantage is missing, though other lines have it"),
        ([GOOD, {**GOOD, "prompt_index": 3}], r"r\.jsonl:1: prompt_index is missing"),
        ([{**GOOD, "prompt_index": [5, 6]}], "integer or a string"),
        ([{**GOOD, "max_tokens": 0}], "max_tokens must be an integer of at least 1"),
        ([{**GOOD, "temperature": 0}], "temperature must be above 0"),
        ([{**GOOD, "temperature": 1}, {**GOOD, "temperature": 0.5}], "mixes temperatures"),
        ([{"prompt_ids": [1], "completion_ids": []}], "no sequence has a generated token"),
    ],
)
def test_a_bad_line_is_named(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        read_rollouts(write(tmp_path / "r.jsonl", *lines))


def test_a_misspelt_optional_key_is_not_passed_over_in_silence(tmp_path):
    with pytest.warns(EntropyFastWarning, match="'advantages' is not read; did you mean 'advantage'"):
        read_rollouts(write(tmp_path / "r.jsonl", {**GOOD, "advantages": 1.0, "reward": 2}))


def test_binary_is_not_text(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b"PAR1\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_rollouts(tmp_path / "r.jsonl")


def test_an_id_outside_the_vocabulary_is_named_with_its_line(tmp_path):
    file = read_rollouts(write(tmp_path / "r.jsonl", GOOD, {**GOOD, "completion_ids": [3, 99]}))
    file.check_vocabulary(100)
    with pytest.raises(InputError, match=r"r\.jsonl:2: token id 99 .* vocabulary of 99"):
        file.check_vocabulary(99)


def test_prompts_of_every_kind(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    path = write(tmp_path / "p.jsonl", {"prompt": "moon:"}, {"prompt_ids": [1, 2]}, {"messages": messages})
    text, ids, chat = read_prompts(path)
    assert (text.text, ids.ids, chat.messages) == ("moon:", [1, 2], messages)
    assert chat.where.endswith("p.jsonl:3")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "moon"}, r"p\.jsonl:1: a prompt line needs exactly one of .* got text"),
        ({}, "an empty object"),
        ({"prompt": "a", "prompt_ids": [1]}, "got prompt, prompt_ids"),
        ({"prompt": 5}, "prompt must be a string"),
        ({"prompt_ids": []}, "prompt_ids is empty"),
        ({"messages": ["hi"]}, "messages must be a list like"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        read_prompts(write(tmp_path / "p.jsonl", line))


def test_no_prompts(tmp_path):
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(write(tmp_path / "p.jsonl"))


class Planted(BaseException):
    """As KeyboardInterrupt: not an Exception."""


def test_an_interrupted_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "out.jsonl"
    write_lines(path, [{"old": 1}])

    def entries():
        yield {"new": 1}
        raise Planted

    with pytest.raises(Planted):
        write_lines(path, entries())
    assert path.read_text() == '{"old": 1}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_text(tmp_path / "atomic") as stream:
        stream.write("x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_not_a_file_to_write(tmp_path):
    with pytest.raises(InputError, match="is a folder"), atomic_path(tmp_path):
        pass


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder"

    def good(folder: Path) -> None:
        (folder / "mark").write_text("1")

    def bad(folder: Path) -> None:
        (folder / "half").write_text("")
        raise Planted

    with pytest.raises(Planted):
        atomic_directory(target, bad, ours=lambda folder: True)
    assert list(tmp_path.iterdir()) == []
    atomic_directory(target, good, ours=lambda folder: False)
    with pytest.raises(Planted):
        atomic_directory(target, bad, ours=lambda folder: True)
    assert [p.name for p in target.iterdir()] == ["mark"]
    with pytest.raises(InputError, match="exists and is something else"):
        atomic_directory(target, good, ours=lambda folder: False)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
