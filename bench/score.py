"""A whole scoring pass: `python -m bench score [--shapes qwen2.5-1.5b ...] [--out FILE]`.

Random weights of a real shape, rollouts of P prompts with 8 completions each, lengths spread as in real ones. Beside
`entropy_fast.score`: float32 log_softmax a microbatch at a time, as the proposal's code does it, and the transformer
alone over exactly as many tokens as the rollouts hold, padded, unpadded, and with every prompt once; the last in one
pass, or in several where that is faster, is the floor. The op `head` is what follows the last hidden state, beside
float32 logits in one piece. All in one run, in turn, the calls of a repeat one behind the other; medians over the
repeats, and `ms_min`, because the host can be slow and noisy; memory is the peak over the weights, of one call alone.
`S_difference` is the largest difference of a sequence's S from that of `entropy_fast`, in nats; `share`, of the head's
row, its part of the whole pass, and of one with the model's own layers. TRL's functions stand beside it where TRL is
installed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from bench.harness import alternating_ms, peak_bytes, show, write
from entropy_fast import Rollouts, linear_token_stats, score

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGES = ("torch", "triton", "transformers", "entropy_fast", "trl")
BOTH, LOGPROB = "logprob, entropy", "logprob"
PROMPT, LONGEST, GROUP = 128, 512, 8


def rope(theta: float) -> dict[str, Any]:
    """Rotary positions of a base."""
    return {"rope_type": "default", "rope_theta": theta}


SHAPES = {
    "qwen2.5-1.5b": (8, lambda: tf.Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=32768, rope_parameters=rope(1e6), tie_word_embeddings=True)),
    "llama-3-8b": (8, lambda: tf.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_parameters=rope(5e5))),
    "gemma-2-2b": (8, lambda: tf.Gemma2Config()),
    "small": (1, lambda: tf.Qwen2Config(
        vocab_size=32000, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True)),
}  # fmt: skip


def rollouts(prompts: int, vocab: int) -> Rollouts:
    """Completions of 16 to 512 tokens, the same at every run."""
    g = torch.Generator().manual_seed(0)
    n = prompts * GROUP
    lengths = torch.randint(16, LONGEST + 1, (n,), generator=g)
    heads = torch.randint(3, vocab, (prompts, PROMPT), generator=g).repeat_interleave(GROUP, 0).tolist()
    tails = torch.randint(3, vocab, (n, LONGEST), generator=g).tolist()
    return Rollouts.from_lists(heads, [t[:k] for t, k in zip(tails, lengths.tolist(), strict=True)])


def proposal(model: tf.PreTrainedModel, r: Rollouts, size: int) -> torch.Tensor:
    """S by float32 log_softmax over the whole vocabulary, `size` sequences at a time."""
    sums = []
    for i in range(0, len(r), size):
        ids, mask = r.tokens[i : i + size].to(DEVICE), r.attention_mask[i : i + size].to(DEVICE)
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        logp = logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        sums.append(torch.where(r.generated[i : i + size, 1:].to(DEVICE), logp, 0.0).sum(1))
    return torch.cat(sums)


def dense(model: tf.PreTrainedModel, tokens: int, *, per_pass: int = 8192, width: int = 640) -> None:
    """The transformer alone over `tokens` tokens in full rows, nothing padded."""
    while tokens > 0:
        rows = max(1, min(tokens, per_pass) // width)
        ids = torch.randint(3, 1000, (rows, min(width, tokens)), device=DEVICE)
        model.base_model(input_ids=ids, use_cache=False)
        tokens -= ids.numel()


def trl_cases(model: tf.PreTrainedModel, r: Rollouts) -> dict[str, Callable[[], torch.Tensor]]:
    """S by TRL's functions as it runs them, 8 right-padded sequences at a time in the order given; none without TRL."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    head, config = model.get_output_embeddings(), model.config

    def from_hidden(ids: torch.Tensor, mask: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        # 32768: its trainers' chunk
        facts = (head.bias, ids[:, 1:][generated], 1.0, 32768, getattr(config, "final_logit_softcapping", None), 1.0)
        logp = ChunkedLogProbFunction.apply(hidden[generated], head.weight, *facts, ("entropy",))[0]
        return logp.new_zeros(generated.shape).masked_scatter(generated, logp).sum(1)

    def from_logits(ids: torch.Tensor, mask: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
        # the completions' columns alone, and the prompt's last, which predicts the first of them
        keep = ids.shape[1] - PROMPT
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep + 1).logits[:, :-1]
        return selective_log_softmax_and_entropy(logits, ids[:, -keep:], 1.0, generated[:, -keep:])[0].sum(1)

    def microbatches(function: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            parts = (t.to(DEVICE).split(8) for t in (r.tokens, r.attention_mask.long(), r.generated[:, 1:]))
            return torch.cat([function(*part) for part in zip(*parts, strict=True)])

        return run

    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        found["TRL functions, hidden states"] = microbatches(from_hidden)
        # a Triton kernel: nothing for a CPU
        if DEVICE == "cuda":
            from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

            found["TRL functions, logits"] = microbatches(from_logits)
    except ImportError:
        pass
    return found


def measure(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, Any]]:
    """Median and spread over alternating repeats, and the memory of one more call."""
    return {
        name: {
            "ms": statistics.median(times),
            "ms_min": min(times),
            "ms_max": max(times),
            "peak_bytes": peak_bytes(cases[name]),
        }
        for name, times in alternating_ms(cases, repeats).items()
    }


def rows(op: str, found: dict[str, dict[str, Any]], floors: list[str], **facts: Any) -> list[dict[str, Any]]:
    """Rows of the common result file; `outputs` and `S_difference` are dictionaries by name."""
    best = min(floors, key=lambda name: found[name]["ms"])
    outputs, difference = facts.pop("outputs"), facts.pop("S_difference")
    facts |= {"error_logprob": None, "error_entropy": None}
    return [
        {
            "op": op,
            "impl": "floor" if name == best else name,
            **facts,
            "outputs": outputs.get(name, ""),
            **numbers,
            "of_floor": numbers["ms"] / found[best]["ms"],
            "S_difference": difference.get(name),
        }
        for name, numbers in found.items()
    ]


@torch.no_grad()
def bench(name: str, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """One shape: agreement, then times and memory of all ways."""
    prompts, make = SHAPES[name]
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = tf.AutoModelForCausalLM.from_config(make(), dtype=dtype).eval()
    r = rollouts(prompts, model.config.vocab_size)
    unique = int(r.generated.sum()) + prompts * PROMPT
    first = score(model, r)
    if not torch.equal(score(model, r, layout=first.layout).logprob, first.logprob):
        raise AssertionError("the same weights gave other bits")
    sums = {
        "entropy_fast, right-padded": score(model, r, packing=False).S,
        "entropy_fast, not fused": score(model, r, fusion=False).S,
        "log_softmax, 8": proposal(model, r, 8),
    }
    peers = trl_cases(model, r)
    sums |= {case: run() for case, run in peers.items()}
    cases = {
        "entropy_fast": lambda: score(model, r),
        "entropy_fast, no entropy": lambda: score(model, r, entropy=False),
        "entropy_fast, right-padded": lambda: score(model, r, packing=False),
        "entropy_fast, not fused": lambda: score(model, r, fusion=False),
        "log_softmax, 2": lambda: proposal(model, r, 2),
        "log_softmax, 8": lambda: proposal(model, r, 8),
        "transformer, padded": lambda: dense(model, r.tokens.numel()),
        "transformer, unpadded": lambda: dense(model, int(r.attention_mask.sum())),
        "transformer, unique": lambda: dense(model, unique),
        "transformer, unique, one pass": lambda: dense(model, unique, per_pass=unique),
    }
    outputs = {
        case: LOGPROB if "no entropy" in case or "log_softmax" in case else BOTH
        for case in cases
        if "transformer" not in case
    }
    cases |= peers
    outputs |= dict.fromkeys(peers, BOTH)
    facts: dict[str, Any] = {"shape": {"model": name, "sequences": len(r), "unique_tokens": unique}}
    facts["dtype"] = str(dtype).removeprefix("torch.")
    found = rows(
        "score",
        measure(cases, repeats),
        ["transformer, unique", "transformer, unique, one pass"],
        outputs=outputs,
        S_difference={case: float((S.cpu() - first.S.cpu()).abs().max()) for case, S in sums.items()},
        **facts,
    )
    heads = head_rows(model, int(r.generated.sum()), repeats, facts)
    ms = {(row["op"], row["impl"]): row["ms"] for row in found + heads}
    for row in heads:
        if row["impl"] == "entropy_fast":
            row["share"] = row["ms"] / ms["score", "entropy_fast"]
            row["share_not_fused"] = row["ms"] / ms["score", "entropy_fast, not fused"]
            shares = f"{row['share']:.1%} of the pass, {row['share_not_fused']:.1%} of one that is not fused"
            print(f"{name}: the head is {shares}")
    return found + heads


@torch.no_grad()
def head_rows(model: tf.PreTrainedModel, tokens: int, repeats: int, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What follows the last hidden state, for as many tokens as were generated."""
    weight = model.get_output_embeddings().weight
    hidden = torch.randn(tokens, weight.shape[1], device=DEVICE).to(weight.dtype)
    targets = torch.randint(weight.shape[0], (tokens,), device=DEVICE)

    def eager() -> tuple[torch.Tensor, torch.Tensor]:
        logp = (hidden @ weight.T).float().log_softmax(-1)
        return logp.gather(1, targets[:, None]), -(logp.exp() * logp).sum(-1)

    cases = {"entropy_fast": lambda: linear_token_stats(hidden, weight, targets)[:2], "log_softmax, one piece": eager}
    cases["the product alone"] = lambda: hidden @ weight.T
    outputs = dict.fromkeys(list(cases)[:2], BOTH)
    return rows("head", measure(cases, repeats), ["the product alone"], outputs=outputs, S_difference={}, **facts)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    here = [name for name in SHAPES if (name == "small") == (DEVICE == "cpu")]
    parser.add_argument("--shapes", nargs="+", default=here, choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16" if DEVICE == "cuda" else "float32")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for name in options.shapes:
        measured = bench(name, getattr(torch, options.dtype), options.repeats)
        show(measured)
        found += measured
        # after every shape, so that a limit of time loses one at most
        if options.out:
            write(found, PACKAGES, options.out)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
