"""One thread a process: the tests' tensors are small, and pytest-xdist already fills the cores.

With several threads in each of several workers, the threads spin against each other and a test takes ten times as long.
"""

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)
