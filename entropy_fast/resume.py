"""Scoring that survives being killed: finished shards stay on disk, and the next run takes up where it stopped.

A shard is a run of whole prompts, scored with a layout of its own, so its bits do not depend on which shards were
finished before. Shard files appear whole or not at all. A fingerprint of the rollouts, of the way of scoring and of
every weight keeps the shards of another run from being taken for this one's.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from entropy_fast._version import __version__
from entropy_fast.errors import InputError
from entropy_fast.files import atomic_path, atomic_text
from entropy_fast.heads import eos_token_ids, input_embedding, unwrap
from entropy_fast.layout import Layout
from entropy_fast.rollouts import Counting, Rollouts, TokenMasks
from entropy_fast.scoring import Progress, Scorer, Scores, Scoring, score

SHARD_SEQUENCES = 256
_SAMPLES = 1024  # elements of each weight that are hashed, beside the sum of all its bits
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def score_resumable(
    model: nn.Module,
    rollouts: Rollouts,
    scoring: Scoring | None = None,
    *,
    directory: str | Path,
    shard_sequences: int = SHARD_SEQUENCES,
    progress: Progress | None = None,
) -> Scores:
    """`score`, in shards of about `shard_sequences` sequences that are kept in `directory`.

    Args:
        model: a causal language model; left as it was.
        rollouts: what is scored.
        scoring: how. A layout in it must come from an earlier call with the same shards.
        directory: made if missing; one for each policy. Remove it when the result is safe.
        shard_sequences: a shard ends at the first prompt boundary from here on.
        progress: called with (tokens done, tokens in all) after each microbatch.

    Returns:
        The same scores, bit for bit, however often the run was interrupted.

    Raises:
        InputError: `directory` holds shards of another run, or `score` raises it.
    """
    if shard_sequences < 1:
        raise InputError(f"shard_sequences must be at least 1, got {shard_sequences}")
    scoring = scoring or Scoring()
    # once for all shards, so that they count the same tokens and are laid out in the same way
    scoring = replace(scoring, counting=scoring.counting or Counting(eos_token_ids(model)))
    whole = Scorer(model, rollouts, scoring, packing=scoring.packing, fusion=scoring.fusion)
    scoring = replace(scoring, packing=whole.layout.packed, fusion=whole.layout.fused)
    folder = Path(directory)
    shards = _shards(rollouts, shard_sequences)
    _claim(folder, _fingerprint(model, rollouts, scoring, shards))
    tokens = [int(whole.dense.input_lengths[shard.start : shard.stop].sum()) for shard in shards]
    parts = []
    for number, shard in enumerate(shards):
        path = folder / f"shard-{number:05d}.pt"
        if not path.exists():
            moved = None if progress is None else _moved_on(progress, sum(tokens[:number]), sum(tokens))
            _write(path, _score_shard(model, rollouts, scoring, shard, whole.masks, moved))
        parts.append(torch.load(path, weights_only=True))
        if progress is not None:
            progress(sum(tokens[: number + 1]), sum(tokens))
    device = rollouts.tokens.device
    return Scores(
        logprob=torch.cat([part["logprob"] for part in parts]).to(device),
        entropy=torch.cat([part["entropy"] for part in parts]).to(device) if scoring.entropy else None,
        masks=whole.masks,
        layout=replace(
            whole.layout, microbatches=tuple(tuple(group) for part in parts for group in part["microbatches"])
        ),
    )


def _shards(rollouts: Rollouts, size: int) -> list[range]:
    prompts = rollouts.prompt_index.tolist()
    shards, start = [], 0
    for i in range(1, len(prompts) + 1):
        if i == len(prompts) or (i - start >= size and prompts[i] != prompts[i - 1]):
            shards.append(range(start, i))
            start = i
    return shards


def _moved_on(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)


def _score_shard(
    model: nn.Module, rollouts: Rollouts, scoring: Scoring, shard: range, masks: TokenMasks, progress: Progress | None
) -> dict[str, object]:
    index = torch.arange(shard.start, shard.stop, device=rollouts.tokens.device)
    if not masks.generated[index].any():
        nothing = torch.zeros(len(shard), rollouts.tokens.shape[1])
        return {"logprob": nothing, "entropy": nothing, "microbatches": []}
    layout = None if scoring.layout is None else _inside(scoring.layout, shard)
    scores = score(model, rollouts.select(index), replace(scoring, layout=layout), progress=progress)
    return {
        "logprob": scores.logprob.cpu(),
        "entropy": None if scores.entropy is None else scores.entropy.cpu(),
        "microbatches": [[i + shard.start for i in group] for group in scores.layout.microbatches],
    }


def _inside(layout: Layout, shard: range) -> Layout:
    """The layout's microbatches that lie in the shard, counted from its start."""
    groups = [group for group in layout.microbatches if any(i in shard for i in group)]
    if any(i not in shard for group in groups for i in group):
        raise InputError(
            "scoring.layout has microbatches across shards; take the layout of an earlier score_resumable with the "
            "same rollouts and shard_sequences"
        )
    return replace(layout, microbatches=tuple(tuple(i - shard.start for i in group) for group in groups))


def _write(path: Path, content: dict[str, object]) -> None:
    with atomic_path(path) as partial:
        torch.save(content, partial)


def _claim(folder: Path, fingerprint: str) -> None:
    """Mark the folder as this run's, or find that it is."""
    marker = folder / "run.json"
    if marker.exists():
        if json.loads(marker.read_text(encoding="utf-8")).get("fingerprint") != fingerprint:
            raise InputError(
                f"{folder} holds the shards of another run (other rollouts, weights, settings or versions); give "
                "another folder, or remove it to start anew"
            )
        return
    if folder.exists() and any(folder.glob("shard-*.pt")):
        raise InputError(f"{folder} holds shards without run.json; give another folder")
    with atomic_text(marker) as stream:
        json.dump({"fingerprint": fingerprint}, stream)


def _fingerprint(model: nn.Module, rollouts: Rollouts, scoring: Scoring, shards: list[range]) -> str:
    digest = hashlib.sha256()
    environment = (__version__, torch.__version__, input_embedding(model).device.type)
    named = {"shards": shards, "model": type(unwrap(model)).__name__, "environment": environment, **vars(scoring)}
    for name, value in named.items():
        digest.update(f"{name}={value!r};".encode())
    for field in fields(rollouts):
        value = getattr(rollouts, field.name)
        if isinstance(value, Tensor):
            _add(digest, field.name, value)
    for name, parameter in unwrap(model).named_parameters():
        flat = parameter.detach().flatten()
        _add(digest, name, flat[:: max(1, len(flat) // _SAMPLES)])
        _add(digest, name, flat.view(_BITS[flat.element_size()]).sum(0, keepdim=True, dtype=torch.int64))
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
    digest.update(raw.tobytes())
