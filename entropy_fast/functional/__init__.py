"""Differentiable statistics of tokens; chooses Triton or plain torch by device."""

from entropy_fast.functional.linear import linear_token_stats
from entropy_fast.functional.sequence import sequence_stats
from entropy_fast.functional.token import token_stats
from entropy_fast.functional.types import SequenceStats, TokenStats

__all__ = ["SequenceStats", "TokenStats", "linear_token_stats", "sequence_stats", "token_stats"]
