"""float32 products from bfloat16 pieces, against float64."""

import pytest
import torch
from without_gpu import DEVICES, GPUS, compiled_for, compiles, run_interpreted, stack_bytes, starter

triton = pytest.importorskip("triton")

from entropy_fast.kernels import gemm  # noqa: E402

# the interpreter cannot multiply bfloat16; float16 holds these tests' numbers as well
PIECE = {"cpu": torch.float16, "cuda": torch.bfloat16}
UNIT = torch.finfo(torch.float32).eps


@starter
def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.parametrize("device", DEVICES)
def test_pieces_add_up_to_the_number(device):
    x = torch.randn(3, 1000, device=device) * torch.logspace(-20, 20, 1000, device=device)
    # the interpreter cuts bfloat16 off where a GPU rounds, and so leaves a bit more
    least = 2 * UNIT if device == "cpu" else 0.0
    assert ((gemm.split(x, torch.bfloat16).double().sum(0) - x.double()).abs() <= least * x.double().abs()).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("rows", "width", "columns"), [(1, 8, 1), (5, 72, 130), (131, 200, 33), (40, 1536, 24)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_as_exact_as_float32s_own_sums(device, whole, rows, width, columns, has_bias):
    x = torch.randn(2, rows, width, device=device)
    weight = torch.randn(columns, width, device=device).to(PIECE[device] if whole else torch.float32)
    bias = torch.randn(columns, device=device).to(weight.dtype) if has_bias else None
    result = gemm.linear(x, weight, bias, piece=PIECE[device])
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert result.dtype == torch.float32
    assert result.shape == (2, rows, columns)
    # a rounding of what has been added up for each step of the sum, and of every product cut off
    size = x.double().abs() @ weight.double().abs().T + 1
    assert ((result.double() - exact).abs() <= 4 * UNIT * size).all()
    own = torch.nn.functional.linear(x, weight.float(), None if bias is None else bias.float())
    assert (result.double() - exact).square().mean() <= 4 * (own.double() - exact).square().mean() + UNIT**2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("whole", [True, False])
def test_a_row_has_the_same_bits_among_any_number_of_rows(device, whole):
    x = torch.randn(300, 264, device=device)
    weight = torch.randn(96, 264, device=device).to(PIECE[device] if whole else torch.float32)
    together = gemm.linear(x, weight, None, piece=PIECE[device])
    for i in (0, 127, 128, 299):
        alone = gemm.linear(x[i : i + 1], weight, None, piece=PIECE[device])[0]
        # the interpreter's products are NumPy's, which adds up in an order of its own
        assert torch.equal(alone, together[i]) if device == "cuda" else torch.allclose(alone, together[i], atol=1e-4)


@compiles
@pytest.mark.parametrize("gpu", GPUS, ids=str)
@pytest.mark.parametrize("split_weight", [False, True])
def test_it_compiles(gpu, split_weight, tmp_path):
    kernel, variant = gemm.gemm_kernel, gemm._variant(1536, 8960, split_weight)
    types = {"out_ptr": "*fp32", "rows": "i32"}
    compiled = compiled_for(gpu, kernel, variant, types, "*bf16")
    # what every card has, consumers' included, but for Blackwell's data-centre cards, which have more
    assert compiled.metadata.shared <= {"gfx942": 65536, 100: 232448}.get(gpu[1], 101376)
    if gpu[1] == 90:
        assert stack_bytes(compiled, tmp_path) == 0
        assert "wgmma" in compiled.asm["ptx"]
