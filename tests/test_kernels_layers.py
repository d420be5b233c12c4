"""Norms, gated activations and rotary positions as kernels, against the code they stand for.

Triton reads TRITON_INTERPRET when it is imported, so the interpreted half of this file runs in a process of its own,
started by `test_in_the_interpreter`.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from without_gpu import DEVICES, DEVICES_AND_DTYPES, GPUS, compiled_for, compiles, run_interpreted, stack_bytes, starter

triton = pytest.importorskip("triton")

from entropy_fast.kernels import layers  # noqa: E402


@starter
def test_in_the_interpreter():
    run_interpreted(__file__)


def norm(x, weight, eps, form):
    """The three spellings, in the layer's own dtype or in float64."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if form == "rounded":
        return weight * y.to(x.dtype)
    if form == "wide":
        return (weight * y).to(x.dtype)
    return (y * (1.0 + weight.to(wide.dtype))).to(x.dtype)


def assert_rounded_alike(result, own, exact, size, tipped=0.01):
    """As near to the exact value as the layer's own code: in 16 bits the same but where float32's last digit decides.

    `size` is what errors are relative to, `tipped` the share of entries that may be rounded the other way.
    """
    assert result.dtype == own.dtype
    unit = torch.finfo(own.dtype).eps
    error, least = (result.double() - exact).abs(), torch.finfo(own.dtype).smallest_normal
    if own.dtype == torch.float32:
        # a sum's and a root's last digits, a product or three
        assert (error <= 4 * unit * size + least).all()
        return
    # two roundings of half a unit each
    assert (error <= 1.01 * unit * size + least).all()
    assert (result != own).float().mean() <= tipped


@pytest.mark.parametrize(("device", "dtype"), DEVICES_AND_DTYPES)
@pytest.mark.parametrize("form", ["rounded", "wide", "shifted"])
@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 100), (1, 1536), (2, 3, 9, 128), (1, 1, 1)])
def test_norms(device, dtype, form, shape):
    x = (3.0 * torch.randn(shape, device=device)).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    exact = norm(x.double(), weight.double(), 1e-6, form)
    result = layers.rms_norm(x, weight, 1e-6, form)
    assert_rounded_alike(result, norm(x, weight, 1e-6, form), exact, exact.abs())


@pytest.mark.parametrize("device", DEVICES)
def test_a_norms_row_has_the_same_bits_wherever_it_stands(device):
    x, weight = torch.randn(37, 96, device=device), torch.randn(96, device=device)
    together = layers.rms_norm(x, weight, 1e-5, "rounded")
    for i in (0, 5, 36):
        assert torch.equal(layers.rms_norm(x[i : i + 1], weight, 1e-5, "rounded")[0], together[i])


@pytest.mark.parametrize("device", DEVICES)
def test_eps_keeps_a_row_of_zeros_finite(device):
    x = torch.zeros(2, 32, device=device)
    assert torch.equal(layers.rms_norm(x, torch.ones(32, device=device), 1e-6, "wide"), x)


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.mark.parametrize(("device", "dtype"), DEVICES_AND_DTYPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("in_place", [False, True])
def test_gated_activations(device, dtype, activation, in_place):
    function = ACTIVATIONS[activation]
    gate = (4.0 * torch.randn(3, 17, 48, device=device)).to(dtype)
    gate.view(-1)[:5] = torch.tensor([0.0, -80.0, 80.0, -1e4, 1e4])
    up = torch.randn(3, 17, 48, device=device).to(dtype)
    own, exact = function(gate) * up, function(gate.double()) * up.double()
    before = gate.clone()
    result = layers.gated(gate, up, activation, in_place=in_place)
    assert (result.data_ptr() == gate.data_ptr()) == in_place
    assert in_place or torch.equal(gate, before)
    # far below 0 an activation is a difference, whose digits in float32 are relative to its input
    single = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    size = exact.abs() + single * (before.double() * up.double()).abs()
    # 1 + erf cancels far below 0
    assert_rounded_alike(result, own, exact, size, tipped=0.03 if activation == "gelu" else 0.01)


@pytest.mark.parametrize(("device", "dtype"), DEVICES_AND_DTYPES)
@pytest.mark.parametrize("width", [16, 48, 4096])
def test_gate_and_up_may_be_halves(device, dtype, width):
    gate, up = torch.randn(2, 5, 2 * width, device=device).to(dtype).chunk(2, dim=-1)
    result = layers.gated(gate, up, "silu")
    assert result.is_contiguous()
    assert torch.equal(result, layers.gated(gate.contiguous(), up.contiguous(), "silu"))


def spelt_rotary(q, k, cos, sin):
    def half(x):
        x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((-x2, x1), dim=-1)

    cos, sin, n = cos.unsqueeze(1), sin.unsqueeze(1), cos.shape[-1]
    rotated = ((x[..., :n] * cos + half(x[..., :n]) * sin, x[..., n:]) for x in (q, k))
    return [torch.cat(parts, dim=-1) for parts in rotated]


@pytest.mark.parametrize(("device", "dtype"), DEVICES_AND_DTYPES)
@pytest.mark.parametrize(("batch", "angles"), [(1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "rotated"),
    [(4, 2, 64, 64), (3, 3, 24, 24), (1, 1, 6, 6), (4, 1, 64, 16), (2, 2, 40, 24)],
)
def test_rotary_positions(device, dtype, batch, angles, heads, key_heads, width, rotated):
    length = 21
    q = torch.randn(batch, length, heads, width, device=device).to(dtype).transpose(1, 2)
    k = torch.randn(batch, length, key_heads, width, device=device).to(dtype).transpose(1, 2)
    angle = 6.0 * torch.randn(angles, length, rotated, device=device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    for result, own in zip(layers.rotary(q, k, cos, sin), spelt_rotary(q, k, cos, sin), strict=True):
        assert result.transpose(1, 2).is_contiguous()
        if dtype == torch.float32:  # a compiler may fuse a product into the sum
            torch.testing.assert_close(result, own, rtol=0, atol=4 * torch.finfo(dtype).eps * float(own.abs().max()))
        else:
            assert torch.equal(result, own)


@compiles
@pytest.mark.parametrize("gpu", GPUS, ids=str)
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
@pytest.mark.parametrize("name", ["norm", "heads_norm", "gated", "halves", "rotary", "partly"])
def test_they_compile(gpu, dtype, name, tmp_path):
    kernel, variant = {
        "norm": (layers.rms_norm_kernel, layers._norm_variant(4096, "rounded")),
        "heads_norm": (layers.rms_norm_kernel, layers._norm_variant(128, "shifted")),
        "gated": (layers.gated_kernel, layers._gated_variant("gelu_tanh", None)),
        "halves": (layers.gated_kernel, layers._gated_variant("silu", 8960)),
        "rotary": (layers.rotary_kernel, layers._rotary_variant(32, 8, 64, 128)),
        "partly": (layers.rotary_kernel, layers._rotary_variant(16, 2, 32, 256)),
    }[name]
    scalars = {"rows": "i32", "steps": "i32", "tokens": "i32", "period": "i32", "eps": "fp32"}
    compiled = compiled_for(gpu, kernel, variant, scalars, dtype)
    if gpu[0] == "hip":
        assert compiled.asm["hsaco"]
        return
    # whole vectors of 16 bytes, and nothing spilled
    ptx = compiled.asm["ptx"]
    assert re.search(r"ld\.global\.v4\.b32", ptx)
    assert re.search(r"st\.global\.v4\.b32", ptx)
    assert stack_bytes(compiled, tmp_path) == 0
