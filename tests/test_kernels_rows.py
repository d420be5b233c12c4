"""The kernels on logits without a GPU: run by Triton's interpreter, and compiled for the GPUs they are meant for.

Triton reads TRITON_INTERPRET when it is imported, so the interpreted half of this file runs in a process of its own,
started by `test_in_the_interpreter`.
"""

import math
import re

import pytest
import torch
from without_gpu import DEVICES, compiles, interpreted, run_interpreted, stack_bytes, starter

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from entropy_fast.kernels.device import log1p_below_half, one_minus_exp  # noqa: E402
from entropy_fast.kernels.rows_order import spread, spread_out, unit_at  # noqa: E402
from entropy_fast.kernels.settings import FORWARD  # noqa: E402
from entropy_fast.kernels.tanh import tanh  # noqa: E402


@starter
@pytest.mark.parametrize("which", ["backward or words or strides", "not (backward or words or strides)"])
def test_in_the_interpreter(which):
    """In two halves, which take minutes each."""
    run_interpreted(__file__, "-k", which)


def small(segment=128, words=False, lanes=32, together=1):
    """Settings with blocks of 8 numbers of 16 bits a lane, and segments of so many bytes."""
    from entropy_fast.kernels.settings import Settings

    return Settings(1, lanes=lanes, segment=segment, depth=1, resident=2, words=words, together=together)


# bf16 without bias and softcap is read in words of two
with_pairs = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def reference(logits, targets, mask=None, bias=None, transform=None):
    """The plain-torch statistics in float64, shaped like the targets."""
    from entropy_fast.reference import rows
    from entropy_fast.reference.transform import Transform

    flat = None if mask is None else mask.reshape(-1)
    wide = None if bias is None else bias.double()
    x = logits.double().reshape(-1, logits.shape[-1])
    stats = rows.row_stats(x, targets.reshape(-1), flat, wide, transform or Transform())
    return rows.RowStats(*(t.view(targets.shape) for t in stats))


def assert_close(got, expected, atol):
    for a, e in zip(got[:2], expected[:2], strict=True):
        assert torch.equal(a.isnan(), e.isnan())
        assert torch.equal(a.isneginf(), e.isneginf())
        assert ((a.double() - e)[e.isfinite()].abs() <= atol).all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [(), (0.75, 0.5, 4.0)])
@pytest.mark.parametrize(("vocab", "segment"), [(3, 128), (256, 4096), (131, 128), (700, 1024)])
def test_forward_matches_float64(dtype, options, vocab, segment):
    from entropy_fast.kernels.rows import row_stats
    from entropy_fast.reference.transform import Transform

    transform = Transform(*options)
    g = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(2, 3, vocab, generator=g)).to(dtype)
    targets = torch.randint(vocab, (2, 3), generator=g)
    bias = torch.randn(vocab, generator=g).double() if dtype == torch.float64 else torch.randn(vocab, generator=g)
    b = bias if vocab == 131 else None
    got = row_stats(logits, targets, None, b, transform, small(segment))
    assert_close(got, reference(logits, targets, None, b, transform), 1e-13 if dtype == torch.float64 else 3e-6)


@interpreted
@with_pairs
def test_minus_infinity_nan_and_outside_targets(dtype):
    from entropy_fast.kernels.rows import row_stats

    logits = (3 * torch.randn(1, 9, 100)).to(dtype)
    targets = torch.randint(40, 60, (1, 9))
    logits[0, 0, :30] = logits[0, 1, 70:] = logits[0, 2, 3:40] = -math.inf
    logits[0, 3, 7], logits[0, 4, 99], logits[0, 5] = math.nan, math.inf, -math.inf
    logits[0, 6, 50], targets[0, 6] = -math.inf, 50
    logits[0, 7] = torch.finfo(dtype).min
    logits[0, 8, 10:] = torch.finfo(dtype).min
    expected = reference(logits, targets)
    for segment in (4096, 128):
        assert_close(row_stats(logits, targets, None, None, _plain(), small(segment)), expected, 3e-6)
    targets[0, 0], targets[0, 1] = 100, -1
    out = row_stats(logits, targets, None, None, _plain(), small())
    assert out.logprob[0, :2].isnan().all()
    assert out.entropy[0, :2].isnan().all()


def _plain():
    from entropy_fast.reference.transform import Transform

    return Transform()


