"""The configuration: the proposal's sections and keys, with their old defaults, checked.

Frozen dataclasses, one a section. A key that is not known, a value of the wrong type or out of range raises an
InputError that names the key, the value and the nearest valid spelling.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from entropy_fast.errors import InputError
from entropy_fast.rollouts import Counting


@dataclass(frozen=True)
class EntropyConfig:
    """What the entropy is counted in, and over which tokens.

    Attributes:
        unit: `sequence` (nats per sequence) or `per_token` (nats per counted token).
        include_eos: count the EOS as any other token. False changes the definition relative to a language model's
            usual perplexity.
        stop_at_eos: drop what follows the first EOS instead of trusting the attention mask.
        eos_token_ids: the ids that end a sequence; null joins the generation config's and the tokenizer's.
        length_normalize_deltah1: use S / max(L, 1) in place of S in the probe losses.
        integrand: `sampled` averages −log p of the sampled tokens, `rao_blackwell` the full-distribution entropies.
        estimator: `ratio` weighs whole sequences, `prefix` each token by the ratio of what precedes it
            (needs the rao_blackwell integrand).
        control_variate: centre the integrand on the leave-one-out mean of the prompt's other sequences.
    """

    unit: Literal["sequence", "per_token"] = "sequence"
    include_eos: bool = True
    stop_at_eos: bool = False
    eos_token_ids: tuple[int, ...] | None = None
    length_normalize_deltah1: bool = False
    integrand: Literal["sampled", "rao_blackwell"] = "sampled"
    estimator: Literal["ratio", "prefix"] = "ratio"
    control_variate: bool = False

    def __post_init__(self) -> None:
        if self.estimator == "prefix" and self.integrand != "rao_blackwell":
            raise InputError(
                "entropy.estimator: prefix weighs the entropy at each position, so it needs "
                f"entropy.integrand: rao_blackwell, got {self.integrand!r}"
            )

    def counting(self, eos_token_ids: Iterable[int]) -> Counting:
        """The counting rules, with `eos_token_ids` where the configuration names none."""
        ids = self.eos_token_ids if self.eos_token_ids is not None else tuple(eos_token_ids)
        return Counting(ids, include_eos=self.include_eos, stop_at_eos=self.stop_at_eos)


@dataclass(frozen=True)
class ImportanceSamplingConfig:
    """How the updated policy's average is taken over rollouts of the original one, and what the update is.

    Attributes:
        use_snis: self-normalise the weights; False is plain importance sampling, mean(w A) with unshifted weights.
        use_psis: smooth the largest weights by a generalised Pareto fit.
        is_mode: `snis`, or `clip`: cut the weights at `clip_c`.
        clip_c: where `clip` cuts.
        ess_threshold: the effective sample size under which a result is flagged, as a share of n (up to 1) or a
            number of sequences (above 1).
        resample_on_low_ess: recommend fresh rollouts in the result when the flag is raised.
        training_loss: the update's loss: `nll`, the mean cross entropy over generated tokens, or `rl`,
            −mean_b Σ_{g,t} A log p / (G L_max_b).
        max_grad_norm: clip the update's gradient to this 2-norm; null for no clipping.
        report_per_token: report per-token numbers beside the configured unit.
        snapshot_device: where the copy of the weights waits: `cpu`, `cuda` or `same`.
        noise_floor: score the original policy again in another layout, to know the rounding noise of the result:
            `subsample` does so for about 64 sequences, `full` for all, `none` not at all.
        master_weights: apply the update to float32 copies of the trainable weights and score both policies in
            float32, to study the step itself rather than its rounding to the model's dtype.
    """

    use_snis: bool = True
    use_psis: bool = False
    is_mode: Literal["snis", "clip"] = "snis"
    clip_c: float = 10.0
    ess_threshold: float = 0.5
    resample_on_low_ess: bool = False
    training_loss: Literal["nll", "rl"] = "nll"
    max_grad_norm: float | None = None
    report_per_token: bool = False
    snapshot_device: str = "same"
    noise_floor: Literal["none", "subsample", "full"] = "subsample"
    master_weights: bool = False

    def __post_init__(self) -> None:
        _require(
            _is_device(self.snapshot_device),
            "importance_sampling.snapshot_device",
            "same, cpu or cuda",
            self.snapshot_device,
        )
        _require(self.clip_c > 0, "importance_sampling.clip_c", "above 0", self.clip_c)
        limit = self.max_grad_norm
        _require(limit is None or limit > 0, "importance_sampling.max_grad_norm", "above 0 or null", limit)
        _require(self.ess_threshold > 0, "importance_sampling.ess_threshold", "above 0", self.ess_threshold)

    @property
    def method(self) -> Literal["snis", "is", "clip", "psis"]:
        """The weighting that the switches add up to."""
        if self.is_mode == "clip":
            return "clip"
        if self.use_psis:
            return "psis"
        return "snis" if self.use_snis else "is"


@dataclass(frozen=True)
class MemoryConfig:
    """How much is computed at once, and in which precision.

    Attributes:
        amp: run the model under autocast.
        dtype: the autocast dtype.
        importance_microbatch_size: sequences scored at once; null lets the token budget decide.
        microbatch_size: sequences in one backward pass of the update; null lets the token budget decide.
        teacher_force_microbatch_size: sequences in one differentiable pass; null lets the token budget decide.
        token_budget: padded tokens in one microbatch; null chooses from the free memory.
        precision: the transformer's precision: `as_loaded`, `float32` (low-precision weights are raised layer by
            layer), or `tf32` (as loaded, with TF32 matrix products allowed). The head's logits are always float32.
        packing: lay sequences out in one row without padding, each prompt once for all its completions: `auto` where
            a trial on the model shows that it changes nothing, true always (an error says why a model cannot), false
            never.
        fusion: run norms, gated activations and rotary positions as one kernel each on a GPU; likewise.
    """

    amp: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    importance_microbatch_size: int | None = None
    microbatch_size: int | None = None
    teacher_force_microbatch_size: int | None = None
    token_budget: int | None = None
    precision: Literal["as_loaded", "float32", "tf32"] = "as_loaded"
    packing: Literal["auto", True, False] = "auto"
    fusion: Literal["auto", True, False] = "auto"

    def __post_init__(self) -> None:
        for name in ("importance_microbatch_size", "microbatch_size", "teacher_force_microbatch_size", "token_budget"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"memory_config.{name}", "at least 1 or null", value)


@dataclass(frozen=True)
class GenerationConfig:
    """How the rollouts were drawn. Scoring happens at the temperature that was sampled.

    Attributes:
        temperature: divides the logits, in scoring and in the update alike.
        top_p: nucleus mass; below 1 the rollouts have lost support, which cannot be repaired and is reported.
        top_k: 0 for the whole vocabulary; anything else loses support likewise.
        max_new_tokens: the limit of generation, in tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        _require(
            self.temperature > 0 and math.isfinite(self.temperature),
            "generation.temperature",
            "above 0",
            self.temperature,
        )
        _require(0 < self.top_p <= 1, "generation.top_p", "in (0, 1]", self.top_p)
        _require(self.top_k >= 0, "generation.top_k", "0 (the whole vocabulary) or above", self.top_k)

    @property
    def lost_support(self) -> bool:
        """Whether the sampler could not draw every token."""
        return self.top_p < 1 or self.top_k > 0


