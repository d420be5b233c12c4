"""Policies on disk: score a rollouts file under a model folder, or measure the change between two of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from entropy_fast.calibration import PrecisionNoise, calibrate
from entropy_fast.change import Change, measure_change, measure_noise_floor
from entropy_fast.config import Config
from entropy_fast.errors import InputError
from entropy_fast.jsonl import RolloutFile
from entropy_fast.loading import (
    DType,
    LoadedModel,
    check_model_folder,
    check_same_vocabulary,
    is_adapter,
    is_checkpoint,
    load_model,
    with_adapter,
)
from entropy_fast.policies import adapter_direction, adapter_off, state_difference
from entropy_fast.resume import score_resumable
from entropy_fast.scoring import Scores, Scoring, score
from entropy_fast.sweep import Sweep, sweep

StageProgress = Callable[[str, int, int], None]
"""Called with (what is done, tokens done, tokens in all)."""


def score_checkpoint(
    model: str | Path,
    file: RolloutFile,
    config: Config | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: DType = "auto",
    resume: str | Path | None = None,
    progress: StageProgress | None = None,
) -> Scores:
    """Score a rollouts file under one model folder.

    Args:
        model: see `load_model`.
        file: see `read_rollouts`.
        config: its `entropy`, `generation` and `memory_config` sections are read.
        device, dtype: see `load_model`.
        resume: a folder that keeps finished shards, from which a run that was killed goes on; see `score_resumable`.
        progress: called after each microbatch.

    Raises:
        InputError: the folder, the ids or the temperature do not fit.
    """
    config = at_sampled_temperature(config or Config(), file)
    loaded = load_model(model, device=device, dtype=dtype)
    return _score(loaded, file, _scoring(loaded, config), "scoring", progress, resume)


def compare_checkpoints(
    original: str | Path,
    updated: str | Path,
    file: RolloutFile,
    config: Config | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: DType = "auto",
    resume: str | Path | None = None,
    progress: StageProgress | None = None,
) -> Change:
    """Measure by how much the entropy changes from one model folder to another.

    One model is in memory at a time; an adapter is put on the original that is there already.

    Args:
        original: the policy that the rollouts were drawn from.
        updated: a checkpoint of the same model, or a peft adapter on `original`.
        file: see `read_rollouts`.
        config: the headline's unit and the weighting; see `Config`.
        device, dtype: see `load_model`.
        resume: as in `score_checkpoint`; each policy's shards get a folder of their own in it.
        progress: called after each microbatch.

    Raises:
        InputError: the folders, their vocabularies, the ids or the temperature do not fit.
    """
    config = at_sampled_temperature(config or Config(), file)
    check_same_vocabulary(original, updated)
    loaded = load_model(original, device=device, dtype=dtype)
    scoring = _scoring(loaded, config)
    first = _score(loaded, file, scoring, "original", progress, resume)
    floor = measure_noise_floor(loaded.model, file.rollouts, first, config, scoring)
    if is_adapter(check_model_folder(updated)) and not is_checkpoint(updated):
        loaded = with_adapter(loaded, updated)
    else:
        del loaded  # room for the other one
        gc.collect()
        loaded = load_model(updated, device=device, dtype=dtype)
    second = _score(loaded, file, replace(scoring, layout=first.layout), "updated", progress, resume)
    return measure_change(file.rollouts, first, second, config, noise_floor=floor)


def sweep_checkpoints(
    original: str | Path,
    updated: str | Path,
    file: RolloutFile,
    etas: Sequence[float],
    config: Config | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: DType = "auto",
    progress: StageProgress | None = None,
) -> Sweep:
    """Measure ΔH along the straight line from one model folder to another: θ + η (θ_updated − θ).

    Args:
        original: the policy that the rollouts were drawn from, η = 0.
        updated: a checkpoint of the same model, or a LoRA adapter on `original`: η = 1.
        file: see `read_rollouts`.
        etas: two or more steps.
        config: see `Config`.
        device, dtype: see `load_model`.
        progress: called after each policy.

    Raises:
        InputError: as `compare_checkpoints`, or the adapter is of a kind that adds no matrix to the weights.
    """
    config = at_sampled_temperature(config or Config(), file)
    check_same_vocabulary(original, updated)
    loaded = load_model(original, device=device, dtype=dtype)
    file.check_vocabulary(loaded.vocab_size)
    if is_adapter(check_model_folder(updated)) and not is_checkpoint(updated):
        loaded = with_adapter(loaded, updated)
        direction = adapter_direction(loaded.model)
        switched: AbstractContextManager[None] = adapter_off(loaded.model)
    else:
        other = load_model(updated, device="cpu", dtype=dtype)
        direction = state_difference(loaded.model, other.model.state_dict())
        switched = nullcontext()
        del other
    report = None if progress is None else lambda done, total: progress("sweep", done, total)
    with switched:
        return sweep(loaded.model, file.rollouts, direction, etas, config, tokenizer=loaded.tokenizer, progress=report)


def calibrate_checkpoint(
    model: str | Path,
    file: RolloutFile,
    config: Config | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: DType = "auto",
    progress: StageProgress | None = None,
) -> list[PrecisionNoise]:
    """Measure the rounding noise of a model folder on a rollouts file, in float32 and as loaded.

    Args and Raises: as `score_checkpoint`.
    """
    config = at_sampled_temperature(config or Config(), file)
    loaded = load_model(model, device=device, dtype=dtype)
    file.check_vocabulary(loaded.vocab_size)
    report = None if progress is None else lambda done, total: progress("calibrate", done, total)
    return calibrate(loaded.model, file.rollouts, config, tokenizer=loaded.tokenizer, progress=report)


def at_sampled_temperature(config: Config, file: RolloutFile) -> Config:
    """The configuration with the temperature that the file says it was sampled at.

    Raises:
        InputError: the configuration names another one.
    """
    named, sampled = config.generation.temperature, file.temperature
    if sampled is None or named == sampled:
        return config
    if named != 1.0:
        raise InputError(
            f"generation.temperature is {named}, but {file.source} was sampled at {sampled}; rollouts are scored at "
            "the temperature that drew them, so leave the setting out"
        )
    return replace(config, generation=replace(config.generation, temperature=sampled))


def _scoring(loaded: LoadedModel, config: Config) -> Scoring:
    return Scoring.from_config(config, loaded.model, loaded.tokenizer)


def _score(
    loaded: LoadedModel,
    file: RolloutFile,
    scoring: Scoring,
    stage: str,
    progress: StageProgress | None,
    resume: str | Path | None,
) -> Scores:
    file.check_vocabulary(loaded.vocab_size)
    report = None if progress is None else lambda done, total: progress(stage, done, total)
    if resume is None:
        return score(loaded.model, file.rollouts, scoring, progress=report)
    return score_resumable(loaded.model, file.rollouts, scoring, directory=Path(resume) / stage, progress=report)
