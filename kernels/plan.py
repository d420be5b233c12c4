"""Which rows to read: lists of active rows, so that no program idles, and the EOS and length of every sequence.

The lists are built without a word to the host. The order of that of sequences depends on timing, the results do not:
every row is computed by itself, and a sequence is summed in column order by whoever finishes its last row.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from entropy_fast.kernels.launch import Variant, launch
from entropy_fast.reference.rows import RowStats

BLOCK = 1024


class ActiveRows(NamedTuple):
    """Rows to compute: the first `counters[0]` entries of `rows`, flat positions of the targets; all on the device."""

    rows: torch.Tensor
    counters: torch.Tensor


class Sequences(NamedTuple):
    """What is known of N sequences before their rows are read, and room for their sums.

    Attributes:
        pending: (N,) int32, active rows of each sequence.
        lengths: (N,) int32, counted tokens.
        eos_column: (N,) int64, the first generated EOS or −1.
        runs_past_eos: (N,) bool.
        sums: (3, N) float64: log-prob and entropy of the counted tokens, log-prob of all emitted ones.
    """

    pending: torch.Tensor
    lengths: torch.Tensor
    eos_column: torch.Tensor
    runs_past_eos: torch.Tensor
    sums: torch.Tensor


@triton.jit
def write_zeros(position, idle, logprob_ptr, entropy_ptr, peak_ptr, log_sum_ptr):
    """What there is for positions that are not computed: zeros, at those that are `idle`."""
    tl.store(logprob_ptr + position, 0.0, mask=idle)
    tl.store(entropy_ptr + position, 0.0, mask=idle)
    if peak_ptr is not None:
        tl.store(peak_ptr + position, 0.0, mask=idle)
        tl.store(log_sum_ptr + position, 0.0, mask=idle)


@triton.jit(do_not_specialize=["columns", "eos_count"])
def plan_sequences_kernel(
    tokens_ptr,
    attention_ptr,
    prompt_lens_ptr,
    eos_ptr,
    rows_ptr,
    count_ptr,
    pending_ptr,
    lengths_ptr,
    eos_column_ptr,
    runs_past_ptr,
    sums_ptr,
    logprob_ptr,
    entropy_ptr,
    peak_ptr,
    log_sum_ptr,
    columns,
    eos_count,
    INCLUDE_EOS: tl.constexpr,
    STOP_AT_EOS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a sequence: where the first EOS is, then what that makes of every column."""
    sequence = tl.program_id(0)
    base = sequence.to(tl.int64) * columns
    # the token in column 0 has no logits before it
    start = tl.maximum(tl.load(prompt_lens_ptr + sequence), 1)
    eos_column = columns
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        generated = inside & (column >= start)
        generated &= tl.load(attention_ptr + base + column, mask=inside, other=0) != 0
        token = tl.load(tokens_ptr + base + column, mask=generated, other=-1)
        is_eos = tl.zeros([BLOCK], tl.int1)
        for i in range(eos_count):
            is_eos |= token == tl.load(eos_ptr + i)
        eos_column = tl.minimum(eos_column, tl.min(tl.where(is_eos & generated, column, columns), 0))
    emitted = 0
    counted = 0
    runs_past = 0
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        generated = inside & (column >= start)
        generated &= tl.load(attention_ptr + base + column, mask=inside, other=0) != 0
        runs_past += tl.sum((generated & (column > eos_column)).to(tl.int32), 0)
        if STOP_AT_EOS:
            generated &= column <= eos_column
        emitted += tl.sum(generated.to(tl.int32), 0)
        if INCLUDE_EOS:
            counted += tl.sum(generated.to(tl.int32), 0)
        else:
            counted += tl.sum((generated & (column != eos_column)).to(tl.int32), 0)
        flags = generated.to(tl.int32)
        entry = tl.atomic_add(count_ptr, tl.sum(flags, 0), sem="relaxed") + tl.cumsum(flags, 0) - flags
        position = base + column
        tl.store(rows_ptr + entry, position.to(tl.int32), mask=generated)
        write_zeros(position, inside & (generated == 0), logprob_ptr, entropy_ptr, peak_ptr, log_sum_ptr)
    tl.store(pending_ptr + sequence, emitted)
    tl.store(lengths_ptr + sequence, counted)
    tl.store(eos_column_ptr + sequence, tl.where(eos_column < columns, eos_column, -1).to(tl.int64))
    tl.store(runs_past_ptr + sequence, (runs_past > 0).to(tl.int8))
    if emitted == 0:
        for i in tl.static_range(3):
            tl.store(sums_ptr + i * tl.num_programs(0) + sequence, 0.0)


