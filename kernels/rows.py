"""Launching the forward over rows of logits: what a call needs beside the kernel (`rows_kernel`), worked out once.

Rows that a mask leaves out cost a program that ends at once. Those of sequences are in a list, which is made first.
"""

from __future__ import annotations

from functools import cache

import torch
import triton.language as tl

from entropy_fast.kernels.launch import Repeated, Variant, ceil_div, empties, zeros_between_launches
from entropy_fast.kernels.plan import BLOCK, ActiveRows, Sequences, plan_sequences
from entropy_fast.kernels.rows_kernel import row_stats_kernel
from entropy_fast.kernels.rows_order import spread
from entropy_fast.kernels.rows_pairs import has_pairs
from entropy_fast.kernels.settings import (
    Settings,
    forward_settings,
    is_flat,
    multiprocessors,
    packed_instructions,
    registers,
    vector_width,
)
from entropy_fast.reference.rows import RowStats, arithmetic_dtype
from entropy_fast.reference.transform import Transform

# whole rows that stay together where masked ones are spread out: a little faster than each by itself
NEIGHBOURS = 8
TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def row_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    transform: Transform,
    settings: Settings | None = None,
    for_backward: bool = True,
) -> RowStats:
    """Log-prob of the target and entropy of every row; the contract of `reference.rows.row_stats`.

    Args:
        logits: (outer, inner, vocab), the last dimension contiguous, any other strides.
        targets: (outer, inner), int32 or int64, contiguous.
        mask: (outer, inner), bool, contiguous, or None.
        bias: (vocab,), contiguous, or None.
        transform: what turns `logits + bias` into the logits of the softmax.
        settings: launch settings; from the table by default.
        for_backward: whether peak and log_sum are wanted; without, they are None.
    """
    forward = Forward(logits, targets, mask, bias, transform, settings, for_backward)
    return forward(logits, targets, mask, bias)


def sequence_stats(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor,
    prompt_lens: torch.Tensor,
    eos_token_ids: torch.Tensor,
    include_eos: bool,
    stop_at_eos: bool,
    bias: torch.Tensor | None,
    transform: Transform,
    settings: Settings | None = None,
) -> tuple[RowStats, Sequences]:
    """Statistics of the token in every column, and their sums over each sequence.

    Args:
        logits: (N, T, vocab), the last dimension contiguous; the token in column j is scored by column j − 1.
        tokens: (N, T), and so on: see `plan.plan_sequences`.
        attention_mask: see there.
        prompt_lens: see there.
        eos_token_ids: see there.
        include_eos: see there.
        stop_at_eos: see there.
        bias: (vocab,), contiguous, or None.
        transform: what turns `logits + bias` into the logits of the softmax.
        settings: launch settings; from the table by default.
    """
    settings = settings or forward_settings(logits)
    with torch.cuda.device_of(logits):
        forward = Forward(logits, tokens, None, bias, transform, settings, include_eos=include_eos, sequences=True)
        out = forward.empty_stats()
        counters = torch.zeros(2, dtype=torch.int32, device=logits.device)
        active, sequences = plan_sequences(
            tokens, attention_mask, prompt_lens, eos_token_ids, include_eos, stop_at_eos, out, counters
        )
        if tokens.numel() > 0:
            forward.launch(logits, tokens, None, bias, out, active, sequences)
    return out, sequences


