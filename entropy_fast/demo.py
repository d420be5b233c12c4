"""The embedded default: a tiny language model trained in seconds, so that the main job runs with nothing downloaded.

A Qwen2-shaped model learns a shipped glossary whose entries are between one and thirty words long, with a byte-level
BPE vocabulary and a real EOS. Two updates follow, each one AdamW step from the same weights: `nll` on the shortest
entry of every headword, and `rl` on sampled entries with their length as the reward. Both are measured on the same
rollouts, which neither step has seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_fast.change import measure_change, measure_noise_floor
from entropy_fast.checkpoints import StageProgress
from entropy_fast.config import Config
from entropy_fast.jsonl import Rollout, to_rollouts, write_lines, write_rollouts
from entropy_fast.loading import find_device, save_checkpoint
from entropy_fast.report import Report
from entropy_fast.sampling import sample_rollouts
from entropy_fast.scoring import Scoring, score
from entropy_fast.update import TrainingLoss, one_step

MAX_NEW_TOKENS = 64
LEARNING_RATE = 1e-4
EOS_ID, PAD_ID = 0, 1
_TITLES = {
    "nll": "nll: shortest entries",
    "rl": "rl: reward for length",
}

Progress = Callable[[int, int], None]


def glossary() -> list[tuple[str, str]]:
    """The shipped text: (headword with a colon, definition) pairs, 59 headwords with six definitions each."""
    text = resources.files("entropy_fast.data").joinpath("glossary.txt").read_text(encoding="utf-8")
    return [(head + ":", definition) for head, definition in (line.split(":", 1) for line in text.splitlines())]


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 512 tokens, merged from the glossary; it can encode any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((head + definition for head, definition in glossary()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def make_model(seed: int) -> Any:
    """The untrained model: two layers of width 128, 0.46 million parameters, in float32 on the CPU."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=512,
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                tie_word_embeddings=True,
                eos_token_id=EOS_ID,
                pad_token_id=PAD_ID,
                bos_token_id=None,
            )
        )


def train(model: Any, tokenizer: Any, *, steps: int, seed: int, progress: Progress | None = None) -> float:
    """Teach the glossary, 32 entries at a time, by AdamW with a warm-up and a linear decay.

    Returns:
        The mean training loss of the last ten steps, nats per token.
    """
    device = model.device
    entries = [
        torch.tensor([*tokenizer(head + definition)["input_ids"], EOS_ID], device=device)
        for head, definition in glossary()
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    generator = random.Random(seed)
    model.train()
    losses: list[float] = []
    for step in range(steps):
        loss = _cross_entropy(model, generator.sample(entries, 32))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, steps)
    model.eval()
    return sum(losses[-10:]) / len(losses[-10:])


def _cross_entropy(model: Any, entries: list[Tensor]) -> Tensor:
    ids = torch.nn.utils.rnn.pad_sequence(entries, batch_first=True, padding_value=PAD_ID)
    kept = ids != PAD_ID
    return model(input_ids=ids, attention_mask=kept.long(), labels=ids.masked_fill(~kept, -100)).loss


def shortest_entries(tokenizer: Any) -> list[Rollout]:
    """Each headword's shortest definition as a rollout, for the `nll` update: a step towards a terser glossary."""
    shortest: dict[str, str] = {}
    for head, definition in glossary():
        if len(definition) < len(shortest.get(head, definition + " ")):
            shortest[head] = definition
    return [
        Rollout(
            prompt_ids=tokenizer(head)["input_ids"],
            completion_ids=[*tokenizer(definition)["input_ids"], EOS_ID],
            prompt_index=index,
            finish_reason="stop",
            prompt=head,
            completion=definition,
        )
        for index, (head, definition) in enumerate(shortest.items())
    ]


def reward_length(rollouts: list[Rollout]) -> list[Rollout]:
    """The rollouts with advantages: their length as the reward, standardised within each prompt's group."""
    groups: dict[Any, list[int]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.prompt_index, []).append(len(rollout.completion_ids))
    result = []
    for rollout in rollouts:
        lengths = torch.tensor(groups[rollout.prompt_index], dtype=torch.float64)
        spread = float(lengths.std(correction=0))
        advantage = (len(rollout.completion_ids) - float(lengths.mean())) / (spread or 1.0)
        result.append(replace(rollout, advantage=advantage))
    return result


def run(
    output: str | Path,
    *,
    seed: int = 0,
    training_steps: int = 150,
    group_size: int = 16,
    device: torch.device | str | None = None,
    progress: StageProgress | None = None,
) -> dict[str, Report]:
    """Train, sample, update, measure, and write everything to a folder.

    Args:
        output: receives the checkpoints `original`, `updated-nll` and `updated-rl`, the evaluation rollouts and the
            prompts as JSON lines, and the two reports in `nll` and `rl`.
        seed: of the weights, the batches and the samples.
        training_steps: of 32 entries each.
        group_size: evaluation rollouts of each of the 59 prompts; the `rl` update has half as many of its own.
        device: by default the GPU where there is one.
        progress: called with (what is done, steps done, steps in all).

    Returns:
        The reports of the two updates, by the name of their loss.
    """
    output = Path(output)
    say = progress or (lambda stage, done, total: None)
    with _one_thread():
        tokenizer = make_tokenizer()
        model = make_model(seed).to(find_device(device))
        train(model, tokenizer, steps=training_steps, seed=seed, progress=lambda done, total: say("train", done, total))
        save_checkpoint(output / "original", model, tokenizer)
        heads = list(dict(glossary()))
        write_lines(output / "prompts.jsonl", ({"prompt": head} for head in heads))

        def sample(stage: str, size: int, seed: int) -> list[Rollout]:
            return sample_rollouts(
                model,
                [tokenizer(head)["input_ids"] for head in heads],
                group_size=size,
                eos_token_ids=(EOS_ID,),
                max_new_tokens=MAX_NEW_TOKENS,
                batch_size=256,
                seed=seed,
                tokenizer=tokenizer,
                progress=lambda done, total: say(stage, done, total),
            )

        evaluation = sample("sample", group_size, seed + 1)
        write_rollouts(output / "rollouts.jsonl", evaluation)
        # the steps are taken on other sequences than the entropy is measured on, which a step would otherwise favour
        updates: dict[TrainingLoss, list[Rollout]] = {
            "nll": shortest_entries(tokenizer),
            "rl": reward_length(sample("sample for rl", max(2, group_size // 2), seed + 2)),
        }
        rollouts = to_rollouts(evaluation)
        config = Config()
        scoring = Scoring.from_config(config, model, tokenizer)
        original = score(model, rollouts, scoring, progress=lambda done, total: say("score", done, total))
        floor = measure_noise_floor(model, rollouts, original, config, scoring)
        reports: dict[str, Report] = {}
        for loss, batch in updates.items():
            optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
            with one_step(model, optimizer, to_rollouts(batch), scoring, loss=loss):
                save_checkpoint(output / f"updated-{loss}", model, tokenizer)
                updated = score(
                    model,
                    rollouts,
                    replace(scoring, layout=original.layout),
                    progress=lambda done, total, loss=loss: say(f"score after {loss}", done, total),  # type: ignore[misc]
                )
            change = measure_change(rollouts, original, updated, config, noise_floor=floor)
            reports[loss] = Report(change, _TITLES[loss], {"demo": loss, "seed": seed, "learning_rate": LEARNING_RATE})
            reports[loss].write(output / loss)
    return reports


@contextmanager
def _one_thread() -> Iterator[None]:
    # the matrices are too small to share between threads, which on a busy machine wait for each other
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
