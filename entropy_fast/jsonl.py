"""Rollouts and prompts as JSON lines: one object a line, token ids kept as they were sampled.

docs/rollouts.md describes the format. A line that does not fit raises an InputError that names the file and the line.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from entropy_fast.errors import EntropyFastWarning, InputError
from entropy_fast.files import atomic_text
from entropy_fast.rollouts import Rollouts

STDIO = "-"
FINISH_REASONS = ("stop", "length")


@dataclass(frozen=True)
class Rollout:
    """One sampled sequence, a line of a rollouts file.

    Attributes:
        prompt_ids: the prompt's token ids, at least one.
        completion_ids: the sampled ids, the EOS included where one was sampled; may be empty.
        prompt_index: an integer or a string that the completions of one prompt share; None: equal prompts are one.
        finish_reason: `stop` (an EOS was sampled) or `length` (cut at the limit), or whatever the engine said.
        sampler_logprobs: what the sampling engine reported for each sampled token, in nats.
        advantage: used by the `rl` update.
        max_tokens: the generation limit, in tokens.
        temperature: the temperature of the sampling.
        prompt: the prompt's text, for people; never tokenised.
        completion: the completion's text, for people; never tokenised.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    prompt_index: int | str | None = None
    finish_reason: str | None = None
    sampler_logprobs: list[float] | None = None
    advantage: float | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    prompt: str | None = None
    completion: str | None = None


