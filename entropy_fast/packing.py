"""One row for many sequences: attention without padding, in which a prompt stands once for all its completions.

transformers lets a model's attention be chosen by name. The one registered here reads which tokens may attend to
which from the microbatch (`Segments`) instead of from a mask: a completion's queries look at their prompt's keys,
taken from where the prompt stands in the row, and at their own, up to the diagonal. Everything else in a transformer
works token by token and never notices. Whether that is true of a model is not assumed but verified, see `trunk`.

On CUDA in half precision this is one call of PyTorch's variable-length flash attention for all segments, or of a kernel
here where that lacks something; elsewhere, one scaled dot product for each. Sliding windows, softcaps and attention
sinks are computed as the model asks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from entropy_fast.fusion import is_compiled, serves
from entropy_fast.microbatch import Segments

NAME = "entropy_fast_packed"


class _Row(NamedTuple):
    """The row at hand, and by the id of each of the model's configurations the attention that it names itself."""

    segments: Segments
    own: dict[int, str | None]


_ROW: ContextVar[_Row | None] = ContextVar("row", default=None)
# The widest head that the fused kernels take.
_MAX_WIDTH = 256


class PackingUnsupportedError(RuntimeError):
    """The model asks its attention for something that a packed row cannot give."""


@contextlib.contextmanager
def packed_attention(configs: Sequence[Any], segments: Segments) -> Iterator[None]:
    """While entered, the model of these `attention_configs` reads rows that, joined, are laid out as `segments` say."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    before = [config._attn_implementation_internal for config in configs]
    token = _ROW.set(_Row(segments, {id(c): name for c, name in zip(configs, before, strict=True)}))
    try:
        for config in configs:
            # the setter would also check that the name is one of transformers' own; mask making is skipped for others
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        _ROW.reset(token)


def packing_obstacle(model: nn.Module) -> str:
    """Why `model` cannot be packed, as far as its class and configuration tell; empty when they do not object."""
    if is_compiled(model):
        return "it is compiled, and would be compiled again for every layout"
    checks = [check for m in model.modules() if callable(check := getattr(m, "_can_set_attn_implementation", None))]
    if not checks or not all(check() for check in checks):
        return "its attention cannot be chosen by name"
    for config in attention_configs(model):
        if getattr(config, "is_encoder_decoder", False):
            return "it is an encoder-decoder"
        if getattr(config, "attention_chunk_size", None):
            return "it attends in chunks"
    return ""


def dropped_softcap(configs: Sequence[Any]) -> float | None:
    """The softcap that these `attention_configs` have, where SDPA computes the attention and leaves it out.

    Some releases of transformers do so without a word; others refuse, and never run such a model.
    """
    for config in configs:
        softcap = getattr(config, "attn_logit_softcapping", None)
        if softcap is not None and config._attn_implementation_internal == "sdpa":
            return float(softcap)
    return None


def attention_configs(model: nn.Module) -> list[Any]:
    """The configurations by which a model's layers choose their attention."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())


