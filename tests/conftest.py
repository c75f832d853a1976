"""For all tests: one torch thread, and Ray's workers as important as the tests that wait for them.

Some tests fork. A forked child hangs in the first operation that torch shares out over threads which only
its parent has.
"""

from __future__ import annotations

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")
torch.set_num_threads(1)
