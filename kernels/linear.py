"""The fused-linear kernels, under the names of `entropy_fast.reference.linear`."""

from entropy_fast.kernels.linear_backward import linear_backward
from entropy_fast.kernels.linear_forward import linear_stats
from entropy_fast.kernels.linear_operands import filter_columns, has_accurate
from entropy_fast.kernels.linear_slabs import spare_memory

__all__ = [
    "filter_columns",
    "has_accurate",
    "linear_backward",
    "linear_stats",
    "spare_memory",
]
