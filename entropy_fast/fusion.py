"""A model's layers as one kernel each, in passes without gradients; which tensors a kernel serves.

transformers spells norms, gated MLPs and rotary positions out in small operations. What a layer computes is read from
the code that it runs, not from its name: the forward's syntax tree is compared with the spellings below, which most
of the causal models share. A layer that is spelled otherwise, has a forward of its own on the instance (as quantisers
and offloaders do), or gets tensors that a kernel does not serve, runs as it always did. Whether the whole comes out
the same is verified on the model besides, see `trunk`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
import types
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from entropy_fast.forwards import Forward, forwards_replaced
from entropy_fast.functional.linear_operators import has_triton

if TYPE_CHECKING:
    from entropy_fast.kernels.layers import Activation, NormForm

_ROUNDED_NORM = """
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * hidden_states.to(input_dtype)
"""
_WIDE_NORM = """
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
return (self.weight * hidden_states).to(input_dtype)
"""
_SHIFTED_NORM = """
output = self._norm(x.float())
output = output * (1.0 + self.weight.float())
return output.type_as(x)
"""
_SHIFTED_NORMS_INNER = "return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)"
_GATED_MLP = """
down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
return down_proj
"""
_GATED_MLP_OF_ONE = """
up_states = self.gate_up_proj(hidden_states)
gate, up_states = up_states.chunk(2, dim=-1)
up_states = up_states * self.activation_fn(gate)
return self.down_proj(up_states)
"""
_ROTARY = """
cos = cos.unsqueeze(unsqueeze_dim)
sin = sin.unsqueeze(unsqueeze_dim)
q_embed = (q * cos) + (rotate_half(q) * sin)
k_embed = (k * cos) + (rotate_half(k) * sin)
return q_embed, k_embed
"""
_PARTLY_ROTARY = """
cos = cos.unsqueeze(unsqueeze_dim)
sin = sin.unsqueeze(unsqueeze_dim)
rotary_dim = cos.shape[-1]
q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
q_embed = (q_rot * cos) + (rotate_half(q_rot) * sin)
k_embed = (k_rot * cos) + (rotate_half(k_rot) * sin)
q_embed = torch.cat([q_embed, q_pass], dim=-1)
k_embed = torch.cat([k_embed, k_pass], dim=-1)
return q_embed, k_embed
"""
_ROTATE_HALF = """
x1 = x[..., : x.shape[-1] // 2]
x2 = x[..., x.shape[-1] // 2 :]
return torch.cat((-x2, x1), dim=-1)
"""
_ROTARY_NAME = "apply_rotary_pos_emb"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_ACTIVE: ContextVar[bool] = ContextVar("active", default=False)


class _Layer(NamedTuple):
    """A module, the forward that runs its kernel, and what kind of layer it is."""

    module: nn.Module
    forward: Forward
    kind: str


class Fusion:
    """The layers of a model that have a kernel; `with fusion.active():` runs them by it.

    Args:
        model: an unwrapped model; only looked at.
        single: the model computes in float32; linear layers have a kernel too then, whose bits do not depend on how
            many rows there are, as the library's do.
    """

    def __init__(self, model: nn.Module, *, single: bool = False) -> None:
        attentions: dict[Forward, Forward] = {}
        self._layers: list[_Layer] = []
        for module in model.modules():
            own = type(module).forward
            if "forward" in vars(module) or not isinstance(own, types.FunctionType):
                continue
            if (form := _norm_form(module, own)) is not None:
                self._layers.append(_Layer(module, _norm(module, own, form), "norm"))
            elif _spelt(own, _GATED_MLP) and (activation := _activation(module.act_fn)) is not None:
                self._layers.append(_Layer(module, _mlp(module, own, activation), "gated MLP"))
            elif _spelt(own, _GATED_MLP_OF_ONE) and (activation := _activation(module.activation_fn)) is not None:
                self._layers.append(_Layer(module, _mlp_of_one(module, own, activation), "gated MLP"))
            elif single and type(module) is nn.Linear and module.weight.dtype == torch.float32:
                self._layers.append(_Layer(module, functools.partial(float32_linear, module), "linear"))
            elif _rotates(own):
                if own not in attentions:
                    rotary = _rotary(own.__globals__[_ROTARY_NAME])
                    attentions[own] = _with_global(own, _ROTARY_NAME, rotary)
                self._layers.append(_Layer(module, types.MethodType(attentions[own], module), "rotation"))

    @property
    def kinds(self) -> Counter[str]:
        """How many layers of each kind have a kernel."""
        return Counter(layer.kind for layer in self._layers)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While entered, the layers run by their kernels wherever gradients are off."""
        token = _ACTIVE.set(True)
        try:
            with forwards_replaced((layer.module, layer.forward) for layer in self._layers):
                yield
        finally:
            _ACTIVE.reset(token)


def float32_linear(module: nn.Linear, x: Tensor) -> Tensor:
    """The layer in float32, whatever its weights are held in: by its kernel while a `Fusion` is active."""
    weight, bias = module.weight, module.bias
    if _ACTIVE.get() and _linear_serves(x, weight, bias):
        from entropy_fast.kernels.gemm import linear

        return linear(x, weight, bias)
    return nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())


def _linear_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    from entropy_fast.kernels.gemm import WIDTH_STEP

    return (
        x.dtype == torch.float32
        and weight.dtype in (torch.bfloat16, torch.float32)
        and not torch.is_autocast_enabled(x.device.type)
        and serves(x)
        and x.shape[-1:] == weight.shape[1:]
        and weight.shape[1] % WIDTH_STEP == 0
        and weight.numel() > 0
        and all(
            type(t) in (Tensor, nn.Parameter) and t.is_contiguous() and t.device == x.device
            for t in (weight, bias)
            if t is not None
        )
    )


def _norm_form(module: nn.Module, forward: Forward) -> NormForm | None:
    if not isinstance(getattr(module, "weight", None), nn.Parameter):
        return None
    if _spelt(forward, _ROUNDED_NORM):
        return "rounded"
    if _spelt(forward, _WIDE_NORM):
        return "wide"
    inner = getattr(type(module), "_norm", None)
    return "shifted" if inner and _spelt(forward, _SHIFTED_NORM) and _spelt(inner, _SHIFTED_NORMS_INNER) else None


def _norm(module: Any, own: Forward, form: NormForm) -> Forward:
    from entropy_fast.kernels.layers import MAX_NORM_WIDTH, rms_norm

    eps = float(module.eps if form == "shifted" else module.variance_epsilon)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            (x,), weight = args, module.weight
            if serves(x, weight) and weight.shape == x.shape[-1:] and 0 < len(weight) <= MAX_NORM_WIDTH:
                return rms_norm(x, weight, eps, form)
        return own(module, *args, **kwargs)

    return forward


def _mlp(module: Any, own: Forward, activation: Activation) -> Forward:
    from entropy_fast.kernels.layers import GATED_STEP, gated

    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or torch.is_grad_enabled():
            return own(module, *args, **kwargs)
        gate, up = module.gate_proj(args[0]), module.up_proj(args[0])
        if not serves(gate, up) or gate.shape != up.shape or gate.numel() % GATED_STEP:
            return module.down_proj(module.act_fn(gate) * up)
        return module.down_proj(gated(gate, up, activation, in_place=_output_is_ours(module.gate_proj)))

    return forward


def _mlp_of_one(module: Any, own: Forward, activation: Activation) -> Forward:
    """Gate and up from one product, side by side."""
    from entropy_fast.kernels.layers import GATED_STEP, gated

    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or torch.is_grad_enabled():
            return own(module, *args, **kwargs)
        both = module.gate_up_proj(args[0])
        gate, up = both.chunk(2, dim=-1)
        if not serves(both) or gate.shape != up.shape or gate.shape[-1] % GATED_STEP:
            return module.down_proj(up * module.activation_fn(gate))
        return module.down_proj(gated(gate, up, activation))

    return forward


def _output_is_ours(layer: nn.Module) -> bool:
    """Whether what the layer has just made is nobody else's: it is a plain one, and no hook has seen the output."""
    hooked = layer._forward_hooks or nn.modules.module._global_forward_hooks
    own = vars(layer).get("forward")
    plain = own is None or (isinstance(own, functools.partial) and own.func is float32_linear)
    return type(layer) is nn.Linear and plain and not hooked


def _rotary(own: Forward) -> Forward:
    from entropy_fast.kernels.layers import rotary

    partly = _spelt(own, _PARTLY_ROTARY)

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not args and not kwargs and _rotary_serves(q, k, cos, sin, partly):
            return rotary(q, k, cos, sin)
        return own(q, k, cos, sin, *args, **kwargs)

    return apply_rotary_pos_emb


def _rotary_serves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, partly: bool) -> bool:
    if q.ndim != 4 or k.ndim != 4 or cos.ndim != 3 or q.numel() == 0:
        return False
    batch, _, length, width = q.shape
    rotated = cos.shape[-1]
    same = (k.shape[0], *k.shape[2:]) == (batch, length, width) and cos.shape == sin.shape
    fits = same and cos.shape[0] in (1, batch) and cos.shape[1] == length
    fits = fits and rotated % 2 == 0 and (rotated == width or (partly and 0 < rotated < width))
    return fits and serves(q.transpose(1, 2), k.transpose(1, 2), cos, sin)