@dataclass(frozen=True)
class BatchConfig:
    """The rectangle of a sampled batch.

    Attributes:
        B: prompts.
        G: completions a prompt.
    """

    B: int = 32
    G: int = 8

    def __post_init__(self) -> None:
        _require(self.B >= 1, "batch_config.B", "at least 1", self.B)
        _require(self.G >= 1, "batch_config.G", "at least 1", self.G)


@dataclass(frozen=True)
class Config:
    """Every section. `learning_rate` is used when the update is asked for without an optimizer (AdamW is made)."""

    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    importance_sampling: ImportanceSamplingConfig = field(default_factory=ImportanceSamplingConfig)
    memory_config: MemoryConfig = field(default_factory=MemoryConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    batch_config: BatchConfig = field(default_factory=BatchConfig)
    learning_rate: float = 1e-6

    # sections that a host program's own configuration shares: keys that are not ours are theirs
    _SHARED: typing.ClassVar[frozenset[str]] = frozenset({"memory_config", "generation", "batch_config"})

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "learning_rate", "above 0", self.learning_rate)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any] | None, *, strict: bool = True) -> Config:
        """Read a nested mapping.

        Args:
            mapping: sections and keys; None and absent parts take the defaults.
            strict: True refuses every unknown key. False is for a host program's whole configuration: sections that
                are not ours are passed over, and so are foreign keys in the sections shared with it, unless a
                name is nearly one of ours and so probably misspelt.

        Raises:
            InputError: see the module's description.
        """
        if mapping is None:
            return cls()
        if not isinstance(mapping, Mapping):
            raise InputError(f"the configuration must be a mapping of sections, got {type(mapping).__name__}")
        values: dict[str, Any] = {}
        known = {f.name: f for f in fields(cls)}
        for key, value in mapping.items():
            if key not in known:
                _unknown(str(key), known, "", refuse=strict)
            elif key == "learning_rate":
                values[key] = _coerce(float, value, key)
            else:
                section = typing.cast(Any, known[key].default_factory)
                values[key] = _section(section, value, key, strict=strict or key not in cls._SHARED)
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path, *, strict: bool = True) -> Config:
        """Read a YAML file. Raises InputError for what is not YAML or not a configuration, OSError without a file."""
        text = Path(path).read_text(encoding="utf-8")
        try:
            mapping = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        return cls.from_dict(mapping, strict=strict)

    def override(self, assignments: Iterable[str]) -> Config:
        """A copy with `section.key=value` assignments applied, values read as YAML."""
        mapping = self.to_dict()
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            *sections, key = path.strip().split(".")
            if not equals or len(sections) > 1:
                raise InputError(f"--set takes section.key=value (entropy.unit=per_token, say), got {assignment!r}")
            target = mapping
            for name in sections:
                target = target.setdefault(name, {})
                if not isinstance(target, dict):
                    raise InputError(f"{name} is not a section; it is set as {name}=value, got {assignment!r}")
            target[key] = yaml.safe_load(text)
        return type(self).from_dict(mapping)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as YAML or JSON can hold them."""
        result = asdict(self)
        ids = result["entropy"]["eos_token_ids"]
        result["entropy"]["eos_token_ids"] = None if ids is None else list(ids)
        return result


def _section(cls: type, mapping: Any, name: str, *, strict: bool) -> Any:
    if mapping is None:
        return cls()
    if not isinstance(mapping, Mapping):
        raise InputError(f"{name} must be a section of key: value pairs, got {mapping!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.default is not MISSING}
    values = {}
    for key, value in mapping.items():
        if key in known:
            values[key] = _coerce(hints[key], value, f"{name}.{key}")
        else:
            _unknown(str(key), known, f"{name}.", refuse=strict)
    return cls(**values)


def _unknown(key: str, known: Iterable[str], prefix: str, *, refuse: bool) -> None:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6 if refuse else 0.85)
    if not refuse and not near:
        return
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(sorted(known))}"
    raise InputError(f"unknown configuration key {prefix}{key}; {hint}")


def _coerce(hint: Any, value: Any, name: str) -> Any:
    """`value` as the annotated type; only lossless conversions are made (an int where a float is wanted, say)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (a for a in arguments if a is not type(None))
        return _coerce(hint, value, name)
    if origin is Literal:
        # True == 1, but it is not meant where 1 is written
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        choices = [str(a).lower() if isinstance(a, bool) else str(a) for a in arguments]
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint_text = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}{hint_text}")
    if origin is tuple:
        items = [value] if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(items, (list, tuple)):
            raise InputError(f"{name} must be an integer or a list of integers, got {value!r}")
        return tuple(_coerce(int, item, name) for item in items)
    if isinstance(value, bool) == (hint is bool):
        if isinstance(value, hint):
            return value
        if hint is float:
            try:  # YAML reads 1e-6 as a string
                return float(value)
            except (TypeError, ValueError):
                pass
        if hint is int and isinstance(value, float) and value.is_integer():
            return int(value)
    kinds = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    raise InputError(f"{name} must be {kinds[hint]}, got {value!r}")


def _is_device(name: str) -> bool:
    if name == "same":
        return True
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


def _require(holds: bool, name: str, requirement: str, value: Any) -> None:
    if not holds:
        raise InputError(f"{name} must be {requirement}, got {value!r}")
