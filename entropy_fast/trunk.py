"""The pass through a model up to its head, and which layouts and which fused layers it can be trusted with.

What a layout may do to a model is not read off its class but tried, the first time that it is seen and whenever
sequences get longer: a few of the very sequences that are to be scored go through alone, right-padded and packed, in
float32, and have to come out the same. That covers what no list of classes can: recurrent layers that would run on
from one sequence into the next, positions counted in an unusual way, masks of a model's own, attention that isn't
causal. In the precision of the scoring itself, the packed pass must come as near to float32 as the padded one does.
The same trial decides whether layers may run fused (see `fusion`).
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from entropy_fast.errors import EntropyFastWarning, InputError
from entropy_fast.functional.linear_operators import has_triton
from entropy_fast.fusion import Fusion, is_compiled
from entropy_fast.heads import Head, accepts, forward_kwargs, input_embedding, unwrap
from entropy_fast.layout import DenseRollouts
from entropy_fast.microbatch import Microbatch, Segments, packed, padded
from entropy_fast.packing import (
    attention_configs,
    attention_windows,
    dropped_softcap,
    packed_attention,
    packing_obstacle,
)
from entropy_fast.precision import evaluation_mode, model_precision

Scope = Callable[[], contextlib.AbstractContextManager[None]]

# Relative difference of a hidden state between two layouts in float32. Rounding gives 1e-6 to 1e-5, tens of layers
# deep; looking at one wrong token gives 1e-3 and more.
_TOLERANCE = 1e-4
# Squared distance from float32 in low precision, over the plain padded pass's: how much worse is allowed.
_NOISE_RATIO = 4.0
# Sequences are not cut below this for a trial.
_SHORTEST = 64
# Another way may differ by this, or by so many times what padding differs by, which is rounding, where that is more.
_STRICT_TOLERANCE = 1e-5
_ROUNDING_RATIO = 4.0
# Trials before a mixture of experts is denied a layout. A fault of the layout shows in every one; two experts that are
# nearly tied for a token can change places by rounding alone, which other tokens will hardly repeat.
_TRIALS = 3
# Tokens of the piece that decides whether a model looks ahead, so few that no such tie is likely.
_PIECE = 16

# By what value a configuration makes its model causal.
_CAUSAL_SWITCHES = {"causal": True, "attn_type": "uni", "use_bidirectional_attention": False, "is_decoder": True}


@dataclass(frozen=True)
class Fitness:
    """What a model can be trusted with.

    Attributes:
        fused: why its layers do not run fused; empty when they can.
        packed: why it cannot be packed; empty when it can.
        padded: why sequences cannot share right-padded rows; empty when they can.
        causal: whether a token's hidden state depends on no later token.
    """

    fused: str = ""
    packed: str = ""
    padded: str = ""
    causal: bool = True

    def __or__(self, other: Fitness) -> Fitness:
        """What either of two trials allows."""
        return Fitness(
            self.fused and other.fused,
            self.packed and other.packed,
            self.padded and other.padded,
            self.causal or other.causal,
        )

    @classmethod
    def neither(cls, why: str, *, causal: bool = True) -> Fitness:
        """For a model whose sequences go through alone, as its own code has it."""
        return cls(why, why, why, causal)


class Trunk:
    """A model and its head, ready to give what the head is to be applied to.

    Args:
        model: a causal language model.
        head: see `find_head`.
        single: its passes compute in float32. Fused, padded rows then have the packed rows' attention and linear layers
            a kernel, so that all layouts are rounded alike.
    """

    def __init__(self, model: nn.Module, head: Head, *, single: bool = False) -> None:
        self.model = model
        self.head = head
        self._base = unwrap(model)
        self._kwargs = forward_kwargs(self._base)
        self._takes_positions = accepts(self._base, "position_ids")
        self._configs = attention_configs(self._base)
        self._single = single
        self._own_attention = not single or bool(packing_obstacle(self._base))

    @functools.cached_property
    def _fusion(self) -> Fusion:
        return Fusion(self._base, single=self._single)

    def layers(self, *, fused: bool) -> contextlib.AbstractContextManager[None]:
        """While entered, layers that have a kernel run by it, if `fused`; not in passes with gradients."""
        return self._fusion.active() if fused else contextlib.nullcontext()

    def __call__(self, batch: Microbatch, *, fused: bool = False) -> Tensor:
        """(R, width): the head's inputs at the active positions; in mode `logits`, the logits there.

        `fused`: see `layers`.
        """
        kwargs = dict(self._kwargs)
        if batch.segments is not None:
            kwargs["position_ids"] = batch.position_ids
        segments = batch.segments
        if segments is None and fused and not self._own_attention:
            segments = Segments.of_rows(*batch.input_ids.shape)
        attention = contextlib.nullcontext() if segments is None else packed_attention(self._configs, segments)
        with self.layers(fused=fused), attention:
            if self.head.mode == "logits":
                output = self.model(input_ids=batch.input_ids, **kwargs).logits
            else:
                with self.head.capture() as captured:
                    self.model(input_ids=batch.input_ids, **kwargs)
                output = captured[0]
        return output.flatten(0, 1).index_select(0, batch.active.to(output.device))

    def fitness(
        self, dense: DenseRollouts, device: torch.device, scope: Scope, setting: object, token_budget: int
    ) -> Fitness:
        """Try the layouts and the fused layers on some of the sequences, unless that is known already.

        The model ran before, for its head. Where SDPA let it do so without its softcap, one warning says so.

        Args:
            dense: what is to be scored.
            device: where the model's inputs go.
            scope: enters the precision of the scoring.
            setting: names that precision; what was found out under one is not taken for another.
            token_budget: sequences are cut so that two of them fit, or not below what a window of attention covers.

        Raises:
            InputError: a token's score depends on the tokens after it, so the model is not causal.
        """
        longest = int(dense.input_lengths.max())
        limit = max(_SHORTEST, token_budget // 2)
        # a model may have its window in a mask of its own, of which nothing shows in sequences that it covers
        limit = max([limit, *(window + _SHORTEST for window in attention_windows(self._configs) if window < longest)])
        longest = min(longest, limit)
        known = _KNOWN.setdefault(self._base, {})
        attention = getattr(getattr(self._base, "config", None), "_attn_implementation", None)
        dtype = input_embedding(self._base).dtype
        key = (self.head.mode, attention, setting, self._single, dtype, device.type)
        if key in known and known[key][0] >= longest:
            return known[key][1]
        softcap = dropped_softcap(self._configs)
        if softcap is not None and self._base not in _WARNED:
            _WARNED.add(self._base)
            warnings.warn(
                f"{type(self._base).__name__}: SDPA leaves out the softcap of its attention (attn_logit_softcapping="
                f"{softcap}): its log-probs are not those of the model as it was trained; load it with "
                "attn_implementation='eager'",
                EntropyFastWarning,
                stacklevel=5,
            )
        obstacles = Fitness(fused=self._fusion_obstacle(device), packed=self._packing_obstacle())
        fitness: Fitness | None = None
        with torch.no_grad(), evaluation_mode(self._base):
            for trial in range(_TRIALS if _has_experts(self._base) else 1):
                try:
                    found = self._try(_sample(dense, limit, trial), device, scope, obstacles)
                except torch.OutOfMemoryError:
                    why = "there was no memory to verify it"
                    return Fitness(why, why)
                if found is None:
                    why = "its hidden states are not finite"
                    return Fitness(why, why)
                fitness = found if fitness is None else fitness | found
                if fitness == obstacles:  # nothing but what cannot change
                    break
        assert fitness is not None
        if not fitness.causal:
            raise InputError(
                f"{type(self._base).__name__} is not causal: what it says of a token depends on later tokens, so it "
                f"gives no probability of a sequence; {_remedy(self._base)}"
            )
        known[key] = (longest, fitness)
        return fitness

    def _fusion_obstacle(self, device: torch.device) -> str:
        if device.type != "cuda" or not has_triton(device):
            return "its layers have kernels for GPUs with Triton alone"
        if is_compiled(self._base):
            return "it is compiled, and would be compiled again"
        if isinstance(self.model, nn.DataParallel):
            return "its replicas on other devices would run on this one's weights"
        return "" if self._fusion.kinds else "none of its layers is spelled as those that have a kernel"

    def _packing_obstacle(self) -> str:
        obstacle = packing_obstacle(self._base)
        if self.head.mode == "logits":
            obstacle = obstacle or "its own logits are needed"
        if not self._takes_positions:
            obstacle = obstacle or "its forward takes no position_ids"
        return obstacle

    def _try(self, sample: DenseRollouts, device: torch.device, scope: Scope, obstacles: Fitness) -> Fitness | None:
        everything = range(len(sample.tokens))

        def wide(batch: Microbatch, *, fused: bool = False) -> Tensor:
            with model_precision(self._base, "float32"):
                return self(batch, fused=fused).float()

        def alone(i: int, dense: DenseRollouts = sample) -> Tensor:
            return wide(padded(dense, [i], device, device))

        together = padded(sample, everything, device, device)
        row = packed(sample, everything, device, device)
        reference = wide(together)
        if not reference.isfinite().all():
            return None
        singles = [alone(i) for i in everything]
        # sequence 1 is sequence 0 cut short: what was cut off must be nothing to it
        if _distance(singles[1], singles[0][: len(singles[1])]) > _TOLERANCE:
            why = "its hidden states depend on the length of a sequence"
            piece = sample.shortened([0], [min(int(sample.input_lengths[0]), _PIECE)])
            states, other = (alone(0, x)[:-1] for x in (piece, _with_another_end(piece)))
            return Fitness.neither(why, causal=_distance(states, other) <= _TOLERANCE)
        truth = torch.cat(singles)
        rounding = _distance(reference, truth)
        if rounding > _TOLERANCE:
            why = "its hidden states depend on padding"
            return Fitness.neither(why)
        tolerance = min(_TOLERANCE, max(_STRICT_TOLERANCE, _ROUNDING_RATIO * rounding))

        def obstacle(batch: Microbatch, fused: bool, when: str) -> str:
            # a packed row scores the same positions in another order
            order = _order_of(together, batch)
            try:
                if not _distance(wide(batch, fused=fused)[order], truth) <= tolerance:
                    return f"its hidden states came out differently when {when}"
                with scope():
                    noise, own = (
                        _mean_square(x.float(), truth) for x in (self(together), self(batch, fused=fused)[order])
                    )
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a model may fail in any way on a row that it wasn't written for
                return f"it failed when {when} ({type(error).__name__}: {error})"
            if not own <= _NOISE_RATIO * noise + _TOLERANCE**2:
                return f"its rounding noise grew from {noise**0.5:.1e} to {own**0.5:.1e} when {when}"
            return ""

        fused = obstacles.fused or obstacle(together, True, "fused")
        return Fitness(fused, obstacles.packed or obstacle(row, not fused, "packed"))


_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[object, tuple[int, Fitness]]] = weakref.WeakKeyDictionary()
# Models whose missing softcap the user knows of.
_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _has_experts(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return config is not None and any("expert" in key for key in vars(config.get_text_config()))


def _remedy(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    for part in (config, config.get_text_config() if config is not None else None):
        for switch, causal in _CAUSAL_SWITCHES.items():
            if getattr(part, switch, causal) not in (causal, None):
                where = "" if part is config else "text_config."
                return f"if it was trained as a causal language model, load it with {where}{switch}={causal!r}"
    return "its configuration has no switch for that; pass a causal language model"


def _sample(dense: DenseRollouts, limit: int, trial: int) -> DenseRollouts:
    """The longest sequence, the same cut short (a second completion of its prompt), and one of another prompt.

    Later trials have sequences of the same lengths with their tokens in another order.
    """
    first = int(dense.input_lengths.argmax())
    families = dense.families(range(len(dense.tokens)))
    others = [family[0] for family in families if first not in family]
    chosen = [first, first, *others[:1]]
    lengths = [min(int(dense.input_lengths[i]), limit) for i in chosen]
    prompt = min(int(dense.prompt_lengths[first]), lengths[0])
    lengths[1] = prompt + (lengths[0] - prompt) // 2
    turned = replace(dense, tokens=dense.tokens.clone())
    for i in chosen[1:]:
        inputs = slice(int(dense.input_lengths[i]))
        turned.tokens[i, inputs] = dense.tokens[i, inputs].roll(trial)
    cut = turned.shortened(chosen, lengths)
    # every position is compared, the prompt's too
    everything = torch.arange(cut.tokens.shape[1]) <= cut.input_lengths[:, None]
    everything[:, 0] = False
    return DenseRollouts(cut.tokens, cut.columns, everything, cut.input_lengths, cut.prompt_lengths)


def _with_another_end(dense: DenseRollouts) -> DenseRollouts:
    """The same sequences, their last input token exchanged for the id beside it."""
    tokens = dense.tokens.clone()
    last = (torch.arange(len(tokens)), dense.input_lengths - 1)
    tokens[last] = torch.where(tokens[last] > 0, tokens[last] - 1, 1)
    return replace(dense, tokens=tokens)


def _order_of(together: Microbatch, row: Microbatch) -> Tensor:
    """Where the positions of `together` are among those of `row`, which scores the same ones."""
    width = int(max(together.columns.max(), row.columns.max())) + 1
    found = torch.argsort(row.rows * width + row.columns)
    wanted = torch.argsort(together.rows * width + together.columns)
    order = torch.empty_like(found)
    order[wanted] = found
    return order


def _distance(x: Tensor, y: Tensor) -> float:
    """The largest relative difference of a row; NaN where one is not finite."""
    return float(((x - y).norm(dim=1) / y.norm(dim=1).clamp_min(1e-12)).max())


def _mean_square(x: Tensor, y: Tensor) -> float:
    return float(((x - y).norm(dim=1) / y.norm(dim=1).clamp_min(1e-12)).square().mean())
