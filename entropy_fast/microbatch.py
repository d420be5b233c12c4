"""What one forward pass reads, as tensors on the model's device.

Everything is worked out on the CPU, index lists instead of boolean masks, and copied without waiting: a mask used as
an index makes a GPU stop to count, and a scoring pass must not stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from entropy_fast.layout import DenseRollouts


@dataclass(frozen=True)
class Segments:
    """Which tokens of a packed row attend to which: segment s holds queries, and the keys that they may look at.

    The last `query_lengths[s]` keys of a segment are its own tokens; before them stands the prompt that the segment
    continues. Query i sees the keys up to its own.

    Attributes:
        query_lengths: tokens of each segment, which together are the row, in order.
        key_lengths: keys of each segment, at least as many.
        key_index: (sum of key_lengths,) int64, the token of the row that each key belongs to; None when the keys are
            the row itself, in order.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    key_index: Tensor | None
    _sent: dict[object, tuple[Tensor, ...]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_rows(cls, rows: int, width: int) -> Segments:
        """Every row of a rectangle by itself, one behind the other."""
        return cls((width,) * rows, (width,) * rows, None)

    @property
    def tokens(self) -> int:
        """The length of the row."""
        return sum(self.query_lengths)

    def starts_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(segments + 1,) int32 each: 0 and the running sums of the queries' and the keys' lengths."""
        if device not in self._sent:
            self._sent[device] = tuple(_send(_running_sums(x), device) for x in (self.query_lengths, self.key_lengths))
        queries, keys = self._sent[device]
        return queries, keys

    def tiles_on(self, device: torch.device, size: int) -> tuple[Tensor, Tensor]:
        """Int32 each: the segment and its first query of every tile of up to `size` queries."""
        if (device, size) not in self._sent:
            tiles = [(s, i) for s, n in enumerate(self.query_lengths) for i in range(0, n, size)]
            self._sent[device, size] = tuple(
                _send(torch.tensor(x, dtype=torch.int32), device) for x in zip(*tiles, strict=True)
            )
        segments, queries = self._sent[device, size]
        return segments, queries


@dataclass(frozen=True)
class Microbatch:
    """What one forward pass reads and which of its positions are scored.

    Attributes:
        sequences: indices into the rollouts.
        input_ids: (rows, width) int64.
        position_ids: (rows, width) int64.
        active: (R,) int64, the positions, counted through the rows, whose hidden states are scored.
        targets: (R,) int64, the token that each of them is to predict.
        rows: (R,) int64, on the results' device: the sequence that the target belongs to.
        columns: (R,) int64, likewise: the column of the rollouts that the target came from.
        tokens: real tokens that the model reads, each counted once.
        segments: who attends to whom in a packed row; None for right-padded rows.
    """

    sequences: tuple[int, ...]
    input_ids: Tensor
    position_ids: Tensor
    active: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    tokens: int
    segments: Segments | None = None


def padded(
    dense: DenseRollouts, sequences: Sequence[int], device: torch.device, result_device: torch.device
) -> Microbatch:
    """Right-padded rows, one for each sequence."""
    index = torch.tensor(sequences)
    lengths = dense.input_lengths[index]
    width = int(lengths.max())
    tokens = dense.tokens[index, : width + 1]
    # what lies beyond a sequence's own inputs is padding, also where a longer neighbour goes on
    real = torch.arange(width) < lengths[:, None]
    row, position = (dense.generated[index, 1 : width + 1] & real).nonzero(as_tuple=True)
    return Microbatch(
        sequences=tuple(sequences),
        input_ids=_send(torch.where(real, tokens[:, :-1], 0), device),
        position_ids=_send(torch.arange(width).expand(len(index), -1).contiguous(), device),
        active=_send(row * width + position, device),
        targets=_send(tokens[row, position + 1], device),
        rows=_send(index[row], result_device),
        columns=_send(dense.columns[index[row], position + 1], result_device),
        tokens=int(lengths.sum()),
    )


def packed(
    dense: DenseRollouts, sequences: Sequence[int], device: torch.device, result_device: torch.device
) -> Microbatch:
    """One row: every prompt once, followed by what its completions add to it."""
    row = _Row(dense)
    for family in dense.families(sequences):
        row.append(family)
    rows, targets = _joined(row.rows), _joined(row.targets)
    identity = row.query_lengths == row.key_lengths
    segments = Segments(
        tuple(row.query_lengths),
        tuple(row.key_lengths),
        None if identity else _send(_joined(row.keys), device),
    )
    return Microbatch(
        sequences=tuple(sequences),
        input_ids=_send(_joined(row.tokens)[None], device),
        position_ids=_send(_joined(row.positions)[None], device),
        active=_send(_joined(row.active), device),
        targets=_send(dense.tokens[rows, targets], device),
        rows=_send(rows, result_device),
        columns=_send(dense.columns[rows, targets], result_device),
        tokens=segments.tokens,
        segments=segments,
    )


class _Row:
    """A packed row in the making; in NumPy, whose calls cost less: a row has hundreds of pieces of a few numbers."""

    def __init__(self, dense: DenseRollouts) -> None:
        self._all_tokens = dense.tokens.numpy()
        self._generated = dense.generated.numpy()
        self._prompt_lengths = dense.prompt_lengths.tolist()
        self._input_lengths = dense.input_lengths.tolist()
        self.length = 0
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.keys: list[np.ndarray] = []
        self.query_lengths: list[int] = []
        self.key_lengths: list[int] = []
        # of every scored token: where its logits are, its sequence, its column
        self.active: list[np.ndarray] = []
        self.rows: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []

    def append(self, family: Sequence[int]) -> None:
        """Sequences of one prompt. A prompt with a single sequence needs no segment of its own."""
        shared = self._prompt_lengths[family[0]] if len(family) > 1 else 0
        prompt = np.arange(self.length, self.length + shared)
        if shared:
            self._segment(family[0], 0, shared, prompt[:0])
        for i in family:
            end = self._input_lengths[i]
            own = self._segment(i, shared, end, prompt) if end > shared else prompt[:0]
            where = np.concatenate([prompt, own])
            target = np.flatnonzero(self._generated[i, 1 : end + 1]) + 1
            self.active.append(where[target - 1])
            self.rows.append(np.full_like(target, i))
            self.targets.append(target)

    def _segment(self, i: int, start: int, end: int, before: np.ndarray) -> np.ndarray:
        """Tokens start..end of sequence i, which may look at the row's tokens `before` too; where they stand."""
        own = np.arange(self.length, self.length + end - start)
        self.length += end - start
        self.tokens.append(self._all_tokens[i, start:end])
        self.positions.append(np.arange(start, end))
        self.keys.append(np.concatenate([before, own]))
        self.query_lengths.append(end - start)
        self.key_lengths.append(len(self.keys[-1]))
        return own


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))


def _running_sums(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