@interpreted
@with_pairs
def test_a_confident_row_keeps_its_digits(dtype):
    from entropy_fast.kernels.rows import row_stats

    for gap in (5.0, 18.5, 40.0):
        for offset in (0.0, 64.0):
            logits = torch.full((1, 1, 100), offset - gap, dtype=dtype)
            logits[0, 0, 57] = offset
            out = row_stats(logits, torch.tensor([[57]]), None, None, _plain(), small())
            rest = 99 * math.exp(-gap)
            assert float(out.logprob) == pytest.approx(-math.log1p(rest), rel=1e-5)
            assert float(out.entropy) == pytest.approx(math.log1p(rest) + gap * rest / (1 + rest), rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "segment", "lanes"),
    [
        *((dtype, 4096, 32) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        *((dtype, 128, 32) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        (torch.bfloat16, 128, 64),
    ],
)
def test_equal_peaks_near_and_far_from_zero(dtype, segment, lanes, device):
    """Numbers so large that only those that are equal to the peak have any mass; many equal small ones."""
    from entropy_fast.kernels.rows import row_stats
    from entropy_fast.reference.transform import Transform

    logits = (3 * torch.randn(1, 10, 300)).to(dtype)
    large = 2.0**15 if dtype == torch.float16 else 2.0**70
    logits[0, 0, 7::40] = large
    logits[0, 1] = -large
    logits[0, 2, 5], logits[0, 3, 5] = large, -large
    logits[0, 4, 1:] = -large
    logits[0, 5, 9:13], logits[0, 5, 20] = large, math.nan
    logits[0, 6, 9:13], logits[0, 6, 20:] = large, -math.inf
    logits[0, 7] = torch.randint(3, (300,))
    logits[0, 8] = 5
    logits[0, 9] = -large
    logits[0, 9, 3], logits[0, 9, 4] = -large / 2, -math.inf
    targets = torch.full((1, 10), 9)
    targets[0, 0], targets[0, 4] = 47, 0
    for temperature in (1.0, 2.0**-12):
        transform = Transform(temperature)
        got = row_stats(logits.to(device), targets.to(device), None, None, transform, small(segment, lanes=lanes))
        expected = reference(logits, targets, None, None, transform)
        far = expected.logprob.abs() > 1e3
        # beyond there the log-prob itself is so large that float32 holds fewer digits after the point
        for a, e in zip((t.cpu().double() for t in got[:2]), expected[:2], strict=True):
            assert torch.equal(a.isnan(), e.isnan())
            error = (a - e).abs().nan_to_num(0)
            assert (error[~far] < 3e-6).all()
            assert (error[far] <= 3e-7 * e[far].abs()).all()


@interpreted
@with_pairs
@pytest.mark.parametrize("segment", [4096, 128], ids=["whole rows", "segments"])
def test_masks_and_batches_leave_the_bits_alone(dtype, segment):
    from entropy_fast.kernels.rows import row_stats

    settings = small(segment)
    logits, targets = (3 * torch.randn(2, 4, 150)).to(dtype), torch.randint(150, (2, 4))
    whole = row_stats(logits, targets, None, None, _plain(), settings)
    alone = row_stats(logits[1:, 2:3], targets[1:, 2:3].contiguous(), None, None, _plain(), settings)
    for a, one in zip(whole, alone, strict=True):
        assert a[1, 2] == one[0, 0]
    some, none = torch.rand(2, 4) < 0.5, torch.zeros(2, 4, dtype=torch.bool)
    for mask, for_backward in ((some, True), (some, False), (none, True), (~none, False)):
        dirty, nowhere = logits.clone(), targets.clone()
        dirty[~mask], nowhere[~mask] = math.nan, -100
        out = row_stats(dirty, nowhere, mask, None, _plain(), settings, for_backward)
        for a, b in zip(out, whole, strict=True):
            assert a is None or torch.equal(a, torch.where(mask, b, 0.0))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "segment"), [(1, 128), (131, 128), (700, 1024)])
