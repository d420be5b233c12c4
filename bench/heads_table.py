"""What every causal class of transformers gets: `python -m bench.heads_table [--out docs/heads.md]`.

Each class is built as small as its configuration allows, scored, and compared with its own logits.
"""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from entropy_fast import Rollouts, score
from entropy_fast.errors import InputError
from entropy_fast.files import atomic_text
from entropy_fast.heads import find_head, forward_kwargs

VOCAB = 128
# One name or another of the sizes that configurations have, and a small value for each.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "n_embed", "dim", "model_dim"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "moe_intermediate_size", "ffn_hidden_size"), 64
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk", "moe_top_k"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "rotary_dim": 8,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "state_size": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}
SECONDS = 20
MOST_PARAMETERS = 30_000_000


@dataclass(frozen=True)
class Row:
    """One class: how it is scored, or why it could not be tried."""

    name: str
    mode: str
    packed: str
    difference: str
    note: str


def build(name: str, config_class: type) -> torch.nn.Module:
    """A model of this class, small; raises what its own code raises."""
    model_class = getattr(tf, name)
    config_class = model_class.config_class or config_class
    known = config_class()
    changes = {key: value for key, value in SMALL.items() if getattr(known, key, None) is not None}
    for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"):
        changes[key] = SMALL[key]
    if hasattr(known, "is_decoder"):
        changes["is_decoder"] = True
    if isinstance(getattr(config_class, "head_dim", None), property) or hasattr(known, "qk_rope_head_dim"):
        changes.pop("head_dim", None)
    config = config_class(**changes)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"its configuration does not shrink ({size / 1e6:.0f}M parameters)")
    torch.manual_seed(0)
    return model_class(config).eval()


def rollouts() -> Rollouts:
    """Two prompts with two completions each."""
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in (5, 5, 9, 9)]
    prompts[1], prompts[3] = prompts[0], prompts[2]
    return Rollouts.from_lists(prompts, [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in (9, 4, 12, 7)])


@torch.no_grad()
def own_logits(model: torch.nn.Module, r: Rollouts) -> torch.Tensor:
    """S from the model's own logits of each sequence alone, in float64."""
    sums = []
    for i in range(len(r)):
        ids, start = r.tokens[i][r.attention_mask[i]], int(r.prompt_lens[i])
        logp = model(input_ids=ids[None], **forward_kwargs(model)).logits[0].double().log_softmax(-1)
        sums.append(logp[range(start - 1, len(ids) - 1), ids[start:]].sum())
    return torch.stack(sums)


def examine(name: str, config_class: type) -> Row:
    """Build, score and compare one class."""
    try:
        model = build(name, config_class)
        expected = own_logits(model, r := rollouts())
    except Exception as error:
        return Row(name, "not tried", "", "", _first_line(error))
    try:
        head = find_head(model)
        scores = score(model, r)
    except InputError as error:
        return Row(name, "refused", "", "", _first_line(error))
    except Exception as error:
        return Row(name, "FAILED", "", "", _first_line(error))
    return Row(
        name,
        head.mode,
        "packed" if scores.layout.packed else "padded",
        f"{float((scores.S - expected).abs().max()):.0e}",
        head.reason,
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:110].replace("|", "/")


def rows() -> Iterator[Row]:
    """Every causal class, alphabetically; a class that takes too long is given up."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    seen = set()
    for key, name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items(), key=lambda item: item[1]):
        if name in seen:
            continue
        seen.add(name)
        signal.alarm(SECONDS)
        try:
            yield examine(name, type(tf.AutoConfig.for_model(key)))
        except Exception as error:
            yield Row(name, "not tried", "", "", _first_line(error))
        finally:
            signal.alarm(0)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/heads.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tf.logging.set_verbosity_error()
    found = []
    for row in rows():
        found.append(row)
        print(row, file=sys.stderr, flush=True)
    counts = {mode: sum(row.mode == mode for row in found) for mode in dict.fromkeys(row.mode for row in found)}
    with atomic_text(options.out) as out:
        out.write(
            "# Heads and layouts by model class\n\n"
            f"Written by `python -m bench.heads_table` with transformers {tf.__version__}. Each class is built tiny "
            "with random weights, in float32, and scored; `difference` is the largest difference in a sequence's S, in "
            "nats, from the class's own logits of that sequence alone.\n\n"
            "`fused`: hidden states and head go to the kernel, no logits exist. `module`: the head is called on chunks "
            "of rows. `logits`: the model's own logits, a microbatch at a time. `packed` and `padded` say which layout "
            "was taken.\n\n"
            + ", ".join(f"{n} {mode}" for mode, n in counts.items())
            + f", of {len(found)} classes.\n\n| class | head | layout | difference | note |\n|---|---|---|---|---|\n"
        )
        for row in found:
            out.write(f"| {row.name} | {row.mode} | {row.packed} | {row.difference} | {row.note} |\n")


if __name__ == "__main__":
    main()
