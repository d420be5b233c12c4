"""What every language model class of transformers gets: `python -m bench.heads_table [--out docs/heads.md]`.

Each class is built as small as its configuration allows, scored, and compared with its own logits.
"""

from __future__ import annotations

import argparse
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as tf
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from bench.tiny_classes import VOCAB, build
from entropy_fast import Rollouts, score
from entropy_fast.errors import EntropyFastWarning, InputError
from entropy_fast.files import atomic_text
from entropy_fast.fusion import Fusion
from entropy_fast.heads import find_head, forward_kwargs

SECONDS = 60


@dataclass(frozen=True)
class Row:
    """One class: how it is scored, or why it could not be tried."""

    name: str
    mode: str
    packed: str
    kernels: str
    difference: str
    note: str


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


def examine(name: str) -> Row:
    """Build, score and compare one class."""
    try:
        model = build(name)
    except Exception as error:
        return Row(name, "not tried", "", "", "", _first_line(error))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", EntropyFastWarning)
            head = find_head(model)
            scores = score(model, r := rollouts())
        difference = float((scores.S - own_logits(model, r)).abs().max())
    except InputError as error:
        return Row(name, "refused", "", "", "", _first_line(error))
    except Exception as error:
        return Row(name, "FAILED" if _runs(model) else "not tried", "", "", "", _first_line(error))
    notes = dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, EntropyFastWarning))
    layout = "packed" if scores.layout.packed else "padded"
    kernels = ", ".join(sorted(Fusion(model).kinds))
    return Row(name, head.mode, layout, kernels, f"{difference:.0e}", "; ".join(notes).replace(f"{name}: ", ""))


def _runs(model: torch.nn.Module) -> bool:
    try:
        return bool(own_logits(model, rollouts()).isfinite().all())
    except Exception:
        return False


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return textwrap.shorten(f"{type(error).__name__}: {text}", 160).replace("|", "/")


def rows() -> Iterator[Row]:
    """Every causal and every image-text class, alphabetically; one that takes too long is given up."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    for name in sorted(names):
        signal.alarm(SECONDS)
        try:
            yield examine(name)
        except Exception as error:
            yield Row(name, "not tried", "", "", "", _first_line(error))
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
            "was taken. `kernels`: layers that run by a kernel in scoring passes on a GPU, if a trial on the model "
            "agrees.\n\n"
            "Classes that read an image beside the text are scored on text. Those that are bidirectional unless their "
            "configuration says otherwise (XLM, XLNet, BERT's relatives, PaliGemma) are built with the setting that "
            "makes them causal. Refused: what gives no probability of a sequence from its tokens alone (encoder-"
            "decoders, models that need an image, bidirectional ones). Not tried: no small one could be built.\n\n"
            + ", ".join(f"{n} {mode}" for mode, n in counts.items())
            + f", of {len(found)} classes.\n\n| class | head | layout | kernels | difference | note |\n"
            "|---|---|---|---|---|---|\n"
        )
        for row in found:
            out.write(f"| {row.name} | {row.mode} | {row.packed} | {row.kernels} | {row.difference} | {row.note} |\n")


if __name__ == "__main__":
    main()