def test_rows_on_any_two_bytes_are_read_as_words(dtype, vocab, segment):
    from entropy_fast.kernels.rows import row_stats
    from entropy_fast.kernels.settings import vector_width

    settings = small(segment, words=True)
    # around every row lies what would show if it were part of it
    base = torch.full((2, 3, vocab + 5), math.nan, dtype=dtype)
    for start, count in ((2, vocab), (1, vocab), (3, 1 + vocab // 2)):
        view = base[1:, :2, start : start + count]
        view.copy_(3 * torch.randn(view.shape))
        view[0, 0, : count // 2] = -math.inf
        targets = torch.randint(count // 2, count, view.shape[:2])
        got = row_stats(view, targets, None, None, _plain(), settings)
        assert_close(got, reference(view, targets), 3e-6)
        bias = torch.randn(count)
        assert_close(
            row_stats(view, targets, None, bias, _plain(), settings), reference(view, targets, None, bias), 3e-6
        )
        # the same bits wherever a row lies
        for first in range(2):
            moved = torch.full((2 * (count + 1) + 1,), math.nan, dtype=dtype)[first : first + 2 * (count + 1)]
            moved = moved.view(1, 2, count + 1)[..., :count].copy_(view)
            if vector_width(moved) * moved.element_size() < 8:
                for a, b in zip(row_stats(moved, targets, None, None, _plain(), settings), got, strict=True):
                    assert torch.equal(a, b)
        base.fill_(math.nan)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "vocab", "segment"),
    [
        *[(torch.bfloat16, vocab, segment) for vocab, segment in ((1, 4096), (2, 128), (63, 4096), (64, 128))],
        *[(torch.bfloat16, vocab, segment) for vocab, segment in ((128, 4096), (130, 128), (131, 4096), (131, 128))],
        *[(torch.bfloat16, vocab, segment) for vocab, segment in ((256, 4096), (520, 4096), (700, 1024))],
        *[(torch.float16, vocab, segment) for vocab, segment in ((2, 128), (63, 4096), (131, 128), (700, 1024))],
    ],
)
def test_words_of_two(dtype, vocab, segment):
    """With blocks of 256: parts of a block, whole ones, both; segments of a few numbers; odd ends in aligned rows."""
    from entropy_fast.kernels.rows import Forward, row_stats

    # behind every row lies what would show if it were part of it
    base = torch.full((1, 6, 704), math.nan, dtype=dtype)
    logits = base[..., :vocab].copy_(3 * torch.randn(1, 6, vocab))
    targets = torch.randint(vocab, (1, 6))
    logits[0, 1, ::2], logits[0, 2, 1::2] = -math.inf, -math.inf
    logits[0, 3, 0], logits[0, 4, vocab - 1], logits[0, 5] = math.nan, math.nan, math.nan
    targets[0, 0] = vocab - 1
    forward = Forward(logits, targets, None, None, _plain(), small(segment))
    assert forward._kernel._rest[2].constants["PAIRS"]
    assert_close(forward(logits, targets, None, None), reference(logits, targets), 3e-6)
    logits[0, 3], logits[0, 4, vocab // 2] = -math.inf, math.inf
    out = row_stats(logits, targets, None, None, _plain(), small(segment))
    assert out.logprob[0, 3:].isnan().all()
    assert out.entropy[0, 3:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("vocab", "segment", "words"), [(256, 4096, False), (300, 256, False), (131, 4096, True), (300, 256, True)]
)
def test_softcapped_words_of_two(dtype, vocab, segment, words, device):
    """Rows near 0, where a polynomial is all it takes, and far from it; −inf is the lowest logit, +inf the highest."""
    from entropy_fast.kernels.rows import Forward
    from entropy_fast.reference.transform import Transform

    # behind every row lies what would show if it were part of it
    base = torch.full((1, 8, 305 if words else 304), math.nan, dtype=dtype)
    logits = base[..., :vocab].copy_(3 * torch.randn(1, 8, vocab))
    targets = torch.randint(vocab, (1, 8))
    targets[0, 0] = vocab - 1
    logits[0, 1] *= 12
    logits[0, 2, 1::2], targets[0, 2] = -math.inf, 1
    logits[0, 3], logits[0, 4, vocab // 2] = -math.inf, math.inf
    logits[0, 5] = torch.finfo(dtype).min
    logits[0, 5, 0], targets[0, 5] = 9.0, 0
    logits[0, 6, vocab - 1] = math.nan
    logits[0, 7], logits[0, 7, 40] = -7.0, 60.0
    transform = Transform(0.75, 1.0, 30.0 if dtype == torch.bfloat16 else 4.0)
    given = base.to(device)[..., :vocab], targets.to(device)
    forward = Forward(*given, None, None, transform, small(segment, words=words, lanes=64))
    assert forward._kernel._rest[2].constants["PAIRS"]
    got = [t.cpu() for t in forward(*given, None, None)]
    # w, which the sums see, is within two roundings of 1
    bound = 3e-6 + 4 * 2.0**-24 * transform.factor
    assert_close(got, reference(logits, targets, None, None, transform), bound)


@interpreted
def test_a_confident_softcapped_row_keeps_its_digits():
    from entropy_fast.kernels.rows import row_stats
    from entropy_fast.reference.transform import Transform

    for low, high in ((-3.0, 1.5), (-40.0, 12.0), (-90.0, 90.0)):
        logits = torch.full((1, 1, 100), low, dtype=torch.bfloat16)
        logits[0, 0, 57] = high
        out = row_stats(logits, torch.tensor([[57]]), None, None, Transform(0.25, 1.0, 8.0), small())
        gap = 32 * (math.tanh(high / 8) - math.tanh(low / 8))
        rest = 99 * math.exp(-gap)
        assert float(out.logprob) == pytest.approx(-math.log1p(rest), rel=2e-5)
        assert float(out.entropy) == pytest.approx(math.log1p(rest) + gap * rest / (1 + rest), rel=2e-5)


@interpreted
@pytest.mark.parametrize("transform", [(1.0, 8.0, 4.0), (1.0, -1.0, 4.0), (1e-6, 1.0, 4.0), (1.0, 1.0, 1e5)])
def test_softcaps_out_of_proportion_are_worked_out_one_by_one(transform):
    """Where words would overflow, fall, or leave −inf above the lowest logit."""
    from entropy_fast.kernels.rows import Forward
    from entropy_fast.reference.transform import Transform

    transform = Transform(*transform)
    logits, targets = (3 * torch.randn(1, 3, 100)).half(), torch.randint(100, (1, 3))
    logits[0, 1, ::3] = -math.inf
    forward = Forward(logits, targets, None, None, transform, small())
    assert not forward._kernel._rest[2].constants["PAIRS"]
    expected = reference(logits, targets, None, None, transform)
    for a, e in zip(forward(logits, targets, None, None)[:2], expected[:2], strict=True):
        assert ((a - e).abs() <= 3e-6 + 4 * 2.0**-24 * transform.factor).all()


@interpreted
@with_pairs
def test_strides(dtype):
    from entropy_fast.kernels.rows import row_stats

    base = (3 * torch.randn(3, 4, 120)).to(dtype)
    for view in (base[:, :-1], base[:, 1:], base[..., :104], base[..., 3:90], base.transpose(0, 1), base[::2, ::3]):
        targets = torch.randint(view.shape[-1], view.shape[:2])
        assert_close(row_stats(view, targets, None, None, _plain(), small()), reference(view, targets), 3e-6)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [(), (0.75, 0.5, 4.0)])
@pytest.mark.parametrize("vocab", [96, 131])
def test_backward_matches_float64(dtype, options, vocab):
    from entropy_fast.kernels.rows import row_stats
    from entropy_fast.kernels.rows_backward import row_stats_backward
    from entropy_fast.kernels.settings import BackwardSettings
    from entropy_fast.reference import rows
    from entropy_fast.reference.transform import Transform

    transform = Transform(*options)
    logits, targets = (3 * torch.randn(2, 3, vocab)).to(dtype), torch.randint(vocab, (2, 3))
    mask = torch.tensor([[True, True, False], [True, False, True]])
    bias = torch.randn(vocab)
    stats = row_stats(logits, targets, mask, bias, transform, small())
    gradients = rows.RowGradients(*torch.randn(3, 2, 3).to(stats.logprob.dtype))
    x = logits.double().view(6, vocab)
    exact = rows.row_stats(x, targets.view(-1), mask.view(-1), bias.double(), transform)
    wide = rows.RowGradients(*(g.double().view(-1) for g in gradients))
    expected = torch.empty_like(x)
    rows.row_stats_backward(x, targets.view(-1), mask.view(-1), bias.double(), transform, exact, wide, expected, None)
    out = torch.full_like(logits, math.nan)
    row_stats_backward(logits, targets, mask, bias, transform, stats, gradients, out, BackwardSettings(32, 1))
    # the interpreter cuts float32 down to bf16 where a GPU rounds: up to a whole unit in the last of 8 bits
    bound = {torch.bfloat16: 2.0**-7, torch.float32: 1e-6, torch.float64: 1e-7 if transform.softcap else 1e-13}[dtype]
    assert (out.double().view(6, vocab) - expected).norm() <= bound * expected.norm()
    assert not out[~mask].any()
    # a sum's gradient is one number, expanded
    expanded = rows.RowGradients(*(g[0, 0].expand(2, 3) for g in gradients))
    contiguous = rows.RowGradients(*(g.contiguous() for g in expanded))
    one, other = torch.empty_like(logits), torch.empty_like(logits)
    for into, incoming in ((one, expanded), (other, contiguous)):
        row_stats_backward(logits, targets, mask, bias, transform, stats, incoming, into, BackwardSettings(32, 1))
    assert torch.equal(one, other)
    row_stats_backward(logits, targets, mask, bias, transform, stats, gradients, logits, BackwardSettings(32, 1))
    assert torch.equal(logits, out)


@interpreted
@pytest.mark.parametrize(
    ("vocab", "in_place", "masked"), [(131, False, True), (133, True, False), (136, True, True), (20, False, True)]
)
def test_the_backward_of_rows_with_and_without_gaps(vocab, in_place, masked):
    """Programs take pieces of all rows that lie next to each other, wherever rows end; gaps stay as they are."""
    from entropy_fast.kernels.rows import row_stats
    from entropy_fast.kernels.rows_backward import row_stats_backward, without_gaps
    from entropy_fast.kernels.settings import BackwardSettings
    from entropy_fast.reference import rows

    base = (3 * torch.randn(2, 3, vocab + 3)).half()
    close = base.flatten()[: 6 * vocab].view(2, 3, vocab)
    for view, flat in ((close, True), (close[:, :-1], False), (base[:, 1:, 2:-1], False), (close[:, ::2], False)):
        assert without_gaps(view, view) == flat
        targets = torch.randint(vocab, view.shape[:2])
        mask = torch.rand(view.shape[:2]) < 0.5 if masked else None
        stats = row_stats(view, targets, mask, None, _plain(), small())
        gradients = rows.RowGradients(*torch.randn(3, *view.shape[:2]))
        exact = rows.row_stats(view.double().flatten(0, 1), targets.flatten(), None, None, _plain())
        expected = torch.empty(targets.numel(), vocab, dtype=torch.float64)
        wide = rows.RowGradients(*(g.double().flatten() for g in gradients))
        rows.row_stats_backward(
            view.double().flatten(0, 1), targets.flatten(), None, None, _plain(), exact, wide, expected, None
        )
        expected = expected.view(view.shape)
        if masked:
            expected[~mask] = 0
        # NaN between the rows and, where it is not written over, in masked ones
        room = torch.full((base.numel() + 64,), math.nan, dtype=torch.float16)
        source = room.clone().as_strided(view.shape, view.stride(), view.storage_offset()).copy_(view)
        if masked:
            source[~mask] = math.nan
        out = source if in_place else room.as_strided(view.shape, view.stride(), view.storage_offset())
        row_stats_backward(source, targets, mask, None, _plain(), stats, gradients, out, BackwardSettings(64, 1))
        assert (out.double() - expected).norm() <= 2.0**-10 * expected.norm()
        whole = out.as_strided((room.numel(),), (1,), 0)
        assert whole.isfinite().sum() == view.numel()


@interpreted
@pytest.mark.parametrize("include_eos", [True, False])
@pytest.mark.parametrize("stop_at_eos", [True, False])
def test_sequences(include_eos, stop_at_eos):
    from entropy_fast.kernels.rows import sequence_stats
    from entropy_fast.reference.masks import Counting, generated_columns, token_masks

    n, t, vocab = 5, 11, 37
    dtype = torch.bfloat16 if stop_at_eos else torch.float32
    logits, tokens = torch.randn(n, t, vocab + 3).to(dtype)[..., :vocab], torch.randint(6, (n, t))
    attention_mask = torch.rand(n, t) < 0.9
    lens = torch.randint(1, t, (n,))
    attention_mask[3] = False
    tokens[attention_mask.logical_not()] = -100
    masks = token_masks(tokens, generated_columns(attention_mask, lens), Counting((3, 4), include_eos, stop_at_eos))
    eos = torch.tensor([3, 4])
    out, sequences = sequence_stats(
        logits, tokens, attention_mask, lens, eos, include_eos, stop_at_eos, None, _plain(), small()
    )
    rows = reference(logits[:, :-1], tokens[:, 1:].contiguous(), masks.generated[:, 1:])
    for got, expected in zip(out[:2], rows[:2], strict=True):
        assert (got[:, 1:] - expected).abs().max() < 2e-6
        assert not got[:, 0].any()
    counted = masks.counted[:, 1:]
    sums = [(rows.logprob * counted).sum(1), (rows.entropy * counted).sum(1), rows.logprob.sum(1)]
    for got, expected in zip(sequences.sums, sums, strict=True):
        assert (got - expected).abs().max() < t * 2e-6
    assert torch.equal(sequences.lengths, masks.lengths)
    assert torch.equal(sequences.eos_column, masks.eos_column)
    assert torch.equal(sequences.runs_past_eos, masks.runs_past_eos)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_with_more_sets_than_a_warp_has_lanes_end_in_groups(dtype, device):
    """10 segments, 4 warps, so 40 sets; the last group of rows is not full."""
    from entropy_fast.kernels.rows import row_stats

    # of float64, which takes long, twice as much is a segment
    settings = small(128 if dtype == torch.bfloat16 else 256, lanes=128)
    logits = (3 * torch.randn(1, 5, 600, dtype=torch.float64)).to(dtype)
    logits[0, 2, :500] = -math.inf
    logits[0, 3, 321] = math.nan
    targets = torch.tensor([[0, 599, 550, 7, 512]])
    mask = torch.tensor([[True, False, True, True, True]])
    for given in (None, mask):
        got = row_stats(
            *(None if t is None else t.to(device) for t in (logits, targets, given)), None, _plain(), settings
        )
        bound = 1e-12 if dtype == torch.float64 else 3e-6
        assert_close([t.cpu() for t in got], reference(logits, targets, given), bound)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "together"), [(1, 4), (4, 4), (5, 4), (14, 4), (27, 1)])
def test_masked_rows_are_what_they_are_without_a_mask(rows, together, device):
    """A program takes four rows; or one, of rows that are spread out by eights and a rest of three."""
    from entropy_fast.kernels.rows import row_stats

    settings = small(4096, together=together)
    logits, targets = 3 * torch.randn(1, rows, 100, device=device), torch.randint(100, (1, rows), device=device)
    whole = row_stats(logits, targets, None, None, _plain(), settings)
    assert_close([t.cpu() for t in whole], reference(logits.cpu(), targets.cpu()), 3e-6)
    for mask in (torch.rand(1, rows) < 0.5, torch.zeros(1, rows) > 0, torch.ones(1, rows) > 0):
        given = mask.to(device)
        got = row_stats(logits, targets, given, None, _plain(), settings)
        for some, every in zip(got, whole, strict=True):
            assert torch.equal(some, every.where(given, 0))


@triton.jit
def units_kernel(out_ptr, groups, lag, ITEMS: tl.constexpr):
    unit = tl.program_id(0)
    group, item = unit_at(unit, groups, lag, ITEMS)
    tl.store(out_ptr + 2 * unit, group)
    tl.store(out_ptr + 2 * unit + 1, item)


@interpreted
@pytest.mark.parametrize(("groups", "lag", "items"), [(1, 1, 2), (7, 7, 3), (20, 3, 2), (9, 1, 16), (12, 11, 5)])
def test_rows_end_once_and_after_all_of_their_segments_have_begun(groups, lag, items):
    units = torch.empty(groups * (items + 1), 2, dtype=torch.int32)
    units_kernel[(len(units),)](units, groups, lag, items)
    order = {tuple(unit): i for i, unit in enumerate(units.tolist())}
    assert order.keys() == {(group, item) for group in range(groups) for item in range(items + 1)}
    for group in range(groups):
        end = order[group, items]
        # nobody waits for who has not begun, and but for the last groups, whole ones lie between
        assert all(order[group, item] < end for item in range(items))
        assert group >= groups - lag or order[group + lag - 1, items - 1] < end


@triton.jit
def places_kernel(out_ptr, first, count, step, inverse, CHUNK: tl.constexpr):
    place = tl.program_id(0)
    tl.store(out_ptr + place, spread_out(first + place, count, step, inverse, CHUNK))


@interpreted
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 15, 30, 97])
def test_rows_are_spread_out_once_each(count, chunk):
    places = torch.empty(count, dtype=torch.int32)
    places_kernel[(count,)](places, 0, count, *spread(count, chunk), chunk)
    assert sorted(places.tolist()) == list(range(count))