def attention_windows(configs: Sequence[Any]) -> list[int]:
    """The windows of attention that the configurations name, in tokens."""
    values = (value for config in configs for name, value in vars(config).items() if "window" in name)
    return [value for value in values if type(value) is int and value > 0]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *_: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it: (rows, heads, T, width) in, (rows, T, heads, width) out.

    Args:
        module: the attention module that calls.
        query, key, value: (rows, heads, T, width), with as many or fewer key heads; rows · T are the segments' tokens.
        attention_mask: None; a model that makes a mask of its own cannot be packed.
        scaling: multiplies the products, 1/√width by default.
        sliding_window: how many keys a query sees, its own included.
        softcap: bound of a tanh on the scaled products; left out where the model's own attention is SDPA, which
            has none (some releases of transformers leave it out there without a word, and what they compute is the
            policy that is being scored).
        s_aux: (heads,), the logit of an attention sink.
        is_causal: must not be False, here or in the module.
        position_bias: None; a bias by relative position cannot be packed.

    Raises:
        PackingUnsupportedError: the call cannot be served.
    """
    row = _ROW.get()
    segments = None if row is None else row.segments
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    rows, length, width = query.shape[0], query.shape[2], query.shape[3]
    if segments is None or rows * length != segments.tokens:
        raise PackingUnsupportedError("its attention is called on something else than the row of tokens")
    if not causal or key.shape[2] != length:
        raise PackingUnsupportedError("not all its attention is causal self-attention")
    if attention_mask is not None or position_bias is not None:
        raise PackingUnsupportedError("it adds a mask or a bias of its own to the attention")
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    scale = width**-0.5 if scaling is None else float(scaling)
    if row is not None and row.own.get(id(getattr(module, "config", None))) == "sdpa":
        softcap = None
    softcap = None if softcap is None else float(softcap)
    sliding_window = sliding_window or None
    plain = softcap is None and s_aux is None
    flash = plain and _flash_serves(q, v)
    if not flash:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if serves(q, k, v) and max(width, v.shape[-1]) <= _MAX_WIDTH:
            out = _by_kernel(q, k, v, segments, scale, sliding_window, softcap, s_aux)
            return out.unflatten(0, (rows, length)), None
    if segments.key_index is not None:
        index = segments.key_index.to(k.device)
        k, v = k.index_select(0, index), v.index_select(0, index)
    if flash:
        out = _by_flash(q, k, v, segments, scale, sliding_window)
    elif not plain:
        out = _by_products(q, k, v, segments, scale, sliding_window, softcap, s_aux)
    else:
        out = _by_segments(q, k, v, segments, scale, sliding_window)
    return out.unflatten(0, (rows, length)), None


def _flash_serves(q: Tensor, v: Tensor) -> bool:
    half = q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)
    return half and max(q.shape[-1], v.shape[-1]) <= _MAX_WIDTH


def _by_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink: Tensor | None,
) -> Tensor:
    """All segments in one call, the keys read where they stand; (T, heads, width) in and out."""
    from entropy_fast.kernels.attention import segment_attention, tile_queries

    index = None if segments.key_index is None else segments.key_index.to(q.device)
    tiles = segments.tiles_on(q.device, tile_queries(q))
    return segment_attention(q, k, v, index, segments.starts_on(q.device), tiles, scale, window, softcap, sink)


def _by_flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    """All segments in one call; (T, heads, width) in and out. Its diagonal ends at the last query and the last key."""
    width, out_width = q.shape[-1], v.shape[-1]
    # the kernel takes one width for all three, in steps of 8; zeros add nothing to a product
    common = -(-max(width, out_width) // 8) * 8
    q, k, v = (x if x.shape[-1] == common else pad(x, (0, common - x.shape[-1])) for x in (q, k, v))
    out = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        *segments.starts_on(q.device),
        max(segments.query_lengths),
        max(segments.key_lengths),
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]
    return out[..., :out_width]


def _by_segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    """A scaled dot product for each segment; (T, heads, width) in and out."""
    k, v = (_repeat_heads(x, q.shape[1]) for x in (k, v))
    parts = []
    for q_s, k_s, v_s in _split(q, k, v, segments):
        queries, keys = q_s.shape[1], k_s.shape[1]
        square = queries == keys and (window is None or window >= keys)
        mask = None if square else _visible(queries, keys, window, q.device)
        out = scaled_dot_product_attention(
            q_s[None], k_s[None], v_s[None], attn_mask=mask, is_causal=square, scale=scale
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _by_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink: Tensor | None,
) -> Tensor:
    """Softmax written out, in float32 or wider, for what the fused kernels lack; (T, heads, width) in and out."""
    k, v = (_repeat_heads(x, q.shape[1]) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    parts = []
    for q_s, k_s, v_s in _split(q, k, v, segments):
        z = (q_s @ k_s.transpose(1, 2)).to(wide) * scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z.masked_fill(~_visible(z.shape[1], z.shape[2], window, q.device), -math.inf)
        if sink is not None:
            z = torch.cat([z, sink.to(wide)[:, None, None].expand(-1, z.shape[1], 1)], dim=2)
        p = z.softmax(2)[..., : k_s.shape[1]].to(v.dtype)
        parts.append((p @ v_s).transpose(0, 1))
    return torch.cat(parts)


def _split(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each segment's (heads, tokens, width)."""
    queries = q.split(segments.query_lengths)
    pairs = (x.split(segments.key_lengths) for x in (k, v))
    for parts in zip(queries, *pairs, strict=True):
        q_s, k_s, v_s = (x.transpose(0, 1) for x in parts)
        yield q_s, k_s, v_s


def _visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool: the last key is the last query's own; a window counts a query's own key."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