def serves(*tensors: Tensor) -> bool:
    """Whether a kernel takes these tensors, gradients being off."""
    dtype, device = tensors[0].dtype, tensors[0].device
    return (
        not torch.is_grad_enabled()
        and dtype in _DTYPES
        and all(
            type(t) in (Tensor, nn.Parameter) and (t.dtype, t.device) == (dtype, device) and t.is_contiguous()
            for t in tensors
        )
        and on_gpu(tensors[0])
        and tensors[0].numel() > 0
    )


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has the model or a part of it."""
    return any(
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def on_gpu(tensor: Tensor) -> bool:
    """Whether Triton's kernels can work on the tensor."""
    return tensor.is_cuda and has_triton(tensor.device)


def _activation(module: object) -> Activation | None:
    """What an activation computes; None for one without a kernel, or with hooks that would not run."""
    if not isinstance(module, nn.Module) or module._forward_hooks or module._forward_pre_hooks:
        return None
    if "forward" in vars(module):
        return None
    if type(module) is nn.SiLU and not module.inplace:
        return "silu"
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if not type(module).__module__.startswith("transformers."):
        return None
    name, function = type(module).__name__, getattr(module, "act", None)
    if name == "SiLUActivation":
        return "silu"
    if function is nn.functional.gelu:
        return "gelu"
    tanh = isinstance(function, functools.partial) and function.func is nn.functional.gelu and not function.args
    return "gelu_tanh" if tanh and function.keywords == {"approximate": "tanh"} else None  # type: ignore[union-attr]


