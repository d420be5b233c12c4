"""What a causal language model does after its last hidden state, found out and verified, never guessed.

The head module's *input* is captured in the head's place, so the model itself spends nothing on logits. What follows
the head (a scale, a softcap, fewer columns) is looked up in a registry by the model's class and then checked against
the model's own logits: a hook feeds the head synthetic hidden states, small and large, so that a softcap or a scale
that was missed cannot hide in rounding.

Three ways to the logits come out of that, the first that is right:

- `fused`: hidden states, weight and bias go to `linear_token_stats`; no logits tensor exists.
- `module`: the head module is quantised, sharded, or wrapped by an adapter: it is called on chunks of rows.
- `logits`: the model's own logits of a microbatch; for heads that do something else entirely.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from entropy_fast.errors import EntropyFastWarning, InputError
from entropy_fast.forwards import forwards_replaced
from entropy_fast.precision import evaluation_mode

Mode = Literal["fused", "module", "logits"]


@dataclass(frozen=True)
class HeadTransform:
    """logits = softcap · tanh(scale · head(hidden) / softcap), of the first `vocab_size` columns.

    Attributes:
        scale: multiplies the head's output (bias included).
        softcap: None for no softcap.
        vocab_size: columns that the model keeps, None for all.
    """

    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    def __call__(self, head_output: Tensor) -> Tensor:
        """Apply to (..., V) outputs of the head module, in their dtype."""
        z = head_output[..., : self.vocab_size]
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


TransformRule = Callable[[nn.Module], HeadTransform]

_RULES: dict[str, TransformRule] = {}


def register_head_transform(class_name: str, rule: TransformRule) -> None:
    """Say what a model class does to its head's output.

    Args:
        class_name: the class's name, `MyModelForCausalLM` say; subclasses inherit the rule.
        rule: from the model to its `HeadTransform`. It is verified against the model's own logits before it is used.
    """
    _RULES[class_name] = rule
    _VERIFIED.clear()


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config()  # type: ignore[operator, union-attr]


def _softcap(attribute: str) -> TransformRule:
    return lambda model: HeadTransform(softcap=getattr(_text_config(model), attribute, None))


def _multiply(attribute: str) -> TransformRule:
    return lambda model: HeadTransform(scale=float(getattr(_text_config(model), attribute) or 1.0))


def _divide(attribute: str) -> TransformRule:
    return lambda model: HeadTransform(scale=1.0 / float(getattr(_text_config(model), attribute)))


def _softcap_and_columns(model: nn.Module) -> HeadTransform:
    config = _text_config(model)
    return HeadTransform(softcap=config.final_logit_softcapping, vocab_size=config.unpadded_vocab_size)


def _multiply_then_softcap(model: nn.Module) -> HeadTransform:
    config = _text_config(model)
    return HeadTransform(scale=config.output_multiplier, softcap=config.final_logit_softcapping)


# Read off the modelling files of transformers 5.23. The attribute's name does not tell: `logits_scaling` divides in
# Granite, multiplies in HyperCLOVA X, and divides the hidden states in MiniCPM3, where nothing is left to do here.
_BUILT_IN: dict[TransformRule, tuple[str, ...]] = {
    _softcap("final_logit_softcapping"): (
        "BeamForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3nForCausalLM",
        "Gemma3nForConditionalGeneration",
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForCausalLM",
        "Gemma4UnifiedForConditionalGeneration",
        "MistralLarge4ForConditionalGeneration",
        "NanoChatForCausalLM",
        "PaliGemmaForConditionalGeneration",
        "VaultGemmaForCausalLM",
    ),
    _softcap("logits_soft_cap"): ("RecurrentGemmaForCausalLM",),
    _softcap("output_logit_soft_cap"): ("xLSTMForCausalLM",),
    _softcap("softcap"): ("JevForCausalLM",),
    _softcap_and_columns: ("Inkling2ForCausalLM", "Inkling2ForConditionalGeneration"),
    _multiply_then_softcap: ("MuseGlimmerForConditionalGeneration", "MuseSparkForConditionalGeneration"),
    _multiply("logit_scale"): (
        "CohereForCausalLM",
        "Cohere2ForCausalLM",
        "Cohere2MoeForCausalLM",
        "CohereCompassForCausalLM",
        "CohereCompassForConditionalGeneration",
    ),
    _multiply("logits_scaling"): ("HyperCLOVAXForCausalLM", "HyperCLOVAXVisionV2ForConditionalGeneration"),
    _multiply("lm_head_multiplier"): ("FalconH1ForCausalLM",),
    _divide("logits_scaling"): (
        "Granite4VisionForConditionalGeneration",
        "GraniteDoclingForConditionalGeneration",
        "GraniteForCausalLM",
        "GraniteMoeForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeSWAForCausalLM",
        "GraniteMoeSharedForCausalLM",
        "GraniteSWAForCausalLM",
    ),
}
_RULES.update({name: rule for rule, names in _BUILT_IN.items() for name in names})


@dataclass(frozen=True)
class Head:
    """How to get from a model's last hidden states to its logits.

    Attributes:
        mode: `fused`, `module` or `logits`; see the module's description.
        reason: why a faster mode was not taken; empty for `fused`.
        module: the head module, None in mode `logits`.
        transform: what follows the head module.
        vocab_size: the number of logits a token has.
        columns: the width of the head module's own output.
    """

    mode: Mode
    reason: str
    module: nn.Module | None
    transform: HeadTransform
    vocab_size: int
    columns: int

    @contextlib.contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """While entered, the model's forward appends the head's input (batch, T, D) and computes no logits.

        It is the input of the module's own forward, or in mode `module`, in which the module is called with it later,
        what it was called with. The head returns zeros for one position; the model's own output is of no use then.
        """
        assert self.module is not None
        captured: list[Tensor] = []
        called = self.mode == "module"

        def keep(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            if not called:
                captured.append(hidden)
            return hidden.new_zeros(len(hidden), 1, self.columns)

        def keep_call(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            captured.append(inputs[0])

        # before hooks that change the input: they will run again
        handle = self.module.register_forward_pre_hook(keep_call, prepend=True) if called else None
        try:
            with forwards_replaced([(self.module, keep)]):
                yield captured
        finally:
            if handle is not None:
                handle.remove()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a (Distributed)DataParallel wrapper, or the model itself."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, parallel) else model


def find_head(model: nn.Module) -> Head:
    """Find out how `model` turns hidden states into logits, and verify it against the model's own logits.

    The verification runs the model on four tokens, once for each model; a slower mode is taken with one warning that
    says why.

    Raises:
        InputError: the model has no logits at all (it isn't a language model), or reads its prompt with an encoder.
    """
    model = unwrap(model)
    if accepts(model, "decoder_input_ids"):
        raise InputError(
            f"{type(model).__name__} is an encoder-decoder, and rollouts hold prompt and completion in one sequence; "
            "pass a decoder-only language model (AutoModelForCausalLM)"
        )
    module = _head_module(model)
    transform = _transform_for(model)
    obstacle = "its class names no output embedding" if module is None else _obstacle_to_fusing(module)
    key = (type(module), obstacle, transform)
    known = _VERIFIED.get(model)
    if known is not None and known[0] == key and known[1].module is module:
        return known[1]
    head = _verify(model, module, transform, obstacle)
    if head.mode != "fused":
        warnings.warn(_explain(model, head), EntropyFastWarning, stacklevel=3)
    _VERIFIED[model] = (key, head)
    return head


_VERIFIED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Head]] = weakref.WeakKeyDictionary()


def _explain(model: nn.Module, head: Head) -> str:
    how = {
        "module": "its head module is called on chunks of rows instead of the fused kernel",
        "logits": "the model's own logits are used, a microbatch at a time",
    }[head.mode]
    return f"{type(model).__name__}: {how}, because {head.reason}"


def _head_module(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    module = getter() if callable(getter) else None
    if module is None:  # some classes have a head without naming it; the check below says whether it is the one
        for name in ("lm_head", "embed_out", "output"):
            module = getattr(model, name, None)
            if isinstance(module, nn.Linear):
                return module
        return None
    return module


def _transform_for(model: nn.Module) -> HeadTransform:
    getter = getattr(model, "get_base_model", None)  # adapters wrap the model; the rule belongs to what is inside
    base = getter() if callable(getter) else model
    for cls in type(base).__mro__:
        if cls.__name__ in _RULES:
            return _RULES[cls.__name__](base)
    return HeadTransform()


def _obstacle_to_fusing(module: nn.Module) -> str:
    """Why the weight cannot be read off the module as a plain matrix; empty when it can."""
    if type(module) is not nn.Linear:
        return f"the head is a {type(module).__name__}, not a plain nn.Linear"
    weight = module.weight
    if type(weight) not in (nn.Parameter, Tensor):
        return f"the head's weight is a {type(weight).__name__}"
    if weight.ndim != 2 or weight.numel() == 0 or weight.device.type == "meta":
        return f"the head's weight has shape {tuple(weight.shape)} on {weight.device}; it seems to be sharded"
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"the head's weight is stored as {weight.dtype}"
    if len(module._forward_hooks) or hasattr(module, "parametrizations"):
        return "something else is hooked into the head"
    return ""


@torch.no_grad()
def _verify(model: nn.Module, module: nn.Module | None, transform: HeadTransform, obstacle: str) -> Head:
    with evaluation_mode(model):
        probes = [] if module is None else _probe(model, module)
        own_logits = probes[0].logits if probes else _plain_logits(model)
    vocab_size = own_logits.shape[-1]
    if module is None:
        return Head("logits", obstacle, None, HeadTransform(), vocab_size, vocab_size)
    if not probes:
        reason = f"its {type(module).__name__} head does not run once on (batch, tokens, features) in a forward pass"
        return Head("logits", reason, None, HeadTransform(), vocab_size, vocab_size)
    if not all(probe.agrees(transform) for probe in probes):
        reason = (
            f"{transform} after the head does not reproduce the model's logits; if you know what does, "
            "say it with entropy_fast.heads.register_head_transform"
        )
        return Head("logits", reason, None, HeadTransform(), vocab_size, vocab_size)
    columns = probes[0].head_output.shape[-1]
    return Head("module" if obstacle else "fused", obstacle, module, transform, vocab_size, columns)


@dataclass(frozen=True)
class _Probe:
    """The model's logits for a known input of its head, and what the head module itself returned."""

    head_output: Tensor
    logits: Tensor

    def agrees(self, transform: HeadTransform) -> bool:
        expected = transform(self.head_output.double())
        if expected.shape != self.logits.shape:
            return False
        # the model rounds up to four times to its own dtype on the way, half a unit each; allow for six
        unit = torch.finfo(self.logits.dtype).eps
        if self.head_output.is_floating_point():
            unit = max(unit, torch.finfo(self.head_output.dtype).eps)
        bound = 3 * unit * expected.abs().amax().clamp_min(1e-3)
        return bool(((expected - self.logits.double()).abs() <= bound).all())


def _probe(model: nn.Module, module: nn.Module) -> list[_Probe]:
    """Run the model with synthetic head inputs whose logits have a standard deviation near 1 and near 50."""
    probes = []
    for spread in (1.0, 50.0):
        calls: list[Tensor] = []
        outputs: list[Tensor] = []
        generator = torch.Generator().manual_seed(int(spread))

        def replace_input(
            _: nn.Module,
            inputs: tuple[Tensor, ...],
            calls: list[Tensor] = calls,
            generator: torch.Generator = generator,
            spread: float = spread,
        ) -> tuple[Tensor, ...]:
            hidden = inputs[0]
            calls.append(hidden)
            noise = torch.randn(hidden.shape, generator=generator).to(hidden)
            return (noise * (spread / _output_spread(module, noise)), *inputs[1:])

        def keep_output(_: nn.Module, __: Any, output: Tensor, outputs: list[Tensor] = outputs) -> None:
            outputs.append(output.clone())  # some models change the logits in place

        handles = [module.register_forward_pre_hook(replace_input), module.register_forward_hook(keep_output)]
        try:
            logits = _plain_logits(model)
        finally:
            for handle in handles:
                handle.remove()
        if len(calls) != 1 or calls[0].ndim != 3 or calls[0].shape[:2] != logits.shape[:2]:
            return []
        probes.append(_Probe(outputs[0], logits))
    return probes


def _output_spread(module: nn.Module, noise: Tensor) -> float:
    # .forward rather than a call: the hooks that are being tried out must not fire again
    spread = float(module.forward(noise).double().std())
    return spread if spread > 0 else 1.0


def _plain_logits(model: nn.Module) -> Tensor:
    weight = input_embedding(model)
    ids = torch.arange(4, device=weight.device)[None, :] % len(weight)
    try:
        output = model(input_ids=ids, **forward_kwargs(model))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{type(model).__name__} does not run on token ids alone ({error}); rollouts are text, so pass a causal "
            "language model (AutoModelForCausalLM), or the text model inside"
        ) from error
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise InputError(
            f"{type(model).__name__} returns no logits of shape (batch, tokens, vocabulary); a causal language model "
            "(AutoModelForCausalLM) is needed"
        )
    return logits


def input_embedding(model: nn.Module) -> Tensor:
    """The (vocabulary, features) matrix that token ids are looked up in; its device is where the ids go."""
    embedding = unwrap(model).get_input_embeddings()  # type: ignore[operator]
    return embedding.weight if embedding is not None else next(model.parameters())


def forward_kwargs(model: nn.Module) -> dict[str, Any]:
    """Arguments that spare a scoring pass work, as far as the model's forward knows them."""
    return {"use_cache": False} if accepts(model, "use_cache") else {}


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has a parameter of this name."""
    getter = getattr(model, "get_base_model", None)
    base = getter() if callable(getter) else model
    return argument in inspect.signature(base.forward).parameters


def eos_token_ids(model: nn.Module, tokenizer: Any = None) -> tuple[int, ...]:
    """The set of ids that end a sequence: the generation config's, the config's and the tokenizer's, joined, sorted."""
    model = unwrap(model)
    sources = [getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer]
    found: set[int] = set()
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        if isinstance(ids, int):
            found.add(ids)
        elif ids is not None:
            found.update(int(i) for i in ids)
    return tuple(sorted(found))
