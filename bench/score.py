"""A whole scoring pass on one GPU: `python -m bench.score [--out FILE]`.

Random weights of a real shape, rollouts of P prompts with 8 completions each, lengths spread as in real ones. Beside
`entropy_fast.score`: float32 log_softmax a microbatch at a time, as the proposal's code does it, and the transformer
alone over exactly as many tokens as the rollouts hold, padded, unpadded, and with every prompt once. All in one run;
medians over alternating repeats; memory is the peak over the weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf

from entropy_fast import Rollouts, score
from entropy_fast.files import atomic_text

PROMPT, LONGEST, GROUP = 128, 512, 8
SHAPES = {
    "qwen2.5-1.5b": (8, lambda: tf.Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=32768, rope_theta=1e6, tie_word_embeddings=True)),
    "llama-3-8b": (8, lambda: tf.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=5e5)),
    "gemma-2-2b": (8, lambda: tf.Gemma2Config()),
}  # fmt: skip


def rollouts(prompts: int, vocab: int) -> Rollouts:
    """Completions of 16 to 512 tokens, the same at every run."""
    g = torch.Generator().manual_seed(0)
    n = prompts * GROUP
    lengths = torch.randint(16, LONGEST + 1, (n,), generator=g)
    heads = torch.randint(3, vocab, (prompts, PROMPT), generator=g).repeat_interleave(GROUP, 0).tolist()
    tails = torch.randint(3, vocab, (n, LONGEST), generator=g).tolist()
    return Rollouts.from_lists(heads, [t[:k] for t, k in zip(tails, lengths.tolist(), strict=True)])


def proposal(model: torch.nn.Module, r: Rollouts, size: int) -> torch.Tensor:
    """S by float32 log_softmax over the whole vocabulary, `size` sequences at a time."""
    sums = []
    for i in range(0, len(r), size):
        ids, mask = r.tokens[i : i + size].cuda(), r.attention_mask[i : i + size].cuda()
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        logp = logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        sums.append(torch.where(r.generated[i : i + size, 1:].cuda(), logp, 0.0).sum(1))
    return torch.cat(sums)


def dense(model: torch.nn.Module, tokens: int, *, per_pass: int = 8192, width: int = 640) -> None:
    """The transformer alone over `tokens` tokens in full rows, nothing padded."""
    while tokens > 0:
        rows = max(1, min(tokens, per_pass) // width)
        ids = torch.randint(3, 1000, (rows, min(width, tokens)), device="cuda")
        model.base_model(input_ids=ids, use_cache=False)
        tokens -= ids.numel()


def measure(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Median and spread in ms over alternating repeats, peak MiB over what was allocated before."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    peaks = {}
    for repeat in range(repeats + 1):
        for name, run in cases.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if repeat:
                times[name].append(start.elapsed_time(end))
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {
        name: {"ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t), "peak_mib": peaks[name]}
        for name, t in times.items()
    }


@torch.no_grad()
def bench(name: str, repeats: int) -> dict[str, object]:
    """One shape: agreement first, then times and memory of all ways."""
    prompts, make = SHAPES[name]
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = tf.AutoModelForCausalLM.from_config(make(), dtype=torch.bfloat16).eval()
    r = rollouts(prompts, model.config.vocab_size)
    padded, unpadded = r.tokens.numel(), int(r.attention_mask.sum())
    unique = int(r.generated.sum()) + prompts * PROMPT
    first = score(model, r)
    again = score(model, r, layout=first.layout)
    right = score(model, r, packing=False)
    cases = {
        "score": lambda: score(model, r),
        "score, no entropy": lambda: score(model, r, entropy=False),
        "score, right-padded": lambda: score(model, r, packing=False),
        "log_softmax, 2 sequences": lambda: proposal(model, r, 2),
        "log_softmax, 8 sequences": lambda: proposal(model, r, 8),
        "transformer, padded": lambda: dense(model, padded),
        "transformer, unpadded": lambda: dense(model, unpadded),
        "transformer, unique": lambda: dense(model, unique),
        "transformer, unique, one pass": lambda: dense(model, unique, per_pass=unique),
    }
    results = measure(cases, repeats)
    mine = results["score"]
    floor = min(results["transformer, unique"]["ms"], results["transformer, unique, one pass"]["ms"])
    old = results["log_softmax, 2 sequences"]
    return {
        "shape": name,
        "sequences": len(r),
        "tokens": {"padded": padded, "unpadded": unpadded, "unique": unique, "generated": int(r.generated.sum())},
        "packed": first.layout.packed,
        "microbatches": len(first.layout.microbatches),
        "bitwise_repeat": bool(torch.equal(first.logprob, again.logprob)),
        "S_packed_minus_padded_max": float((first.S - right.S).abs().max()),
        "S_log_softmax_minus_score_max": float((proposal(model, r, 8).cpu() - first.S).abs().max()),
        "results": results,
        "over_unique_floor": mine["ms"] / floor,
        "times_faster_than_log_softmax_2": old["ms"] / mine["ms"],
        "memory_share_of_log_softmax_2": mine["peak_mib"] / old["peak_mib"],
        "tokens_per_s": int(r.generated.sum()) / mine["ms"] * 1e3,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    report: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": tf.__version__,
        "python": sys.version.split()[0],
        "models": (models := []),
    }
    for name in options.shapes:
        models.append(bench(name, options.repeats))
        print(json.dumps(models[-1], indent=1), flush=True)
        torch.cuda.empty_cache()
        if options.out:
            with atomic_text(options.out) as stream:
                json.dump(report, stream, indent=1)


if __name__ == "__main__":
    main()