class Forward:
    """`row_stats`, or the kernel of `sequence_stats`, with all that does not depend on where tensors lie worked out.

    It is called with tensors that have the shapes, strides, dtypes, device and starts modulo 16 bytes of those it is
    made for, and holds none of them. The arguments are those of `row_stats`.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        mask: torch.Tensor | None,
        bias: torch.Tensor | None,
        transform: Transform,
        settings: Settings | None = None,
        for_backward: bool = True,
        include_eos: bool = True,
        sequences: bool = False,
    ) -> None:
        settings = settings or forward_settings(logits)
        self._device = device = logits.device
        self._rows = rows = targets.numel()
        self._for_backward = for_backward
        dtype = arithmetic_dtype(logits.dtype)
        self._empty = empties(targets.shape, dtype, device)
        outer, inner, vocab = logits.shape
        variant = _variant(
            settings,
            dtype,
            logits.element_size(),
            vector_width(logits),
            vocab,
            not sequences and is_flat(logits),
            mask is not None,
            bias is not None,
            transform.softcap is not None,
            has_pairs(transform.factor, transform.squeeze),
            sequences,
            include_eos,
            device,
            packed_instructions(device),
        )
        names = ("SEGMENTS", "GROUP", "TOGETHER", "CHUNK")
        segments, group, together, chunk = (variant.constants[name] for name in names)
        # zeros in words of 4 bytes: what passes from program to program, and the rows of each sequence that are done
        self._wide = dtype == torch.float64
        self._sets = rows * segments * settings.warps * dtype.itemsize if segments > 1 else 0
        self._arrivals = outer if sequences else 0
        groups = ceil_div(rows, group)
        # rows that are cut have a program for their end, one for each group
        programs = ceil_div(groups * (segments * group + (segments > 1)), together)
        # twice as many rows as are being read at a time: when they end, their segments are done
        lag = ceil_div(2 * multiprocessors(device) * settings.resident, segments * group)
        if sequences:
            # resident programs walk a list whose length is known on the device alone
            programs = min(programs, multiprocessors(device) * settings.resident)
        self._kernel = Repeated(
            row_stats_kernel,
            programs,
            (rows, inner, logits.stride(0), logits.stride(1), outer if sequences else 0, lag, *spread(groups, chunk)),
            (transform.factor, transform.squeeze or 0.0),
            variant,
        )

    def __call__(
        self, logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None, bias: torch.Tensor | None
    ) -> RowStats:
        """Statistics of every row."""
        device = self._device
        if device.index is not None and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(logits, targets, mask, bias)
        out = self.empty_stats()
        if self._rows == 0:
            return out
        self.launch(logits, targets, mask, bias, out)
        return out

    def empty_stats(self) -> RowStats:
        """Room for the results, on the current device."""
        new = self._empty
        return RowStats(new(), new(), new(), new()) if self._for_backward else RowStats(new(), new(), None, None)

    def launch(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        mask: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: RowStats,
        active: ActiveRows | None = None,
        sequences: Sequences | None = None,
    ) -> None:
        """Fill `out`, on the current device."""
        count = self._sets + self._arrivals
        zeros = zeros_between_launches(count, self._device) if count else None
        sets = zeros if self._sets else None
        if sets is not None and self._wide:
            sets = sets[: self._sets].view(torch.int64)
        self._kernel(
            logits,
            bias,
            targets,
            mask,
            *out,
            *((None, None) if active is None else active),
            sets,
            zeros[self._sets :] if self._arrivals else None,
            *((None,) * 3 if sequences is None else (sequences.pending, sequences.eos_column, sequences.sums)),
        )


@cache
def _variant(
    settings: Settings,
    dtype: torch.dtype,
    itemsize: int,
    width: int,
    vocab: int,
    flat: bool,
    has_mask: bool,
    has_bias: bool,
    softcap: bool,
    paired: bool,
    sequences: bool,
    include_eos: bool,
    device: torch.device,
    packed: int,
) -> Variant:
    narrow = width * itemsize < 8
    words = settings.words and narrow and itemsize == 2
    width = 8 if words else width
    pairs = paired and not has_bias and itemsize == 2 and (words or width > 1)
    # what takes many instructions an element, and registers beyond the table's limit
    heavy = has_bias or (softcap and not pairs) or itemsize == 8
    most = None if heavy else settings.registers
    if itemsize == 8:
        # left to itself, the assembler takes fewer than it needs, and spills
        most = 128
    elif most is not None and (sequences or not pairs):
        # sums over sequences take a few, and what is not packed
        most = max(most, 72 if sequences and words else 56)
    # what is unpacked takes a register each, and more where much is done with it or each has a load of its own
    unpacked = (1 if width == 1 else 2) if heavy else 4
    unroll = settings.unroll if pairs and not softcap else min(settings.unroll, unpacked)
    # as many loads on their way
    depth = settings.unroll * (settings.depth + 1) // unroll - 1
    if heavy:
        # what takes long for each element is worth fewer, larger programs
        settings = settings._replace(segment=2 * settings.segment)
    segments, length = settings.segments(vocab, itemsize)
    return Variant(
        {
            "ACC": TRITON_DTYPE[dtype],
            "SOFTCAP": softcap,
            "FLAT": flat,
            "PAIRS": pairs,
            "PACKED": packed,
            "WRITTEN_OUT": not heavy,
            "SEQUENCES": sequences,
            "INCLUDE_EOS": include_eos,
            "VOCAB": vocab,
            "SEGMENTS": segments,
            "GROUP": settings.warps if segments > 1 and not sequences else 1,
            "LENGTH": length,
            "UNROLL": unroll * (16 // itemsize) // width,
            "LANES": settings.lanes,
            "WIDTH": width,
            "DEPTH": depth,
            "WORDS": words,
            "TOGETHER": settings.together if has_mask and segments == 1 else 1,
            "CHUNK": NEIGHBOURS if segments == 1 else 1,
            "SUM_BLOCK": min(BLOCK, 128 * settings.warps),
        },
        enable_fp_fusion=False,
        num_warps=settings.warps,
        **registers(most, device),
    )
