"""Draw rollouts from a policy: its own full distribution at a temperature, until an EOS or the limit, ids kept.

Importance weights need the probability of what was sampled, so nothing else may shape it: top-p, top-k, repetition
penalties and the like, which a model's generation config often carries, are switched off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from entropy_fast.errors import InputError
from entropy_fast.jsonl import Prompt, Rollout

Progress = Callable[[int, int], None]


def encode_prompts(prompts: Sequence[Prompt], tokenizer: Any | None) -> list[list[int]]:
    """Token ids of every prompt: given ids as they are, text by the tokenizer, messages by its chat template.

    Raises:
        InputError: a text prompt without a tokenizer, messages without a chat template, or a prompt without tokens.
    """
    return [_encode(prompt, tokenizer) for prompt in prompts]


def sample_rollouts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    eos_token_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int | None = None,
    tokenizer: Any | None = None,
    progress: Progress | None = None,
) -> list[Rollout]:
    """Sample `group_size` completions of every prompt.

    Args:
        model: a transformers causal language model in evaluation mode.
        prompts: P lists of token ids.
        group_size: G completions a prompt.
        eos_token_ids: any of these ends a sequence, and is kept as its last token.
        max_new_tokens: the limit, in tokens.
        temperature: divides the logits.
        batch_size: sequences at a time.
        seed: makes the draw repeatable (on the same machine and batch size); None uses torch's global state.
        tokenizer: adds the texts, for people.
        progress: is called with the number of finished sequences and their total.

    Returns:
        P·G rollouts, those of a prompt together, with the log-prob of every token as it was sampled (nats, float32).

    Raises:
        InputError: a prompt id is outside the vocabulary.
    """
    vocab_size = model.get_input_embeddings().weight.shape[0]
    for row, prompt in enumerate(prompts):
        if max(prompt) >= vocab_size:
            raise InputError(f"prompt {row} has token id {max(prompt)}, outside the model's vocabulary of {vocab_size}")
    order = [(p, g) for p in range(len(prompts)) for g in range(group_size)]
    # neighbours in length share a batch, which then needs little padding
    by_length = sorted(order, key=lambda pair: (len(prompts[pair[0]]), pair))
    sampled: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
    with _seeded(model.device, seed), _full_distribution(model, eos_token_ids):
        for start in range(0, len(order), batch_size):
            batch = by_length[start : start + batch_size]
            drawn = _draw(model, [prompts[p] for p, _ in batch], eos_token_ids, max_new_tokens, temperature)
            sampled.update(zip(batch, drawn, strict=True))
            if progress is not None:
                progress(len(sampled), len(order))
    decode = (lambda ids: None) if tokenizer is None else tokenizer.decode
    return [
        Rollout(
            prompt_ids=list(prompts[p]),
            completion_ids=ids,
            prompt_index=p,
            finish_reason="stop" if ids[-1] in eos_token_ids else "length",
            sampler_logprobs=logprobs,
            max_tokens=max_new_tokens,
            temperature=temperature,
            prompt=decode(list(prompts[p])),
            completion=decode(ids),
        )
        for (p, _), (ids, logprobs) in ((pair, sampled[pair]) for pair in order)
    ]


def _draw(
    model: Any, prompts: Sequence[Sequence[int]], eos_ids: Sequence[int], max_new_tokens: int, temperature: float
) -> list[tuple[list[int], list[float]]]:
    width = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):  # left padding: generation starts in one column
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    tape = _Tape(temperature)
    output = model.generate(
        input_ids=tokens.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        logits_processor=[tape.temper],
        stopping_criteria=[tape.record],
    )
    generated = output[:, width:].cpu()
    logprobs = torch.stack(tape.logprobs, 1).cpu()
    is_eos = torch.isin(generated, torch.tensor(list(eos_ids), dtype=generated.dtype))
    # a row ends with its first EOS; what generate() put after it is padding
    lengths = torch.where(is_eos.any(1), is_eos.int().argmax(1) + 1, generated.shape[1]).tolist()
    return [(generated[i, :n].tolist(), logprobs[i, :n].tolist()) for i, n in enumerate(lengths)]


class _Tape:
    """Divides the logits by the temperature and keeps the log-prob of the token that generate() then draws."""

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.logprobs: list[Tensor] = []
        self._logits = torch.empty(0)

    def temper(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        self._logits = logits / self.temperature
        return self._logits

    def record(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        chosen = self._logits.gather(1, input_ids[:, -1:]).squeeze(1)
        self.logprobs.append(chosen - self._logits.logsumexp(1))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # never a reason to stop


@contextmanager
def _full_distribution(model: Any, eos_token_ids: Sequence[int]) -> Iterator[None]:
    """A clean generation config for the time of sampling; generate() would mix the model's own into any other."""
    from transformers import GenerationConfig

    own = model.generation_config
    eos = list(eos_token_ids)
    # padding is masked and cut off again, so that its id has no meaning
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=eos or None, pad_token_id=eos[0] if eos else 0
    )
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _seeded(device: torch.device, seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _encode(prompt: Prompt, tokenizer: Any | None) -> list[int]:
    if prompt.ids is not None:
        return prompt.ids
    if tokenizer is None:
        raise InputError(f"{prompt.where}: the model folder has no tokenizer for text; give prompt_ids")
    if prompt.messages is not None:
        if tokenizer.chat_template is None:
            raise InputError(f"{prompt.where}: the model's tokenizer has no chat template; give prompt or prompt_ids")
        ids = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(prompt.text)["input_ids"]
    if not ids:
        raise InputError(f"{prompt.where}: the prompt has no tokens; give at least one (a BOS, say)")
    return list(ids)