@triton.jit
def finish_sequence(
    sequence, sequences, columns, eos_column_ptr, sums_ptr, logprob_ptr, entropy_ptr, INCLUDE_EOS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum a sequence whose rows are all done, in column order and in float64."""
    skipped = -1
    if not INCLUDE_EOS:
        skipped = tl.load(eos_column_ptr + sequence).to(tl.int32)
    base = sequence.to(tl.int64) * columns
    logprobs = tl.zeros([BLOCK], tl.float64)
    entropies = tl.zeros([BLOCK], tl.float64)
    emitted = tl.zeros([BLOCK], tl.float64)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        # other multiprocessors wrote these: read them past this one's own cache
        logprob = tl.load(logprob_ptr + base + column, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        entropy = tl.load(entropy_ptr + base + column, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        emitted += logprob
        logprobs += tl.where(column == skipped, 0.0, logprob)
        entropies += tl.where(column == skipped, 0.0, entropy)
    tl.store(sums_ptr + sequence, tl.sum(logprobs, 0))
    tl.store(sums_ptr + sequences + sequence, tl.sum(entropies, 0))
    tl.store(sums_ptr + 2 * sequences + sequence, tl.sum(emitted, 0))


def plan_sequences(
    tokens: torch.Tensor,
    attention_mask: torch.Tensor,
    prompt_lens: torch.Tensor,
    eos_token_ids: torch.Tensor,
    include_eos: bool,
    stop_at_eos: bool,
    out: RowStats,
    counters: torch.Tensor,
) -> tuple[ActiveRows, Sequences]:
    """Lengths, EOS and active rows of N sequences, in one launch; `reference.masks.token_masks` is the contract.

    Args:
        tokens: (N, T), integer, contiguous.
        attention_mask: (N, T), bool or integer, contiguous.
        prompt_lens: (N,), integer.
        eos_token_ids: (any,), int64, on the same device.
        include_eos: whether the EOS counts.
        stop_at_eos: whether what follows the EOS is dropped.
        out: (N, T) each; zeros are written where no token was emitted.
        counters: zeros; the first counts the active rows.
    """
    n, columns = tokens.shape
    device = tokens.device
    active = ActiveRows(torch.empty(n * columns, dtype=torch.int32, device=device), counters)
    sequences = Sequences(
        pending=torch.empty(n, dtype=torch.int32, device=device),
        lengths=torch.empty(n, dtype=torch.int32, device=device),
        eos_column=torch.empty(n, dtype=torch.int64, device=device),
        runs_past_eos=torch.empty(n, dtype=torch.bool, device=device),
        sums=torch.empty(3, n, dtype=torch.float64, device=device),
    )
    launch(
        plan_sequences_kernel,
        n,
        (
            tokens,
            attention_mask,
            prompt_lens,
            eos_token_ids,
            *active,
            sequences.pending,
            sequences.lengths,
            sequences.eos_column,
            sequences.runs_past_eos,
            sequences.sums,
            *out,
        ),
        (columns, eos_token_ids.numel()),
        (),
        _plan(include_eos, stop_at_eos, min(BLOCK, triton.next_power_of_2(columns))),
    )
    return active, sequences


@cache
def _plan(include_eos: bool, stop_at_eos: bool, block: int) -> Variant:
    return Variant({"INCLUDE_EOS": include_eos, "STOP_AT_EOS": stop_at_eos, "BLOCK": block}, num_warps=4)