@interpreted
@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.parametrize("count", [65536, 65537, 10**6, 2**31 - 1])
def test_many_rows_are_spread_out_as_exact_arithmetic_says(count, chunk):
    step, inverse = spread(count, chunk)
    n = count // chunk
    assert math.gcd(step, n) == 1
    assert step * n < 2**32
    for first in (0, count // 2, count - 8):
        places = torch.empty(8, dtype=torch.int32)
        places_kernel[(8,)](places, first, count, step, inverse, chunk)
        exact = [i // chunk * step % n * chunk + i % chunk if i < n * chunk else i for i in range(first, first + 8)]
        assert places.tolist() == exact


def test_a_run_of_masked_rows_is_spread_over_all_programs():
    """Of any 528 programs that run at a time, as many have a masked row as of all, within a few."""
    for run in (64, 256, 1024, 4096):
        step, _ = spread(8192, 8)
        masked = [(place // 8 * step % 1024 * 8 + place % 8) // run % 2 for place in range(8192)]
        counts = [sum(masked[i : i + 528]) for i in range(0, 8192 - 528, 100)]
        assert max(abs(n - 264) for n in counts) <= 40, run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_programs_leave_for_each_other_is_zero_again_afterwards(device, dtype, monkeypatch):
    """Rows of NaN too, whose bits are all ones: a word that is 0 would count as missing, and be waited for."""
    from entropy_fast.kernels import rows

    given = []

    def zeros(count, device):
        given.append(torch.zeros(count, dtype=torch.int32, device=device))
        return given[-1]

    monkeypatch.setattr(rows, "zeros_between_launches", zeros)
    logits = (3 * torch.randn(1, 9, 700, dtype=torch.float64)).to(dtype)
    logits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])[0, 4] = -1
    targets = torch.randint(700, (1, 9))
    mask = torch.arange(9)[None] % 3 != 1
    mask[0, 4] = True
    got = rows.row_stats(*(t.to(device) for t in (logits, targets, mask)), None, _plain(), small())
    assert_close([t.cpu() for t in got], reference(logits, targets, mask), 1e-12 if dtype == torch.float64 else 3e-6)
    assert got[0][0, 4].isnan()
    assert len(given) == 1
    assert given[0].numel() >= 9 * 4
    assert not given[0].any()


@triton.jit
def forms_kernel(x_ptr, out_ptr, N: tl.constexpr, NVIDIA: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, log1p_below_half(tl.abs(x)))
    tl.store(out_ptr + N + i, one_minus_exp(-tl.abs(x) * 8))
    tl.store(out_ptr + 2 * N + i, tanh(x * 8, NVIDIA))


@pytest.mark.parametrize("device", DEVICES)
def test_exact_forms_near_zero(device):
    for dtype, bound in ((torch.float32, 3e-7), (torch.float64, 1e-15)):
        x = (torch.rand(256, dtype=dtype) - 0.5) * 10.0 ** -torch.randint(0, 12, (256,)).to(dtype)
        out = torch.empty(3, 256, dtype=dtype, device=device)
        forms_kernel[(1,)](x.to(device), out, 256, device == "cuda" and torch.version.hip is None)
        out, w = out.cpu(), x.double()
        assert (out[0] / torch.log1p(w.abs()) - 1).abs().max() < bound
        assert (out[1] / -torch.expm1(-w.abs() * 8) - 1).abs().max() < bound
        if dtype == torch.float32:
            assert (out[2] / torch.tanh(w * 8) - 1).abs().max() < bound
        else:
            assert (out[2] - torch.tanh(w * 8)).abs().max() < bound


TARGETS = [("cuda", 80), ("cuda", 90), ("cuda", 100), ("hip", "gfx942")]
COMPILATIONS = [(target, "*bf16", True) for target in TARGETS if target[1] != 90]
COMPILATIONS += [(target, "*bf16", False) for target in TARGETS if target[1] != 90]
COMPILATIONS += [
    (("cuda", 90), dtype, everything) for dtype in ("*bf16", "*fp16", "*fp32", "*fp64") for everything in (False, True)
]
SCALARS = ("rows", "inner", "stride_outer", "stride_inner", "sequences", "lag", "step", "inverse")
SCALARS = dict.fromkeys(
    (
        *SCALARS,
        "out_outer",
        "out_inner",
        "step_logprob",
        "step_entropy",
        "step_lse",
        "positions",
        "counters",
        "columns",
        "eos_count",
    ),
    "i32",
)
SCALARS |= {"factor": "fp64", "squeeze": "fp64"}
TYPES = {"targets_ptr": "*i64", "tokens_ptr": "*i64", "prompt_lens_ptr": "*i64", "eos_ptr": "*i64"}
TYPES |= {"eos_column_ptr": "*i64", "sums_ptr": "*fp64", "mask_ptr": "*i1", "attention_ptr": "*i1"}
TYPES |= {"runs_past_ptr": "*i1"} | dict.fromkeys(
    ("active_ptr", "counters_ptr", "arrivals_ptr", "pending_ptr", "rows_ptr", "count_ptr", "lengths_ptr"), "*i32"
)


def _compile(kernel, logits_type, constants, target, **options):
    """Compile for a GPU that need not be here; pointers are aligned, those in `constants` absent.

    A limit on registers is for NVIDIA's alone, as in `settings.registers`.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    real = {"logits_ptr": logits_type, "out_ptr": logits_type, "sets_ptr": "*i64" if "64" in logits_type else "*i32"}
    names = kernel.arg_names
    signature = {
        n: "constexpr"
        if n in constants
        else (SCALARS | TYPES | real).get(n, "*fp64" if "64" in logits_type else "*fp32")
        for n in names
    }
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    backend, arch = target
    if backend == "hip":
        options.pop("maxnreg", None)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget(backend, arch, 64 if backend == "hip" else 32), options=options)


def _forward_variant(target, logits_type, vocab, everything, aligned, softcap=False):
    """What the launcher would compile, and the constants with the tensors that are not there."""
    from entropy_fast.kernels.rows import _variant
    from entropy_fast.kernels.settings import forward_settings

    itemsize = int(logits_type[-2:]) // 8
    dtypes = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32, "*fp64": torch.float64}
    dtype = dtypes[logits_type]
    # rows an odd number of elements apart start anywhere
    rows = torch.empty(2, vocab if aligned else vocab + 1, dtype=dtype, device="meta")[None, :, :vocab]
    arithmetic = torch.float64 if itemsize == 8 else torch.float32
    width = 16 // itemsize if aligned else 1
    # an odd vocabulary is what makes rows start anywhere
    odd = vocab if aligned else vocab + 1
    flags = (not everything, not everything, everything, everything or softcap, True, everything, True)
    packed = target[1] // 10 if target[0] == "cuda" else 0
    variant = _variant(forward_settings(rows), arithmetic, itemsize, width, odd, *flags, torch.device("cuda"), packed)
    segments = variant.constants["SEGMENTS"]
    absent = [] if segments > 1 else ["sets_ptr"]
    if everything:
        absent += ["mask_ptr"]
    else:
        absent += ["bias_ptr", "active_ptr", "counters_ptr", "arrivals_ptr", "pending_ptr", "eos_column_ptr"]
        absent += ["sums_ptr"]
    return variant, variant.constants | dict.fromkeys(absent)


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_softcapped_forward_compiles_without_spills(target, tmp_path):
    from entropy_fast.kernels.rows import row_stats_kernel

    # AMD's assembler takes long for long rows
    vocab = 256000 if target[0] == "cuda" else 1000
    variant, constants = _forward_variant(target, "*bf16", vocab, False, True, softcap=True)
    assert constants["PAIRS"]
    compiled = _compile(row_stats_kernel, "*bf16", constants, target, **variant.options)
    if target == ("cuda", 90):
        assert stack_bytes(compiled, tmp_path) == 0


@compiles
@pytest.mark.parametrize(("target", "logits_type", "everything"), COMPILATIONS)
def test_forward_compiles_without_spills(target, logits_type, everything, tmp_path):
    from entropy_fast.kernels.rows import row_stats_kernel

    for vocab in (1000, 32000, 128256) if target == ("cuda", 90) else (128256,):
        for aligned in (True,) if vocab == 1000 else (True, False):
            variant, constants = _forward_variant(target, logits_type, vocab, everything, aligned)
            compiled = _compile(row_stats_kernel, logits_type, constants, target, **variant.options)
            if target == ("cuda", 90):
                # two registers, once a row, where everything comes together; what users meet most needs none
                allowed = 8 if everything else 0
                assert stack_bytes(compiled, tmp_path) <= allowed, (vocab, aligned)
            if target[0] == "cuda":
                ptx = compiled.asm["ptx"]
                # 16-byte loads, of all that a lane takes or of a block in a loop
                wide = len(re.findall(r"ld\.global\S*\.v(4\.b32|2\.b64)", ptx))
                c = variant.constants
                steps = -(-c["LENGTH"] // (c["LANES"] * c["WIDTH"])) if c["WRITTEN_OUT"] else c["UNROLL"]
                assert not aligned or wide >= steps
                # the compiler has not copied the loop that waits for words, for every layout that it likes
                sets = c["SEGMENTS"] * (c["LANES"] // 32) if c["SEGMENTS"] > 1 and logits_type != "*fp64" else 0
                assert ptx.count("ld.relaxed.gpu.global.v4") == -(-sets // 32)
                pairs = logits_type[-2:] == "16" and not everything
                assert ("max.NaN.bf16x2" in ptx or "max.NaN.f16x2" in ptx) == pairs


@compiles
@pytest.mark.parametrize("name", [name for name in FORWARD if name != "sm90"])
@pytest.mark.parametrize(("vocab", "aligned"), [(128256, True), (50257, False)])
def test_forward_compiles_without_spills_with_the_settings_of(name, vocab, aligned, monkeypatch, tmp_path):
    from entropy_fast.kernels import settings
    from entropy_fast.kernels.rows import row_stats_kernel

    monkeypatch.setattr(settings, "gpu", lambda: name)
    variant, constants = _forward_variant(("cuda", 90), "*bf16", vocab, False, aligned)
    compiled = _compile(row_stats_kernel, "*bf16", constants, ("cuda", 90), **variant.options)
    assert stack_bytes(compiled, tmp_path) == 0


def test_a_gpu_is_looked_up_by_its_name_and_then_by_its_architecture(monkeypatch):
    from entropy_fast.kernels import settings

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    found = {}
    for device, capability in {"NVIDIA H100 80GB HBM3": (9, 0), "NVIDIA H200": (9, 0), "NVIDIA B200": (10, 0)}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda it=capability: it)
        found[device] = settings.gpu.__wrapped__()
    assert list(found.values()) == ["sm90", "H200", "sm100"]


@compiles
@pytest.mark.parametrize(("target", "logits_type", "everything"), COMPILATIONS)
def test_backward_compiles_without_spills(target, logits_type, everything, tmp_path):
    from entropy_fast.kernels.rows_backward import _variant, row_stats_backward_kernel
    from entropy_fast.kernels.settings import backward_settings

    bits = int(logits_type[-2:])
    arithmetic = torch.float64 if bits == 64 else torch.float32
    absent = () if everything else ("bias_ptr", "mask_ptr", "grad_lse_ptr")
    vocab = 50257 if everything else 32000
    # rows of sequences, with a shift of one, are not a constant apart
    for flat in (True,) if everything else (True, False):
        flags = (bits // 8, everything, vocab, not everything, flat, everything, 128 // bits, everything)
        variant = _variant(backward_settings(bits // 8), arithmetic, *flags, torch.device("cuda"), target[0] == "cuda")
        constants = variant.constants | dict.fromkeys(absent)
        compiled = _compile(row_stats_backward_kernel, logits_type, constants, target, **variant.options)
        if target == ("cuda", 90):
            assert stack_bytes(compiled, tmp_path) == 0
        if target[0] == "cuda":
            ptx = compiled.asm["ptx"]
            assert re.search(r"ld\.global[\w.:]*\.v(4\.b32|2\.b64)", ptx)
            assert re.search(r"st\.global[\w.:]*\.v(4\.b32|2\.b64)", ptx)


@compiles
@pytest.mark.parametrize("gapless", [False, True])
def test_the_backward_of_odd_rows_keeps_to_its_registers(gapless, tmp_path):
    from entropy_fast.kernels.rows_backward import _variant, row_stats_backward_kernel
    from entropy_fast.kernels.settings import backward_settings

    flags = (2, False, 50257, False, gapless, gapless, 8, False)
    variant = _variant(backward_settings(2), torch.float32, *flags, torch.device("cuda"), True)
    constants = variant.constants | dict.fromkeys(("bias_ptr", "mask_ptr", "grad_lse_ptr"))
    compiled = _compile(row_stats_backward_kernel, "*bf16", constants, ("cuda", 90), **variant.options)
    assert stack_bytes(compiled, tmp_path) == 0
    assert variant.options["maxnreg"] == 40


@compiles
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t[0]}-{t[1]}")
def test_plans_compile(target):
    from entropy_fast.kernels.plan import plan_sequences_kernel

    for flag in (False, True):
        constants = {"BLOCK": 1024, "INCLUDE_EOS": flag, "STOP_AT_EOS": flag}
        _compile(plan_sequences_kernel, "*bf16", constants, target)