@dataclass(frozen=True)
class RolloutFile:
    """A rollouts file as it was read.

    Attributes:
        source: its name, for messages.
        records: the lines.
        line_numbers: the line of each record, counted from 1.
        rollouts: the same as padded tensors.
        temperature: the one temperature that the lines name, or None.
    """

    source: str
    records: list[Rollout]
    line_numbers: list[int]
    rollouts: Rollouts = field(repr=False)
    temperature: float | None = None

    def __len__(self) -> int:
        return len(self.records)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InputError, naming the line, when a token id is outside 0..vocab_size − 1."""
        tokens, mask = self.rollouts.tokens, self.rollouts.attention_mask
        outside = (mask & (tokens >= vocab_size)).any(1)
        if outside.any():
            row = int(outside.nonzero()[0])
            worst = int(tokens[row][mask[row]].max())
            raise InputError(
                f"{self.source}:{self.line_numbers[row]}: token id {worst} is outside the model's vocabulary of "
                f"{vocab_size}; were these rollouts sampled from another model?"
            )


@dataclass(frozen=True)
class Prompt:
    """A line of a prompts file: token ids, or text, or chat messages, exactly one of them.

    Attributes:
        ids: token ids.
        text: text for the model's tokenizer.
        messages: chat messages for the tokenizer's chat template.
        where: `file:line`, for messages.
    """

    ids: list[int] | None
    text: str | None
    messages: list[dict[str, Any]] | None
    where: str


def read_rollouts(path: str | Path) -> RolloutFile:
    """Read a rollouts file (`-` reads stdin).

    Raises:
        InputError: a line is malformed, a key is missing or of the wrong type, optional numbers are given on some
            lines only, or the file holds no rollouts.
        OSError: the file cannot be read.
    """
    source = _source_name(path)
    lines = list(_objects(path))
    if not lines:
        raise InputError(f"{source} holds no rollouts; it needs at least one line like {_EXAMPLE}")
    records = [_rollout(entry, f"{source}:{number}") for number, entry in lines]
    numbers = [number for number, _ in lines]
    for key in ("advantage", "max_tokens", "prompt_index", "sampler_logprobs", "temperature"):
        _all_or_none(records, numbers, key, source)
    temperatures = {record.temperature for record in records}
    if len(temperatures) > 1:
        raise InputError(
            f"{source} mixes temperatures {sorted(map(str, temperatures))}; score each in a file of its own"
        )
    return RolloutFile(source, records, numbers, to_rollouts(records), temperatures.pop())


def write_rollouts(path: str | Path, records: Iterable[Rollout]) -> None:
    """Write a rollouts file, whole or not at all (`-` writes to stdout). Keys whose value is None are left out."""
    write_lines(path, (_entry(record) for record in records))


def write_lines(path: str | Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all (`-` writes to stdout)."""
    with _output(path) as stream:
        for entry in entries:
            stream.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a prompts file (`-` reads stdin); each line has `prompt` (text), `prompt_ids` or `messages`.

    Raises:
        InputError: a line is malformed, has none or several of these keys, or the file holds no prompts.
        OSError: the file cannot be read.
    """
    source = _source_name(path)
    prompts = [_prompt(entry, f"{source}:{number}") for number, entry in _objects(path)]
    if not prompts:
        raise InputError(f'{source} holds no prompts; it needs at least one line like {{"prompt": "Once upon a time"}}')
    return prompts


def to_rollouts(records: list[Rollout]) -> Rollouts:
    """The records as padded tensors."""
    names: dict[int | str, int] = {}
    indexed = records[0].prompt_index is not None
    return Rollouts.from_lists(
        [record.prompt_ids for record in records],
        [record.completion_ids for record in records],
        [names.setdefault(record.prompt_index, len(names)) for record in records] if indexed else None,  # type: ignore[arg-type]
        advantages=_column(records, "advantage"),
        max_lengths=_column(records, "max_tokens"),
        sampler_logprobs=_column(records, "sampler_logprobs"),
    )


_EXAMPLE = '{"prompt_ids": [12, 7], "completion_ids": [33, 5, 0]}'


def _rollout(entry: dict[str, Any], where: str) -> Rollout:
    known = Rollout.__dataclass_fields__
    for key in ("prompt_ids", "completion_ids"):
        if key not in entry:
            near = difflib.get_close_matches(key, entry, n=1, cutoff=0.6)
            hint = f"is {near[0]!r} meant as it?" if near else f"a line looks like {_EXAMPLE}"
            raise InputError(f"{where}: {key} is missing; {hint}")
    for key in entry.keys() - known.keys():
        if near := difflib.get_close_matches(key, known, n=1, cutoff=0.85):
            warnings.warn(f"{where}: {key!r} is not read; did you mean {near[0]!r}?", EntropyFastWarning, stacklevel=2)
    given = {key: _FIELDS[key](entry[key], f"{where}: {key}") for key in known if entry.get(key) is not None}
    record = Rollout(**given)
    if not record.prompt_ids:
        raise InputError(f"{where}: prompt_ids is empty; a model needs at least one token (a BOS, say) to predict from")
    if record.sampler_logprobs is not None and len(record.sampler_logprobs) != len(record.completion_ids):
        raise InputError(
            f"{where}: sampler_logprobs has {len(record.sampler_logprobs)} values for "
            f"{len(record.completion_ids)} completion_ids; give one for each sampled token"
        )
    return record


def _entry(record: Rollout) -> dict[str, Any]:
    return {key: value for key, value in asdict(record).items() if value is not None}


def _prompt(entry: dict[str, Any], where: str) -> Prompt:
    keys = [key for key in ("prompt", "prompt_ids", "messages") if entry.get(key) is not None]
    if len(keys) != 1:
        raise InputError(
            f"{where}: a prompt line needs exactly one of prompt (text), prompt_ids or messages, "
            f"got {', '.join(keys or entry) or 'an empty object'}"
        )
    (key,) = keys
    value = entry[key]
    if key == "prompt":
        return Prompt(None, _text(value, f"{where}: prompt"), None, where)
    if key == "prompt_ids":
        ids = _ids(value, f"{where}: prompt_ids")
        if not ids:
            raise InputError(f"{where}: prompt_ids is empty; give at least one token (a BOS, say)")
        return Prompt(ids, None, None, where)
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) and "role" in m for m in value):
        raise InputError(f'{where}: messages must be a list like [{{"role": "user", "content": "Hello"}}]')
    return Prompt(None, None, value, where)


def _column(records: list[Rollout], key: str) -> list[Any] | None:
    return None if getattr(records[0], key) is None else [getattr(record, key) for record in records]


def _all_or_none(records: list[Rollout], numbers: list[int], key: str, source: str) -> None:
    lacking = [number for record, number in zip(records, numbers, strict=True) if getattr(record, key) is None]
    if lacking and len(lacking) < len(records):
        raise InputError(f"{source}:{lacking[0]}: {key} is missing, though other lines have it; give it on all or none")


# One checker a type: each returns the value or raises an InputError that says what was received.


def _ids(value: Any, name: str) -> list[int]:
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise InputError(f"{name} must be a list of integer token ids, got {_shown(value)}")
    if value and min(value) < 0:
        raise InputError(f"{name} has a negative id, {min(value)}; leave padding out of the file")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, got {_shown(value)}")
    return float(value)


def _numbers(value: Any, name: str) -> list[float]:
    if not isinstance(value, list):
        raise InputError(f"{name} must be a list of numbers, got {_shown(value)}")
    return [_number(item, name) for item in value]


def _positive_int(value: Any, name: str) -> int:
    if type(value) is not int or value < 1:
        raise InputError(f"{name} must be an integer of at least 1, got {_shown(value)}")
    return value


def _temperature(value: Any, name: str) -> float:
    if (number := _number(value, name)) <= 0:
        raise InputError(f"{name} must be above 0, got {_shown(value)}")
    return number


def _identity(value: Any, name: str) -> int | str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InputError(
            f"{name} must be an integer or a string that a prompt's completions share, got {_shown(value)}"
        )
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string, got {_shown(value)}")
    return value


_FIELDS: dict[str, Callable[[Any, str], Any]] = {
    "prompt_ids": _ids,
    "completion_ids": _ids,
    "prompt_index": _identity,
    "finish_reason": _text,
    "sampler_logprobs": _numbers,
    "advantage": _number,
    "max_tokens": _positive_int,
    "temperature": _temperature,
    "prompt": _text,
    "completion": _text,
}


def _objects(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file with their line numbers; blank lines at the end are allowed."""
    source = _source_name(path)
    blank = None
    try:
        with _input(path) as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    blank = blank or number
                    continue
                if blank is not None:
                    raise InputError(f"{source}:{blank}: the line is empty; every line holds one JSON object")
                yield number, _object(line, f"{source}:{number}")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text ({error.reason}); is it a JSON lines file?") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(entry, dict):
        raise InputError(f"{where}: a line must be a JSON object like {_EXAMPLE}, got {_shown(entry)}")
    return entry


def _input(path: str | Path) -> contextlib.AbstractContextManager[IO[str]]:
    return contextlib.nullcontext(sys.stdin) if str(path) == STDIO else open(path, encoding="utf-8")


def _output(path: str | Path) -> contextlib.AbstractContextManager[IO[str]]:
    return contextlib.nullcontext(sys.stdout) if str(path) == STDIO else atomic_text(path)


def _source_name(path: str | Path) -> str:
    return "stdin" if str(path) == STDIO else str(path)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
