"""One thread a process: the tests' tensors are small, and pytest-xdist already fills the cores.

With several threads in each of several workers, the threads spin against each other and a test takes ten times as long.
"""

import os

import pytest
import torch
from without_gpu import INTERPRETED, interpret_faster

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)
if INTERPRETED:
    interpret_faster()


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run of a test, whatever ran before it in its process."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need a CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
