"""Attention over segments as a kernel, against softmax written out in float64."""

import math
import re

import pytest
import torch
from without_gpu import DEVICES, DEVICES_AND_DTYPES, GPUS, compiled_for, compiles, run_interpreted, stack_bytes, starter

triton = pytest.importorskip("triton")

from entropy_fast.kernels import attention  # noqa: E402
from entropy_fast.microbatch import Segments  # noqa: E402


@starter
def test_in_the_interpreter():
    run_interpreted(__file__)


def shared_prompt(device, prompt=37, tails=(70, 1, 30)):
    """A prompt once, then its completions, which see it; one sequence by itself; and all of them as rows alone."""
    starts = [prompt + sum(tails[:i]) for i in range(len(tails))]
    keys = [list(range(prompt))]
    keys += [[*range(prompt), *range(s, s + n)] for s, n in zip(starts, tails, strict=True)]
    alone = list(range(prompt + sum(tails), prompt + sum(tails) + 33))
    index = torch.tensor([i for k in [*keys, alone] for i in k], device=device)
    lengths = tuple(len(k) for k in [*keys, alone])
    return Segments((prompt, *tails, 33), lengths, index)


def run(segments, q, k, v, **options):
    device = q.device
    tiles = segments.tiles_on(device, attention.tile_queries(q))
    return attention.segment_attention(q, k, v, segments.key_index, segments.starts_on(device), tiles, **options)


def exact(segments, q, k, v, scale, window=None, softcap=None, sink=None):
    """One segment, head and query after the other, in float64."""
    out, start, key_start = [], 0, 0
    for queries, keys in zip(segments.query_lengths, segments.key_lengths, strict=True):
        where = torch.arange(key_start, key_start + keys, device=q.device)
        where = where if segments.key_index is None else segments.key_index[where]
        group = q.shape[1] // k.shape[1]
        k_s, v_s = (x[where].double().repeat_interleave(group, 1) for x in (k, v))
        z = scale * torch.einsum("ihd,jhd->hij", q[start : start + queries].double(), k_s)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        seen = (distance >= 0) & (distance < (window or keys))
        z = z.masked_fill(~seen.to(z.device), -math.inf)
        if sink is not None:
            z = torch.cat([z, sink.double()[:, None, None].expand(-1, queries, 1)], 2)
        out.append(torch.einsum("hij,jhd->ihd", z.softmax(2)[..., :keys], v_s))
        start, key_start = start + queries, key_start + keys
    return torch.cat(out)


def inputs(segments, device, dtype, heads=4, key_heads=2, width=40, value_width=24):
    n = segments.tokens
    shapes = (heads, width), (key_heads, width), (key_heads, value_width)
    return [torch.randn(n, *shape, device=device).to(dtype) for shape in shapes]


@pytest.mark.parametrize(("device", "dtype"), DEVICES_AND_DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 1}, {"window": 20}, {"softcap": 2.0}, {"sink": True}, {"window": 64, "softcap": 1.0, "sink": True}],
    ids=str,
)
def test_it_is_softmax_over_a_segments_keys(device, dtype, options):
    segments = shared_prompt(device)
    q, k, v = inputs(segments, device, dtype)
    options = options | ({"sink": torch.randn(4, device=device).to(dtype)} if "sink" in options else {})
    result = run(segments, q, k, v, scale=0.3, **options)
    expected = exact(segments, q, k, v, 0.3, **options)
    # the weights are rounded to the values' dtype, the result once more; float32 sums a hundred products
    unit = {torch.float32: 40 * torch.finfo(torch.float32).eps}.get(dtype, 2 * torch.finfo(dtype).eps)
    assert result.dtype == dtype
    assert (result.double() - expected).abs().max() <= unit * v.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [16, 17, 64, 128, 256])
def test_any_width(device, width):
    segments = Segments.of_rows(2, 35)
    q, k, v = inputs(segments, device, torch.float32, 2, 1, width, width)
    expected = exact(segments, q, k, v, width**-0.5)
    torch.testing.assert_close(run(segments, q, k, v, scale=width**-0.5).double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 45])
def test_a_token_has_the_same_bits_in_every_layout(device, window):
    segments = shared_prompt(device)
    q, k, v = inputs(segments, device, torch.float32)
    together = run(segments, q, k, v, scale=0.4, window=window)
    start, key_start = 0, 0
    for queries, keys in zip(segments.query_lengths, segments.key_lengths, strict=True):
        where = segments.key_index[key_start : key_start + keys]
        lone = [x[where].contiguous() for x in (q, k, v)]
        alone = run(Segments.of_rows(1, keys), *lone, scale=0.4, window=window)
        ours, theirs = alone[keys - queries :], together[start : start + queries]
        # the interpreter's products are NumPy's, which adds up in an order of its own
        assert torch.equal(ours, theirs) if device == "cuda" else torch.allclose(ours, theirs, rtol=0, atol=4e-6)
        start, key_start = start + queries, key_start + keys


@compiles
@pytest.mark.parametrize("gpu", GPUS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "width"), [("*fp32", 64), ("*fp32", 128), ("*fp32", 256), ("*bf16", 128), ("*bf16", 256)]
)
def test_it_compiles_without_spills(gpu, dtype, width, tmp_path):
    kernel = attention.attention_kernel
    variant = attention._variant(4 if dtype == "*fp32" else 2, width, width, softcap=True, windowed=True)
    types = {"index_ptr": "*i64", "scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(("query_starts_ptr", "key_starts_ptr", "tile_segment_ptr", "tile_query_ptr"), "*i32")
    types |= dict.fromkeys(("heads", "key_heads", "window"), "i32")
    compiled = compiled_for(gpu, kernel, variant, types, dtype)
    if gpu[0] == "hip":
        assert compiled.asm["hsaco"]
        return
    if gpu[1] == 90:
        assert stack_bytes(compiled, tmp_path) == 0
    # what any card since sm_80 has
    assert compiled.metadata.shared <= 101376
    # tensor cores would round what they multiply
    tensor_cores = re.search(r"(wgmma|mma\.sync|tcgen05)", compiled.asm["ptx"]) is not None
    assert tensor_cores == (dtype == "*bf16")
