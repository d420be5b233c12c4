"""Differentiable statistics of tokens; chooses Triton or plain torch by device."""

from entropy_fast.functional.linear import linear_token_stats
from entropy_fast.functional.types import TokenStats

__all__ = ["TokenStats", "linear_token_stats"]
