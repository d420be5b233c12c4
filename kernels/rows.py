"""Launching the forward over rows of logits: what a call needs beside the kernel (`rows_kernel`), worked out once.

Rows that a mask leaves out cost nothing: where rows are so few that programs may share them, a list of the active ones
is made first, which tells how many there are; elsewhere the kernel is given the mask.
"""

from __future__ import annotations

from functools import cache

import torch
import triton.language as tl

from entropy_fast.kernels.launch import Repeated, Variant, empties
from entropy_fast.kernels.plan import BLOCK, ActiveRows, Sequences, list_active, list_launch, plan_sequences
from entropy_fast.kernels.rows_kernel import row_stats_kernel
from entropy_fast.kernels.settings import (
    Settings,
    forward_settings,
    multiprocessors,
    registers,
    vector_width,
)
from entropy_fast.reference.rows import RowStats, arithmetic_dtype
from entropy_fast.reference.transform import Transform

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
        counters = torch.zeros(
            counter_count(settings, logits.device) + len(tokens), dtype=torch.int32, device=logits.device
        )
        active, sequences = plan_sequences(
            tokens, attention_mask, prompt_lens, eos_token_ids, include_eos, stop_at_eos, out, counters
        )
        if tokens.numel() > 0:
            forward.launch(logits, tokens, None, bias, out, active, sequences)
    return out, sequences


@cache
def split_below(settings: Settings, device: torch.device) -> int:
    """With fewer active rows than this, programs share rows."""
    return int(multiprocessors(device) * settings.split) if settings.segments > 1 else 0


def counter_count(settings: Settings, device: torch.device) -> int:
    """Counters of a launch: active rows, the next row to take, arrivals at each row that is split.

    Those of arrivals at each sequence follow.
    """
    return 2 + split_below(settings, device)


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
        few = split_below(settings, device)
        self._segments = segments = settings.segments
        # whether rows are shared depends on the number of active ones, which a list counts; of many rows enough remain
        listed = sequences or (mask is not None and rows < 2 * few)
        # rows that programs share; with a list at most so many
        split = min(rows, few) if listed or rows < few else 0
        counters = counter_count(settings, device)
        self._counters = empties((counters,), torch.int32, device)
        self._listing = list_launch(rows, counters) if listed and not sequences else None
        self._partials = None
        if segments > 1 and split > 0:
            self._partials = empties((split, segments, 4, settings.lanes), dtype, device)
        if listed:
            # resident programs walk a list whose length is known on the device alone
            programs = min(rows * segments, multiprocessors(device) * settings.resident)
        else:
            # the hardware hands out the rows
            programs = rows + split * (segments - 1)
        self._kernel = Repeated(
            row_stats_kernel,
            programs,
            (rows, inner, vocab, logits.stride(0), logits.stride(1), few, outer if sequences else 0),
            (transform.factor, transform.squeeze or 0.0),
            _variant(
                settings,
                dtype,
                logits.element_size(),
                vector_width(logits),
                vocab,
                # rows a constant apart
                not sequences and (outer == 1 or logits.stride(0) == inner * logits.stride(1)),
                bias is not None,
                transform.softcap is not None,
                sequences,
                include_eos,
                device,
            ),
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
        active = None
        if self._listing is not None:
            active = list_active(mask, out, self._counters(), self._listing)
        self.launch(logits, targets, mask, bias, out, active)
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
        active: ActiveRows | None,
        sequences: Sequences | None = None,
    ) -> None:
        """Fill `out`, on the current device."""
        partials = None
        counters = None if active is None else active.counters
        if self._segments > 1:
            # split or not, the kernel is the same one, and so are the types of what it is given
            partials = out.logprob if self._partials is None else self._partials()
            if active is None:
                counters = partials.view(torch.int32) if self._partials is None else self._counters().zero_()
        self._kernel(
            logits,
            bias,
            targets,
            mask if active is None else None,
            *out,
            None if active is None else active.rows,
            counters,
            partials,
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
    has_bias: bool,
    softcap: bool,
    sequences: bool,
    include_eos: bool,
    device: torch.device,
) -> Variant:
    narrow = width * itemsize < 8
    words = settings.words and narrow and itemsize == 2
    width = 8 if words else width
    # elements that are not in words of two take a register each
    unroll = min(settings.unroll, 8 // max(itemsize, 4)) if has_bias or softcap else settings.unroll
    # what does not fit into the limit would spill
    extra = has_bias or softcap or (sequences and (narrow or itemsize > 2))
    most = None if extra and (narrow or unroll > 2) else settings.registers
    if itemsize == 8:
        # all that there are: left alone, the compiler takes fewer and spills
        most = min(255, 2048 // settings.warps)
    return Variant(
        {
            "ACC": TRITON_DTYPE[dtype],
            "SOFTCAP": softcap,
            "EVEN": not words and vocab % width == 0,
            "FLAT": flat,
            "PAIRS": itemsize == 2 and not (has_bias or softcap) and (words or width > 1),
            "PACKED": device.type == "cuda" and torch.version.hip is None,
            "SEQUENCES": sequences,
            "INCLUDE_EOS": include_eos,
            "SEGMENTS": settings.segments,
            "UNROLL": unroll * (16 // itemsize) // width,
            "LANES": settings.lanes,
            "WIDTH": width,
            "WORDS": words,
            "SUM_BLOCK": min(BLOCK, 128 * settings.warps),
        },
        num_warps=settings.warps,
        **registers(most, device),
    )
