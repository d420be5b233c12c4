"""Checks that the functions on tokens share; each says the argument, what it must be, what came and the remedy."""

from __future__ import annotations

import torch

from entropy_fast.errors import InputError

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def describe(tensor: torch.Tensor) -> str:
    """`float32 (4, 7)`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def check_transform(temperature: float, scale: float, softcap: float | None) -> None:
    """Temperature, scale and softcap must be above 0 and finite."""
    if not 0.0 < temperature < float("inf"):
        raise InputError(f"temperature must be above 0 and finite, got {temperature}; greedy decoding has no entropy")
    if not 0.0 < scale < float("inf"):
        raise InputError(f"scale must be above 0 and finite, got {scale}; it multiplies the logits, 1.0 for none")
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise InputError(f"softcap must be above 0 and finite, or None for none, got {softcap}")


def check_positions(targets: torch.Tensor, mask: torch.Tensor | None, shape: torch.Size, of: str) -> None:
    """One token id, and one bool where a mask is given, for every position of `of`, whose positions are `shape`."""
    if targets.dtype not in (torch.int32, torch.int64) or targets.shape != shape:
        raise InputError(
            f"targets must be int32 or int64 with shape {tuple(shape)} to fit {of}, got {describe(targets)}; "
            "pass one token id per position"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        raise InputError(
            f"mask must be bool with shape {tuple(shape)} to fit {of}, got {describe(mask)}; "
            "pass mask.bool() with one entry per position"
        )


def check_bias(bias: torch.Tensor | None, vocab: int) -> None:
    """A floating-point bias of one entry per token."""
    if bias is not None and (bias.shape != (vocab,) or bias.dtype not in FLOATING):
        raise InputError(f"bias must be floating point with shape ({vocab},), got {describe(bias)}")


def check_devices(device: torch.device, of: str, **tensors: torch.Tensor | None) -> None:
    """Every tensor lies on `device`, that of `of`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise InputError(f"{name} must be on the device of {of}, {device}, got {tensor.device}; move it there")


def check_target_range(targets: torch.Tensor, mask: torch.Tensor | None, vocab: int) -> None:
    """On a CPU, name the first active target outside the vocabulary; elsewhere it gives NaN: looking would wait."""
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    least, most = targets.aminmax()
    if int(least) >= 0 and int(most) < vocab:
        return
    outside = (targets < 0) | (targets >= vocab)
    if mask is not None:
        outside &= mask
    if outside.any():
        position = tuple(outside.nonzero()[0].tolist())
        row = position[0] if len(position) == 1 else position
        raise InputError(
            f"targets must be in [0, {vocab}), got {int(targets[position])} in row {row}; "
            "mask padding and ignored positions with `mask`"
        )


def check_prompt_lens(prompt_lens: torch.Tensor, columns: int) -> None:
    """Generation starts at a column of the sequence, after at least one token."""
    outside = (prompt_lens < 1) | (prompt_lens > columns)
    if outside.any():
        i = int(outside.nonzero()[0])
        raise InputError(
            f"prompt_lens must be in 1..{columns}, got {int(prompt_lens[i])} for sequence {i}; it is the column at "
            "which generation starts, after at least one prompt token"
        )