def _rotates(forward: Forward) -> bool:
    """Whether a forward calls the usual rotation, of which a kernel can take the place."""
    rotation = forward.__globals__.get(_ROTARY_NAME) if _ROTARY_NAME in forward.__code__.co_names else None
    if not isinstance(rotation, types.FunctionType):
        return False
    if not _spelt(rotation, _ROTARY) and not _spelt(rotation, _PARTLY_ROTARY):
        return False
    parameters = inspect.signature(rotation).parameters
    usual = [*parameters][:4] == ["q", "k", "cos", "sin"] and parameters["unsqueeze_dim"].default == 1
    half = rotation.__globals__.get("rotate_half")
    return usual and isinstance(half, types.FunctionType) and _spelt(half, _ROTATE_HALF)


def _with_global(function: Any, name: str, value: object) -> Forward:
    """The function with one of its globals exchanged; nobody else's globals change."""
    names = {**function.__globals__, name: value}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _spelt(function: Forward, code: str) -> bool:
    """Whether a function's body is `code`, apart from comments, its docstring and spaces."""
    return _body(function) == _tree(code)


@functools.cache
def _body(function: Forward) -> str:
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        return ""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # no source to read
        return ""
    if not isinstance(definition, ast.FunctionDef):
        return ""
    body = definition.body if ast.get_docstring(definition) is None else definition.body[1:]
    return _dump(body)


@functools.cache
def _tree(code: str) -> str:
    return _dump(ast.parse(code).body)


def _dump(body: list[ast.stmt]) -> str:
    return ast.dump(ast.Module(body, []))
